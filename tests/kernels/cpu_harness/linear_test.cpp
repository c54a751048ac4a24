// Tests of the native linear layers without Python, for AddressSanitizer, UBSan and emulated instruction sets.
// Prints one line per failure and "ok: N checks" at the end; the exit status counts failures (at most 100).
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "linear.h"

using namespace awq_cpu;

namespace {

long checks = 0, failures = 0;

template <typename... Args>
void check(bool condition, const char* format, Args... args) {
  ++checks;
  if (condition) return;
  if (++failures <= 20) {
    std::printf("FAILED [%s] ", current_isa().c_str());
    std::printf(format, args...);
    std::printf("\n");
  }
}

std::mt19937 random_bits(7);

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }

struct Case {
  const char* name;
  PackedLinear weight;
};

std::vector<int32_t> random_words(int64_t count, bool extreme) {
  std::vector<int32_t> words(static_cast<size_t>(count));
  for (auto& word : words) {
    uint32_t bits = random_bits();
    if (extreme)  // every nibble 0 or 15
      bits = (bits & 0x11111111u) * 15;
    word = static_cast<int32_t>(bits);
  }
  return words;
}

PackedLinear awq(std::vector<int64_t> columns, int64_t k, int64_t group, FloatType type, ActivationMode mode, bool bias, bool extreme = false,
                 float scale = 0.01f) {
  std::vector<std::vector<int32_t>> q, z;
  std::vector<std::vector<uint16_t>> s;
  std::vector<AwqPart> parts;
  int64_t n = 0;
  for (int64_t count : columns) {
    n += count;
    q.push_back(random_words(k * count / 8, extreme));
    z.push_back(random_words(k / group * count / 8, extreme));
    s.emplace_back(static_cast<size_t>(k / group * count));
    for (auto& half : s.back()) {
      const float value = uniform(0.5f, 1.5f) * scale;
      half = type == FloatType::kFloat16 ? float_to_half(value) : static_cast<uint16_t>(float_to_bits(value) >> 16);
    }
  }
  for (size_t i = 0; i < columns.size(); ++i) parts.push_back({q[i].data(), z[i].data(), s[i].data(), columns[i]});
  std::vector<float> offsets(static_cast<size_t>(n));
  for (auto& value : offsets) value = uniform(-1, 1);
  return pack_awq(parts, k, group, type, mode, bias ? offsets.data() : nullptr);
}

std::vector<float> random_rows(int64_t rows, int64_t k) {
  std::vector<float> x(static_cast<size_t>(rows * k));
  for (int64_t r = 0; r < rows; ++r) {
    const float magnitude = std::exp(uniform(-6, 6));
    for (int64_t i = 0; i < k; ++i) {
      float value = uniform(-1, 1) * magnitude;
      if (random_bits() % 97 == 0) value *= 30.0f;  // outliers
      if (random_bits() % 13 == 0) value = 0.0f;
      x[static_cast<size_t>(r * k + i)] = value;
    }
  }
  return x;
}

AlignedBuffer quantize(const ActivationLayout& layout, const std::vector<float>& x, int64_t rows) {
  AlignedBuffer packed(static_cast<size_t>(layout.nbytes(rows)));
  quantize_rows(layout, x.data(), layout.k, 0, rows, packed.data());
  return packed;
}

std::vector<float> run(const PackedLinear& weight, const AlignedBuffer& activations, int64_t rows) {
  std::vector<float> y(static_cast<size_t>(rows * weight.out_features), -777.0f);
  linear_run(weight, activations.data(), rows, y.data(), weight.out_features, 0, weight.num_panels);
  return y;
}

bool same_bits(const float* a, const float* b, int64_t count) { return std::memcmp(a, b, static_cast<size_t>(count) * 4) == 0; }

// 15 scales of an int4 weight's group; 0 for the other types.
double largest_integer_part(const PackedLinear& weight, int64_t column, int64_t channel) {
  if (weight.type != WeightType::kInt4) return 0.0;
  const uint8_t* panel = weight.panels.data() + column / kPanelColumns * weight.panel_stride;
  const int64_t group = channel / weight.activations.group_size;
  return 15.0 * std::fabs(double(load_float(panel, group * kPanelColumns + column % kPanelColumns, weight.float_type)));
}

// Against fp64 on the same integers: only fp32 rounding may differ.
void test_values(const Case& c, int64_t rows) {
  const PackedLinear& weight = c.weight;
  const int64_t n = weight.out_features, k = weight.in_features;
  const std::vector<float> x = random_rows(rows, k);
  const AlignedBuffer packed = quantize(weight.activations, x, rows);
  const std::vector<float> y = run(weight, packed, rows);
  std::vector<float> w(static_cast<size_t>(n * k)), a(static_cast<size_t>(rows * k));
  unpack_weight(weight, w.data());
  dequantize_rows(weight.activations, packed.data(), 0, rows, a.data(), k);
  const auto* bias = reinterpret_cast<const float*>(weight.bias.data());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t column = 0; column < n; ++column) {
      double sum = bias != nullptr ? bias[column] : 0.0, magnitude = std::fabs(sum);
      for (int64_t i = 0; i < k; ++i) {
        const double product = double(a[size_t(r * k + i)]) * double(w[size_t(column * k + i)]);
        sum += product;
        // int4: the zero point's part comes in and is taken away again, so rounding is relative to q, not to q - z.
        magnitude += std::max(std::fabs(product), std::fabs(double(a[size_t(r * k + i)])) * largest_integer_part(weight, column, i));
      }
      const double error = std::fabs(double(y[size_t(r * n + column)]) - sum);
      check(error <= 2e-6 * magnitude + 1e-30, "%s: rows %ld row %ld column %ld: %g, expected %g", c.name, long(rows), long(r),
            long(column), double(y[size_t(r * n + column)]), sum);
    }
}

// Every row's bits are the same alone, in any batch, at any place in a tile, over any split of the panels.
void test_identity(const Case& c, int64_t rows) {
  const PackedLinear& weight = c.weight;
  const int64_t n = weight.out_features, k = weight.in_features;
  const std::vector<float> x = random_rows(rows, k);
  const AlignedBuffer packed = quantize(weight.activations, x, rows);
  const std::vector<float> y = run(weight, packed, rows);
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<float> row(x.begin() + r * k, x.begin() + (r + 1) * k);
    const AlignedBuffer alone = quantize(weight.activations, row, 1);
    const std::vector<float> z = run(weight, alone, 1);
    check(same_bits(z.data(), &y[size_t(r * n)], n), "%s: row %ld of %ld differs from the row alone", c.name, long(r), long(rows));
  }
  AlignedBuffer piecewise(static_cast<size_t>(weight.activations.nbytes(rows)));
  for (int64_t r = 0; r < rows;) {
    const int64_t end = std::min<int64_t>(rows, r + 1 + static_cast<int64_t>(random_bits() % 6));
    quantize_rows(weight.activations, &x[size_t(r * k)], k, r, end, piecewise.data());
    r = end;
  }
  std::vector<float> z(y.size());
  const AlignedBuffer cache(3 * 64 * 6);
  const auto* lines = reinterpret_cast<const char*>(cache.data());
  const int32_t blocks[] = {2, 0, 1};
  const ReadAhead ahead = {lines, lines, blocks, 3, 6, static_cast<int64_t>(random_bits() % 9)};
  for (int64_t panel = 0; panel < weight.num_panels;) {
    const int64_t end = std::min<int64_t>(weight.num_panels, panel + 1 + static_cast<int64_t>(random_bits() % 3));
    linear_run(weight, piecewise.data(), rows, z.data(), n, panel, end, ahead);
    panel = end;
  }
  check(same_bits(z.data(), y.data(), rows * n), "%s: rows %ld differ when quantized and run in pieces", c.name, long(rows));
}

void test_read_ahead() {
  const AlignedBuffer keys(3 * 64 * 4), values(3 * 64 * 4);
  const auto* k = reinterpret_cast<const char*>(keys.data());
  const auto* v = reinterpret_cast<const char*>(values.data());
  const int32_t blocks[] = {2, 0};
  const ReadAhead ahead = {k, v, blocks, 2, 4, 1};
  ReadAhead::Cursor all(ahead, 0);
  check(all.take(2) == k + 2 * 256 + 64, "the first line is not the first");
  check(all.take(2) == k, "what a block has too little of is not passed over");
  check(all.take(2) == k + 128 && all.take(4) == v + 2 * 256 && all.take(1) == v, "blocks of keys, then of values, are not in order");
  check(all.take(4) == nullptr && all.take(1) == nullptr, "there are lines past the last");
  check(ReadAhead::Cursor(ahead, 13).take(2) == v + 128 && ReadAhead::Cursor(ahead, 15).take(1) == nullptr, "an offset is not added");
  check(ReadAhead::Cursor(ReadAhead{}, 3).take(1) == nullptr, "there are lines of nothing");
}

void test_quantization(const ActivationLayout& layout) {
  const int64_t rows = 7;
  const std::vector<float> x = random_rows(rows, layout.k);
  const AlignedBuffer packed = quantize(layout, x, rows);
  std::vector<float> back(x.size());
  dequantize_rows(layout, packed.data(), 0, rows, back.data(), layout.k);
  const float limit = layout.mode == ActivationMode::kInt8 ? 127.0f : 32767.0f;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < layout.k; ++i) {
      const size_t at = size_t(r * layout.k + i);
      if (layout.mode == ActivationMode::kFloat32) {
        check(back[at] == x[at], "fp32 activations change at %ld", long(at));
        continue;
      }
      const int64_t within = i % layout.group_size, group_begin = i - within;
      const int64_t begin = group_begin + within / layout.block_size * layout.block_size;
      const int64_t end = std::min(begin + layout.block_size, group_begin + layout.group_size);
      float largest = 0.0f;
      for (int64_t j = begin; j < end; ++j) largest = std::max(largest, std::fabs(x[size_t(r * layout.k + j)]));
      check(std::fabs(back[at] - x[at]) <= largest / limit * 0.51f, "activation %g became %g, block maximum %g", double(x[at]),
            double(back[at]), double(largest));
    }
}

// A NaN or infinity shows in its whole row and in no other.
void test_special_values(const Case& c) {
  const PackedLinear& weight = c.weight;
  const int64_t n = weight.out_features, k = weight.in_features, rows = 6;
  std::vector<float> x = random_rows(rows, k);
  const std::vector<float> y = run(weight, quantize(weight.activations, x, rows), rows);
  for (float special : {NAN, INFINITY, -INFINITY, -NAN}) {
    for (int64_t at : {int64_t{0}, k / 2, k - 1}) {
      std::vector<float> changed = x;
      changed[size_t(2 * k + at)] = special;
      const std::vector<float> z = run(weight, quantize(weight.activations, changed, rows), rows);
      for (int64_t r = 0; r < rows; ++r) {
        if (r != 2) {
          check(same_bits(&z[size_t(r * n)], &y[size_t(r * n)], n), "%s: %g in row 2 touches row %ld", c.name, double(special), long(r));
          continue;
        }
        for (int64_t column = 0; column < n; ++column)
          check(!std::isfinite(z[size_t(r * n + column)]), "%s: %g vanished from column %ld", c.name, double(special), long(column));
      }
    }
  }
  // Denormals and huge values survive the round trip.
  for (float magnitude : {1e-44f, 1e-39f, 1e-37f, 1e-30f, 1e30f, FLT_MAX / 2}) {
    std::vector<float> scaled(static_cast<size_t>(k));
    for (auto& value : scaled) value = (random_bits() & 1) ? magnitude : -magnitude;
    const AlignedBuffer packed = quantize(weight.activations, scaled, 1);
    std::vector<float> back(scaled.size());
    dequantize_rows(weight.activations, packed.data(), 0, 1, back.data(), k);
    const float limit = weight.activations.mode == ActivationMode::kInt16 ? 32767.0f : 127.0f;
    for (int64_t i = 0; i < k; ++i) {
      const bool kept = std::fabs(back[size_t(i)] - scaled[size_t(i)]) <= magnitude / limit;
      check(kept || (magnitude < limit * FLT_MIN && back[size_t(i)] == 0.0f), "%s: %g became %g", c.name, double(scaled[size_t(i)]),
            double(back[size_t(i)]));
    }
  }
}

// All integers at their limits: the 16-bit and 32-bit sums must hold the largest values.
void test_integer_extremes() {
  for (ActivationMode mode : {ActivationMode::kInt8, ActivationMode::kInt16})
    for (int64_t k : {int64_t{64}, int64_t{4096}, int64_t{16384}}) {
      Case c{"extreme int4", awq({16}, k, k, FloatType::kFloat16, mode, false)};
      uint8_t* weights = c.weight.panels.data() + c.weight.weights_offset;
      std::fill(weights, weights + c.weight.activations.padded_k * 8, uint8_t{0xff});
      Case d{"extreme int8", {}};
      if (mode == ActivationMode::kInt16) {
        std::vector<float> w(static_cast<size_t>(16 * k), 1.0f);
        d.weight = pack_int8({{w.data(), 16}}, k, FloatType::kFloat32, nullptr);
        auto* bytes = reinterpret_cast<int8_t*>(d.weight.panels.data() + d.weight.weights_offset);
        std::fill(bytes, bytes + k * 16, int8_t{-128});
      }
      for (const Case* each : {&c, &d}) {
        if (each->weight.num_panels == 0) continue;
        std::vector<float> w(static_cast<size_t>(16 * k));
        unpack_weight(each->weight, w.data());
        for (int64_t rows : {1, 4, 9})
          for (float sign : {1.0f, -1.0f}) {
            const std::vector<float> x(static_cast<size_t>(rows * k), sign);
            const std::vector<float> y = run(each->weight, quantize(each->weight.activations, x, rows), rows);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t column = 0; column < 16; ++column) {
                double sum = 0.0, magnitude = 0.0;
                for (int64_t i = 0; i < k; ++i) {
                  sum += double(sign) * double(w[size_t(column * k + i)]);
                  magnitude += 15 * std::fabs(double(w[0]));
                }
                check(std::fabs(double(y[size_t(r * 16 + column)]) - sum) <= 1e-5 * std::max(std::fabs(sum), magnitude),
                      "%s k %ld rows %ld: %g, expected %g", each->name, long(k), long(rows), double(y[size_t(r * 16 + column)]), sum);
              }
          }
      }
    }
}

// Quantizing is the same in every variant, bit for bit.
void test_variants_agree() {
  const std::string before = current_isa();
  for (ActivationMode mode : {ActivationMode::kInt8, ActivationMode::kInt16, ActivationMode::kFloat32})
    for (int64_t group : {32, 64, 128, 48, 100}) {
      const int64_t k = group * 6, rows = 5;
      const ActivationLayout layout = ActivationLayout::make(mode, k, group);
      std::vector<float> x = random_rows(rows, k);
      x[3] = NAN;
      select_isa("generic");
      const AlignedBuffer expected = quantize(layout, x, rows);
      select_isa(before);
      const AlignedBuffer found = quantize(layout, x, rows);
      check(std::memcmp(expected.data(), found.data(), expected.nbytes()) == 0, "quantized activations differ from generic: mode %d group %ld",
            int(mode), long(group));
    }
}

// The packers that quantize lose no more than their format must.
void test_requantization() {
  const int64_t n = 24, k = 192;
  std::vector<float> w = random_rows(n, k), back(w.size());
  unpack_weight(pack_int8({{w.data(), n}}, k, FloatType::kFloat32, nullptr), back.data());
  for (int64_t row = 0; row < n; ++row) {
    float largest = 0.0f;
    for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(w[size_t(row * k + i)]));
    for (int64_t i = 0; i < k; ++i)
      check(std::fabs(back[size_t(row * k + i)] - w[size_t(row * k + i)]) <= largest / 253.0f, "int8 weight %g became %g",
            double(w[size_t(row * k + i)]), double(back[size_t(row * k + i)]));
  }
  unpack_weight(pack_int4({{w.data(), n}}, k, FloatType::kFloat32, ActivationMode::kInt8, nullptr), back.data());
  for (int64_t row = 0; row < n; ++row)
    for (int64_t g = 0; g < k; g += 32) {
      double error = 0.0, power = 0.0;
      float low = 0.0f, high = 0.0f;
      for (int64_t i = g; i < g + 32; ++i) {
        const size_t at = size_t(row * k + i);
        error += std::pow(double(back[at]) - double(w[at]), 2);
        low = std::min(low, w[at]);
        high = std::max(high, w[at]);
        power += 1.0;
      }
      check(std::sqrt(error / power) <= double(high - low) / 15.0 * 0.6, "int4 group error %g, range %g", std::sqrt(error / power),
            double(high - low));
    }
}

void test_invalid() {
  const auto throws = [](auto fn) {
    try {
      fn();
    } catch (const std::exception&) {
      return true;
    }
    return false;
  };
  check(throws([] { ActivationLayout::make(ActivationMode::kInt8, 100, 64); }), "group size 64 of 100 was accepted");
  check(throws([] { pack_awq({}, 64, 64, FloatType::kFloat16, ActivationMode::kInt8, nullptr); }), "no parts were accepted");
  check(throws([] { pack_awq({{nullptr, nullptr, nullptr, 12}}, 64, 64, FloatType::kFloat16, ActivationMode::kInt8, nullptr); }),
        "12 columns were accepted");
  check(throws([] { select_isa("sse9"); }), "an unknown instruction set was accepted");
}

std::vector<Case> make_cases() {
  std::vector<Case> cases;
  const ActivationMode int8 = ActivationMode::kInt8, int16 = ActivationMode::kInt16;
  for (ActivationMode mode : {int8, int16}) {
    cases.push_back({"g32", awq({40}, 96, 32, FloatType::kFloat16, mode, false)});
    cases.push_back({"g64 fused, bias", awq({24, 8, 8}, 576, 64, FloatType::kFloat16, mode, true)});
    cases.push_back({"g128 bf16", awq({48}, 1280, 128, FloatType::kBFloat16, mode, true)});
    cases.push_back({"g -1 576", awq({8}, 576, 576, FloatType::kFloat16, mode, false)});
    cases.push_back({"g -1 long", awq({16}, 2752, 2752, FloatType::kFloat16, mode, false)});
    cases.push_back({"g 48", awq({32}, 144, 48, FloatType::kFloat16, mode, false)});
    cases.push_back({"g 8", awq({24}, 40, 8, FloatType::kFloat16, mode, true)});
    cases.push_back({"g 100", awq({24}, 100, 100, FloatType::kFloat16, mode, true)});
    cases.push_back({"extreme zeros", awq({32}, 256, 64, FloatType::kFloat16, mode, false, true)});
    cases.push_back({"tiny scales", awq({32}, 256, 64, FloatType::kFloat16, mode, false, false, 1e-7f)});
    cases.push_back({"huge scales", awq({32}, 256, 64, FloatType::kFloat16, mode, false, true, 4e4f)});
    cases.push_back({"huge bf16 scales", awq({32}, 256, 64, FloatType::kBFloat16, mode, false, false, 1e20f)});
  }
  for (int64_t k : {64, 100, 576, 1536}) {
    const int64_t n = 37;
    const std::vector<float> w = random_rows(n, k), bias = random_rows(1, n);
    std::vector<uint16_t> half(w.size()), bfloat(w.size());
    for (size_t i = 0; i < w.size(); ++i) {
      half[i] = float_to_half(w[i]);
      bfloat[i] = static_cast<uint16_t>(float_to_bits(w[i]) >> 16);
    }
    cases.push_back({"int8", pack_int8({{w.data(), 20}, {w.data() + 20 * k, 17}}, k, FloatType::kFloat32, bias.data())});
    cases.push_back({"int4 of fp16", pack_int4({{half.data(), n}}, k, FloatType::kFloat16, int8, nullptr)});
    cases.push_back({"fp32", pack_dense({{w.data(), n}}, k, FloatType::kFloat32, bias.data())});
    cases.push_back({"fp16", pack_dense({{half.data(), 5}, {half.data() + 5 * k, 32}}, k, FloatType::kFloat16, nullptr)});
    cases.push_back({"bf16", pack_dense({{bfloat.data(), n}}, k, FloatType::kBFloat16, nullptr)});
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "quick";
  for (const std::string& isa : available_isas()) {
    select_isa(isa);
    const long before = checks;
    for (const Case& c : make_cases()) {
      for (int64_t rows = 1; rows <= 67; rows += quick ? 11 : (rows < 20 ? 1 : 7)) test_values(c, rows);
      for (int64_t rows : {4, 5, 7, 13, 16, 67, 130}) test_identity(c, quick ? rows % 20 + 1 : rows);
      test_special_values(c);
      test_quantization(c.weight.activations);
    }
    test_integer_extremes();
    test_variants_agree();
    test_requantization();
    test_invalid();
    test_read_ahead();
    std::printf("%s: %ld checks\n", isa.c_str(), checks - before);
  }
  std::printf("%s: %ld checks, %ld failures\n", failures == 0 ? "ok" : "FAILED", checks, failures);
  return static_cast<int>(std::min(failures, 100L));
}
