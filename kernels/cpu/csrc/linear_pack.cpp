// Layouts of packed activations and weights, and the packing done once per model.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "linear.h"

namespace awq_cpu {
namespace {

constexpr int kColumnNibbles[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // column 8c + j of a word lies in this nibble

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Fills in everything of a packed weight but the panels' contents.
PackedLinear make_packed(WeightType type, FloatType float_type, ActivationMode mode, int64_t n, int64_t k, int64_t group_size,
                         const float* bias) {
  require(n > 0 && k > 0, "a linear needs at least one input and one output");
  PackedLinear packed;
  packed.type = type;
  packed.float_type = float_type;
  packed.in_features = k;
  packed.out_features = n;
  packed.num_panels = ceil_div(n, kPanelColumns);
  packed.activations = ActivationLayout::make(mode, k, group_size);
  const ActivationLayout& layout = packed.activations;
  int64_t header = 0, weights = 0;
  switch (type) {
    case WeightType::kInt4:
      header = layout.num_groups * kPanelColumns * 3;
      weights = layout.padded_k * kPanelColumns / 2;
      break;
    case WeightType::kInt8:
      header = layout.num_groups * kPanelColumns * 4;
      weights = layout.padded_k * kPanelColumns;
      break;
    case WeightType::kFloat: weights = k * kPanelColumns * static_cast<int64_t>(float_nbytes(float_type)); break;
  }
  packed.weights_offset = round_up(header, kAlignment);
  packed.panel_stride = round_up(packed.weights_offset + weights, kAlignment);
  packed.panels = HugePiece(static_cast<size_t>(packed.panel_stride * packed.num_panels));
  if (bias != nullptr) {
    packed.bias = AlignedBuffer(static_cast<size_t>(packed.num_panels * kPanelColumns) * sizeof(float));
    std::memcpy(packed.bias.data(), bias, static_cast<size_t>(n) * sizeof(float));
  }
  return packed;
}

// Position of channel `channel` of a group in the padded order, in blocks of 8: the byte of an int4 panel and its nibble.
struct NibblePlace {
  int64_t byte;
  int shift;
};

NibblePlace nibble_place(int64_t padded_channel, int64_t column) {
  const int64_t within = padded_channel % 8;
  return {padded_channel / 8 * 64 + column * 4 + within % 4, within < 4 ? 0 : 4};
}

int64_t total_columns(const std::vector<DensePart>& parts) {
  int64_t n = 0;
  for (const DensePart& part : parts) n += part.out_features;
  return n;
}

// Calls fn(column, row pointer) with each output's weights as fp32 [k].
template <typename Function>
void for_each_column(const std::vector<DensePart>& parts, int64_t k, FloatType type, Function fn) {
  std::vector<float> row(static_cast<size_t>(k));
  int64_t column = 0;
  for (const DensePart& part : parts) {
    const auto* bytes = static_cast<const uint8_t*>(part.weight);
    for (int64_t i = 0; i < part.out_features; ++i, ++column) {
      const uint8_t* source = bytes + i * k * static_cast<int64_t>(float_nbytes(type));
      for (int64_t j = 0; j < k; ++j) row[static_cast<size_t>(j)] = load_float(source, j, type);
      fn(column, row.data());
    }
  }
}

int64_t int8_group_size(int64_t k) {
  for (int64_t group = 256; group >= 32; group -= 32)
    if (k % group == 0) return group;
  return k;
}

struct Int4Group {
  uint16_t scale;  // bf16
  float scale_value;
  int zero;
};

float int4_error(const float* w, int64_t count, float scale, int zero) {
  float error = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float q = std::min(15.0f, std::max(0.0f, std::nearbyint(w[i] / scale) + static_cast<float>(zero)));
    const float difference = (q - static_cast<float>(zero)) * scale - w[i];
    error += difference * difference;
  }
  return error;
}

// Scale and zero point of one group by least squared error over a few clipping ranges.
Int4Group choose_int4_group(const float* w, int64_t count) {
  float low = 0.0f, high = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(w[i])) return {0x7fc0, bits_to_float(0x7fc00000), 0};
    low = std::min(low, w[i]);
    high = std::max(high, w[i]);
  }
  Int4Group best{0, 0.0f, 0};
  float best_error = INFINITY;
  for (int step = 0; step < 8; ++step) {
    const float shrink = 1.0f - 0.03f * static_cast<float>(step);
    const float range = high * shrink / 15.0f - low * shrink / 15.0f;  // divided first: high - low may overflow
    const uint32_t bits = float_to_bits(range) + 0x8000;               // to bf16, the nearest
    const float scale = bits_to_float(bits & 0xffff0000u);
    if (!(scale >= 1e-37f)) return {0, 0.0f, 0};
    const int zero = static_cast<int>(std::min(15.0f, std::max(0.0f, std::nearbyint(-low * shrink / scale))));
    const float error = int4_error(w, count, scale, zero);
    if (step == 0 || error < best_error) {
      best_error = error;
      best = {static_cast<uint16_t>(bits >> 16), scale, zero};
    }
  }
  return best;
}

}  // namespace

ActivationLayout ActivationLayout::make(ActivationMode mode, int64_t k, int64_t group_size) {
  ActivationLayout layout;
  layout.mode = mode;
  layout.k = k;
  layout.group_size = mode == ActivationMode::kFloat32 ? k : group_size;
  require(k > 0 && layout.group_size > 0 && k % layout.group_size == 0,
          "group size " + std::to_string(group_size) + " does not divide " + std::to_string(k) + " input features");
  layout.num_groups = k / layout.group_size;
  if (mode == ActivationMode::kFloat32) {
    layout.padded_k = k;
    layout.scales_offset = layout.sums_offset = layout.tile_stride =
        round_up(k * kTileRows * static_cast<int64_t>(sizeof(float)), kAlignment);
    return layout;
  }
  layout.block_size = 32;
  if (mode == ActivationMode::kInt16)
    for (int64_t size : {128, 64})
      if (layout.group_size % size == 0) {
        layout.block_size = size;
        break;
      }
  layout.blocks_per_group = ceil_div(layout.group_size, layout.block_size);
  layout.num_blocks = layout.blocks_per_group * layout.num_groups;
  layout.padded_k = layout.num_blocks * layout.block_size;
  const int64_t value_nbytes = mode == ActivationMode::kInt8 ? 1 : 2;
  layout.scales_offset = layout.padded_k * kTileRows * value_nbytes;
  layout.sums_offset = layout.scales_offset + layout.num_blocks * kTileRows * 4;
  layout.tile_stride = round_up(layout.sums_offset + layout.num_groups * kTileRows * 4, kAlignment);
  return layout;
}

void dequantize_rows(const ActivationLayout& layout, const void* packed, int64_t row_begin, int64_t row_end, float* out,
                     int64_t ldo) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const uint8_t* tile = static_cast<const uint8_t*>(packed) + row / kTileRows * layout.tile_stride;
    const int64_t lane = row % kTileRows;
    const auto* scales = reinterpret_cast<const float*>(tile + layout.scales_offset);
    float* target = out + (row - row_begin) * ldo;
    for (int64_t channel = 0; channel < layout.k; ++channel) {
      const int64_t group = channel / layout.group_size, within = channel % layout.group_size;
      const int64_t place = group * layout.blocks_per_group * layout.block_size + within;
      const int64_t block = layout.block_size > 0 ? place / layout.block_size : 0;
      switch (layout.mode) {
        case ActivationMode::kInt8: {
          const auto* values = reinterpret_cast<const int8_t*>(tile);
          target[channel] = static_cast<float>(values[place / 4 * 16 + lane * 4 + place % 4]) * scales[block * 4 + lane];
          break;
        }
        case ActivationMode::kInt16: {
          const auto* values = reinterpret_cast<const int16_t*>(tile);
          const int64_t pair = place % 2, half = place % 4 / 2;
          target[channel] = static_cast<float>(values[place / 4 * 16 + pair * 8 + lane * 2 + half]) * scales[block * 4 + lane];
          break;
        }
        case ActivationMode::kFloat32:
          target[channel] = reinterpret_cast<const float*>(tile)[channel * kTileRows + lane];
          break;
      }
    }
  }
}

PackedLinear pack_awq(const std::vector<AwqPart>& parts, int64_t k, int64_t group_size, FloatType scale_type,
                      ActivationMode mode, const float* bias) {
  require(mode != ActivationMode::kFloat32, "int4 weights take int8 or int16 activations");
  require(scale_type != FloatType::kFloat32, "int4 scales are fp16 or bf16");
  struct Word {  // a column of words: 8 output columns of one part
    const AwqPart* part;
    int64_t index;
  };
  std::vector<Word> words;
  for (const AwqPart& part : parts) {
    require(part.out_features > 0 && part.out_features % 8 == 0,
            std::to_string(part.out_features) + " output features are not a multiple of 8");
    for (int64_t i = 0; i < part.out_features / 8; ++i) words.push_back({&part, i});
  }
  PackedLinear packed = make_packed(WeightType::kInt4, scale_type, mode, static_cast<int64_t>(words.size()) * 8, k, group_size, bias);
  const ActivationLayout& layout = packed.activations;
  const int64_t group_nbytes = layout.blocks_per_group * layout.block_size * kPanelColumns / 2;
  for (size_t w = 0; w < words.size(); ++w) {
    const int64_t half = static_cast<int64_t>(w) % 2, stride = words[w].part->out_features / 8;
    uint8_t* panel = packed.panels.data() + static_cast<int64_t>(w) / 2 * packed.panel_stride;
    auto* scales = reinterpret_cast<uint16_t*>(panel) + half * 8;
    uint8_t* zeros = panel + layout.num_groups * kPanelColumns * 2 + half * 8;
    uint8_t* weights = panel + packed.weights_offset + half * 32;
    const auto* qweight = reinterpret_cast<const uint32_t*>(words[w].part->qweight) + words[w].index;
    const auto* qzeros = reinterpret_cast<const uint32_t*>(words[w].part->qzeros) + words[w].index;
    for (int64_t group = 0; group < layout.num_groups; ++group) {
      std::memcpy(scales + group * kPanelColumns, words[w].part->scales + (group * stride + words[w].index) * 8, 16);
      const uint32_t zero = qzeros[group * stride];
      for (int column = 0; column < 8; ++column) zeros[group * kPanelColumns + column] = (zero >> (4 * kColumnNibbles[column])) & 15;
      uint8_t* target = weights + group * group_nbytes;
      for (int64_t channel = 0; channel < group_size; ++channel) {
        const uint32_t word = qweight[(group * group_size + channel) * stride];
        uint8_t* bytes = target + channel / 8 * 64 + channel % 4;
        const int shift = channel % 8 < 4 ? 0 : 4;
        for (int column = 0; column < 8; ++column)
          bytes[column * 4] |= static_cast<uint8_t>(((word >> (4 * kColumnNibbles[column])) & 15) << shift);
      }
    }
  }
  return packed;
}

PackedLinear pack_dense(const std::vector<DensePart>& parts, int64_t k, FloatType type, const float* bias) {
  PackedLinear packed =
      make_packed(WeightType::kFloat, type, ActivationMode::kFloat32, total_columns(parts), k, k, bias);
  const int64_t size = static_cast<int64_t>(float_nbytes(type));
  int64_t column = 0;
  for (const DensePart& part : parts)
    for (int64_t i = 0; i < part.out_features; ++i, ++column) {
      const uint8_t* source = static_cast<const uint8_t*>(part.weight) + i * k * size;
      uint8_t* target = packed.panels.data() + column / kPanelColumns * packed.panel_stride + column % kPanelColumns * size;
      if (size == 2)
        for (int64_t j = 0; j < k; ++j) std::memcpy(target + j * kPanelColumns * 2, source + j * 2, 2);
      else
        for (int64_t j = 0; j < k; ++j) std::memcpy(target + j * kPanelColumns * 4, source + j * 4, 4);
    }
  return packed;
}

PackedLinear pack_int8(const std::vector<DensePart>& parts, int64_t k, FloatType type, const float* bias) {
  const int64_t group_size = int8_group_size(k);
  PackedLinear packed =
      make_packed(WeightType::kInt8, FloatType::kFloat32, ActivationMode::kInt16, total_columns(parts), k, group_size, bias);
  const ActivationLayout& layout = packed.activations;
  const int64_t group_nbytes = layout.blocks_per_group * layout.block_size * kPanelColumns;
  for_each_column(parts, k, type, [&](int64_t column, const float* w) {
    uint8_t* panel = packed.panels.data() + column / kPanelColumns * packed.panel_stride;
    const int64_t lane = column % kPanelColumns;
    for (int64_t group = 0; group < layout.num_groups; ++group) {
      const float* values = w + group * group_size;
      float largest = 0.0f;
      bool finite = true;
      for (int64_t i = 0; i < group_size; ++i) {
        largest = std::max(largest, std::fabs(values[i]));
        finite = finite && std::isfinite(values[i]);
      }
      // A weight that is not finite must show, so its group's scale becomes NaN.
      const float scale = !finite ? bits_to_float(0x7fc00000) : largest < 1e-36f ? 0.0f : largest / 127.0f;
      std::memcpy(panel + (group * kPanelColumns + lane) * 4, &scale, 4);
      if (!(scale > 0.0f)) continue;
      auto* target = reinterpret_cast<int8_t*>(panel + packed.weights_offset + group * group_nbytes) + lane * 4;
      for (int64_t i = 0; i < group_size; ++i) {
        const float q = std::min(127.0f, std::max(-127.0f, std::nearbyint(values[i] / scale)));
        target[i / 4 * 64 + i % 4] = static_cast<int8_t>(q);
      }
    }
  });
  return packed;
}

PackedLinear pack_int4(const std::vector<DensePart>& parts, int64_t k, FloatType type, ActivationMode mode,
                       const float* bias) {
  require(mode != ActivationMode::kFloat32, "int4 weights take int8 or int16 activations");
  const int64_t group_size = k % 32 == 0 ? 32 : k;
  PackedLinear packed =
      make_packed(WeightType::kInt4, FloatType::kBFloat16, mode, total_columns(parts), k, group_size, bias);
  const ActivationLayout& layout = packed.activations;
  const int64_t group_nbytes = layout.blocks_per_group * layout.block_size * kPanelColumns / 2;
  for_each_column(parts, k, type, [&](int64_t column, const float* w) {
    uint8_t* panel = packed.panels.data() + column / kPanelColumns * packed.panel_stride;
    const int64_t lane = column % kPanelColumns;
    for (int64_t group = 0; group < layout.num_groups; ++group) {
      const float* values = w + group * group_size;
      const Int4Group chosen = choose_int4_group(values, group_size);
      std::memcpy(panel + (group * kPanelColumns + lane) * 2, &chosen.scale, 2);
      panel[(layout.num_groups * 2 + group) * kPanelColumns + lane] = static_cast<uint8_t>(chosen.zero);
      if (!(chosen.scale_value > 0.0f)) continue;
      uint8_t* target = panel + packed.weights_offset + group * group_nbytes;
      for (int64_t i = 0; i < group_size; ++i) {
        const float q = std::nearbyint(values[i] / chosen.scale_value) + static_cast<float>(chosen.zero);
        const NibblePlace place = nibble_place(i, lane);
        target[place.byte] |= static_cast<uint8_t>(static_cast<int>(std::min(15.0f, std::max(0.0f, q))) << place.shift);
      }
    }
  });
  return packed;
}

void unpack_weight(const PackedLinear& weight, float* out) {
  const ActivationLayout& layout = weight.activations;
  for (int64_t column = 0; column < weight.out_features; ++column) {
    const uint8_t* panel = weight.panels.data() + column / kPanelColumns * weight.panel_stride;
    const int64_t lane = column % kPanelColumns;
    float* row = out + column * weight.in_features;
    for (int64_t channel = 0; channel < weight.in_features; ++channel) {
      const int64_t group = channel / layout.group_size;
      const int64_t place = group * layout.blocks_per_group * layout.block_size + channel % layout.group_size;
      switch (weight.type) {
        case WeightType::kInt4: {
          const NibblePlace nibble = nibble_place(place, lane);
          const int q = (panel[weight.weights_offset + nibble.byte] >> nibble.shift) & 15;
          const int zero = panel[(layout.num_groups * 2 + group) * kPanelColumns + lane];
          row[channel] = static_cast<float>(q - zero) * load_float(panel, group * kPanelColumns + lane, weight.float_type);
          break;
        }
        case WeightType::kInt8: {
          const auto* q = reinterpret_cast<const int8_t*>(panel + weight.weights_offset);
          row[channel] = static_cast<float>(q[place / 4 * 64 + lane * 4 + place % 4]) *
                         load_float(panel, group * kPanelColumns + lane, FloatType::kFloat32);
          break;
        }
        case WeightType::kFloat:
          row[channel] = load_float(panel, channel * kPanelColumns + lane, weight.float_type);
          break;
      }
    }
  }
}

}  // namespace awq_cpu
