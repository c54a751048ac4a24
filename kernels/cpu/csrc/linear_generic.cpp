// The portable variant: plain C++, for machines without AVX2 and as the oracle of the others' integer arithmetic.
#include <cmath>

#include "linear_kernels.h"

namespace awq_cpu {
namespace {

// ---- activation quantization ----

template <typename Value>
int32_t quantize_block(const float* x, int64_t count, int64_t block_size, float limit, Value* out, int64_t row, bool wide,
                       float* scale) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const BlockScale block = block_scale(largest, limit);
  *scale = block.scale;
  int32_t sum = 0;
  for (int64_t i = 0; i < block_size; ++i) {
    int32_t value = 0;
    if (i < count && block.inverse != 0.0f) value = static_cast<int32_t>(lrintf(x[i] * block.inverse));
    sum += value;
    const int64_t within = wide ? i % 2 * 8 + row * 2 + i % 4 / 2 : row * 4 + i % 4;
    out[i / 4 * 16 + within] = static_cast<Value>(value);
  }
  return sum;
}

void quantize_row(const ActivationLayout& layout, const float* x, int64_t lane, int64_t group_begin, int64_t group_end,
                  uint8_t* tile) {
  auto* scales = reinterpret_cast<float*>(tile + layout.scales_offset) + lane;
  auto* sums = reinterpret_cast<float*>(tile + layout.sums_offset) + lane;
  const bool wide = layout.mode == ActivationMode::kInt16;
  for (int64_t group = group_begin; group < group_end; ++group) {
    float group_sum = 0.0f;
    for (int64_t b = 0; b < layout.blocks_per_group; ++b) {
      const int64_t block = group * layout.blocks_per_group + b, begin = b * layout.block_size;
      const int64_t left = layout.group_size - begin, count = left < layout.block_size ? left : layout.block_size;
      const float* source = x + (group - group_begin) * layout.group_size + begin;
      const int64_t place = block * layout.block_size * kTileRows;
      float scale;
      const int32_t sum =
          wide ? quantize_block(source, count, layout.block_size, 32767.0f, reinterpret_cast<int16_t*>(tile) + place, lane, true, &scale)
               : quantize_block(source, count, layout.block_size, 127.0f, reinterpret_cast<int8_t*>(tile) + place, lane, false, &scale);
      scales[block * kTileRows] = scale;
      group_sum = std::fmaf(scale, static_cast<float>(sum), group_sum);
    }
    sums[group * kTileRows] = group_sum;
  }
}

void quantize_groups_generic(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end,
                             int64_t group_begin, int64_t group_end, void* packed) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    uint8_t* tile = static_cast<uint8_t*>(packed) + row / kTileRows * layout.tile_stride;
    const int64_t lane = row % kTileRows;
    const float* source = x + (row - row_begin) * ldx;
    if (layout.mode == ActivationMode::kFloat32)
      for (int64_t i = 0; i < layout.k; ++i) reinterpret_cast<float*>(tile)[i * kTileRows + lane] = source[i];
    else
      quantize_row(layout, source, lane, group_begin, group_end, tile);
  }
}

// ---- matrix product ----

constexpr int64_t kMaxBlock = 128;

// One block of weights as int16 [block_size][16].
void unpack_block(const PackedLinear& weight, const uint8_t* panel, int64_t block, int16_t* out) {
  const int64_t size = weight.activations.block_size;
  const uint8_t* source = panel + weight.weights_offset;
  if (weight.type == WeightType::kInt4) {
    source += block * size * kPanelColumns / 2;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t column = 0; column < kPanelColumns; ++column) {
        const uint8_t byte = source[i / 8 * 64 + column * 4 + i % 4];
        out[i * kPanelColumns + column] = i % 8 < 4 ? byte & 15 : byte >> 4;
      }
  } else {
    const auto* values = reinterpret_cast<const int8_t*>(source) + block * size * kPanelColumns;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t column = 0; column < kPanelColumns; ++column)
        out[i * kPanelColumns + column] = values[i / 4 * 64 + column * 4 + i % 4];
  }
}

// Integer dot products of one row's block with 16 columns. |weight| <= 128 and |activation| <= 32767 over at most 128 channels stay
// below 2^29.
void dot_block(const int16_t* w, const uint8_t* tile, int64_t lane, int64_t block, const ActivationLayout& layout, int32_t* dot) {
  for (int64_t column = 0; column < kPanelColumns; ++column) dot[column] = 0;
  const int64_t begin = block * layout.block_size * kTileRows;
  for (int64_t i = 0; i < layout.block_size; ++i) {
    const int32_t value = layout.mode == ActivationMode::kInt8
                              ? reinterpret_cast<const int8_t*>(tile)[begin + i / 4 * 16 + lane * 4 + i % 4]
                              : reinterpret_cast<const int16_t*>(tile)[begin + i / 4 * 16 + i % 2 * 8 + lane * 2 + i % 4 / 2];
    for (int64_t column = 0; column < kPanelColumns; ++column) dot[column] += w[i * kPanelColumns + column] * value;
  }
}

struct RowState {
  float total[kPanelColumns];
  float group[kPanelColumns];
};

// Adds a finished group: total += (group - zero * sum) * scale.
void finish_group(const PackedLinear& weight, const uint8_t* panel, int64_t group, float sum, RowState& state) {
  const bool int4 = weight.type == WeightType::kInt4;
  const uint8_t* zeros = panel + weight.activations.num_groups * kPanelColumns * 2;
  for (int64_t column = 0; column < kPanelColumns; ++column) {
    const int64_t index = group * kPanelColumns + column;
    const float scale = load_float(panel, index, weight.float_type);
    float value = state.group[column];
    if (int4) value = value - static_cast<float>(zeros[index]) * sum;
    state.total[column] = state.total[column] + value * scale;
    state.group[column] = 0.0f;
  }
}

void store_row(const PackedLinear& weight, int64_t panel_index, const float* total, float* y) {
  const int64_t first = panel_index * kPanelColumns, left = weight.out_features - first;
  const int64_t count = left < kPanelColumns ? left : kPanelColumns;
  const auto* bias = reinterpret_cast<const float*>(weight.bias.data());
  for (int64_t column = 0; column < count; ++column)
    y[first + column] = bias != nullptr ? total[column] + bias[first + column] : total[column];
}

constexpr int64_t kRowBlock = 32;

void run_quantized(const PackedLinear& weight, const uint8_t* activations, int64_t row_begin, int64_t row_end, float* y, int64_t ldy,
                   int64_t panel_index) {
  const ActivationLayout& layout = weight.activations;
  const uint8_t* panel = weight.panels.data() + panel_index * weight.panel_stride;
  RowState states[kRowBlock] = {};
  int16_t w[kMaxBlock * kPanelColumns];
  for (int64_t block = 0; block < layout.num_blocks; ++block) {
    unpack_block(weight, panel, block, w);
    const bool last = (block + 1) % layout.blocks_per_group == 0;
    const int64_t group = block / layout.blocks_per_group;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const uint8_t* tile = activations + row / kTileRows * layout.tile_stride;
      const int64_t lane = row % kTileRows;
      RowState& state = states[row - row_begin];
      int32_t dot[kPanelColumns];
      dot_block(w, tile, lane, block, layout, dot);
      const float scale = reinterpret_cast<const float*>(tile + layout.scales_offset)[block * kTileRows + lane];
      for (int64_t column = 0; column < kPanelColumns; ++column)
        state.group[column] = state.group[column] + static_cast<float>(dot[column]) * scale;
      if (last) finish_group(weight, panel, group, reinterpret_cast<const float*>(tile + layout.sums_offset)[group * kTileRows + lane], state);
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) store_row(weight, panel_index, states[row - row_begin].total, y + row * ldy);
}

void run_dense(const PackedLinear& weight, const uint8_t* activations, int64_t row_begin, int64_t row_end, float* y, int64_t ldy,
               int64_t panel_index) {
  const ActivationLayout& layout = weight.activations;
  const uint8_t* panel = weight.panels.data() + panel_index * weight.panel_stride;
  float totals[kRowBlock][kPanelColumns] = {};
  for (int64_t k = 0; k < layout.k; ++k) {
    float w[kPanelColumns];
    for (int64_t column = 0; column < kPanelColumns; ++column)
      w[column] = load_float(panel, k * kPanelColumns + column, weight.float_type);
    for (int64_t row = row_begin; row < row_end; ++row) {
      const float* tile = reinterpret_cast<const float*>(activations + row / kTileRows * layout.tile_stride);
      const float value = tile[k * kTileRows + row % kTileRows];
      for (int64_t column = 0; column < kPanelColumns; ++column)
        totals[row - row_begin][column] = totals[row - row_begin][column] + w[column] * value;
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) store_row(weight, panel_index, totals[row - row_begin], y + row * ldy);
}

void run_generic(const PackedLinear& weight, const void* activations, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
                 int64_t panel_end, const ReadAhead&) {
  const auto* tiles = static_cast<const uint8_t*>(activations);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel)
    for (int64_t row = 0; row < num_rows; row += kRowBlock) {
      const int64_t end = row + kRowBlock < num_rows ? row + kRowBlock : num_rows;
      if (weight.type == WeightType::kFloat)
        run_dense(weight, tiles, row, end, y, ldy, panel);
      else
        run_quantized(weight, tiles, row, end, y, ldy, panel);
    }
}

}  // namespace

extern const LinearKernels kGenericKernels = {"generic", quantize_groups_generic, run_generic, nullptr, nullptr};

}  // namespace awq_cpu
