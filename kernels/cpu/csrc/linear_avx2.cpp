// The AVX2 variant (with FMA and F16C).
//
// int8 activations x int4 weights is the kernel that matters. Weights are the unsigned operand of vpmaddubsw, activations the signed
// one: a pair of products is at most 2 * 15 * 127 = 3810, so nothing saturates, and 8 of them (32 channels) fit in 16 bits. Then the
// 16-bit sums are widened and multiplied by the activation's scale, once per 32 channels; the zero point and the weight's scale come in
// once per group. The inner 32 channels are inline assembly: compilers spill the 13 to 16 live registers, which costs a third.
//
// int16 activations go through vpmaddwd, with int4 weights widened to 16 bits in a buffer in L1, int8 weights in registers.
#include <immintrin.h>

#include <type_traits>

#include "linear_kernels.h"

namespace awq_cpu {
namespace {

// ---- inner products in assembly ----
// Each macro handles one broadcast dword of one row against two weight vectors (16 columns). T is the operand name of the row's sums.

#define AWQ_FIRST(multiply, add, offset, T)            \
  "vpbroadcastd " offset "(%[a]), %[x]\n"              \
  multiply " %[x], %[w0], %[" T "0]\n"                 \
  multiply " %[x], %[w1], %[" T "1]\n"
#define AWQ_NEXT(multiply, add, offset, T)             \
  "vpbroadcastd " offset "(%[a]), %[x]\n"              \
  multiply " %[x], %[w0], %[t0]\n"                     \
  multiply " %[x], %[w1], %[t1]\n"                     \
  add " %[t0], %[" T "0], %[" T "0]\n"                 \
  add " %[t1], %[" T "1], %[" T "1]\n"
#define AWQ_ROWS_1(OP, multiply, add, o) OP(multiply, add, o "+0", "A")
#define AWQ_ROWS_2(OP, multiply, add, o) AWQ_ROWS_1(OP, multiply, add, o) OP(multiply, add, o "+4", "B")
#define AWQ_ROWS_3(OP, multiply, add, o) AWQ_ROWS_2(OP, multiply, add, o) OP(multiply, add, o "+8", "C")
#define AWQ_ROWS_4(OP, multiply, add, o) AWQ_ROWS_3(OP, multiply, add, o) OP(multiply, add, o "+12", "D")

// One step of 4 channels (int8) or 2 (int16) from weights already unpacked.
#define AWQ_STEP(ROWS, OP, multiply, add, weights, activations) \
  "vmovdqa " weights "(%[w]), %[w0]\n"                          \
  "vmovdqa " weights "+32(%[w]), %[w1]\n"                       \
  ROWS(OP, multiply, add, activations)
#define AWQ_INT8(ROWS, OP, weights, activations) AWQ_STEP(ROWS, OP, "vpmaddubsw", "vpaddw", weights, activations)
#define AWQ_INT16(ROWS, weights, activations) AWQ_STEP(ROWS, AWQ_NEXT, "vpmaddwd", "vpaddd", weights, activations)

#define AWQ_INT8_BLOCK(ROWS)                                                       \
  AWQ_INT8(ROWS, AWQ_FIRST, "0", "0") AWQ_INT8(ROWS, AWQ_NEXT, "64", "16")         \
  AWQ_INT8(ROWS, AWQ_NEXT, "128", "32") AWQ_INT8(ROWS, AWQ_NEXT, "192", "48")      \
  AWQ_INT8(ROWS, AWQ_NEXT, "256", "64") AWQ_INT8(ROWS, AWQ_NEXT, "320", "80")      \
  AWQ_INT8(ROWS, AWQ_NEXT, "384", "96") AWQ_INT8(ROWS, AWQ_NEXT, "448", "112")

#define AWQ_INT16_BLOCK(ROWS)                                                      \
  AWQ_INT16(ROWS, "0", "0") AWQ_INT16(ROWS, "64", "16") AWQ_INT16(ROWS, "128", "32") AWQ_INT16(ROWS, "192", "48") \
  AWQ_INT16(ROWS, "256", "64") AWQ_INT16(ROWS, "320", "80") AWQ_INT16(ROWS, "384", "96") AWQ_INT16(ROWS, "448", "112")

// Two steps of 4 channels straight from packed nibbles.
#define AWQ_NIBBLES(ROWS, OP, weights, low, high)      \
  "vmovdqa " weights "(%[w]), %[v0]\n"                 \
  "vmovdqa " weights "+32(%[w]), %[v1]\n"              \
  "prefetcht0 " weights "+2048(%[w])\n"                \
  "vpand %[v0], %[mask], %[w0]\n"                      \
  "vpand %[v1], %[mask], %[w1]\n"                      \
  "vpsrlw $4, %[v0], %[v0]\n"                          \
  "vpsrlw $4, %[v1], %[v1]\n"                          \
  ROWS(OP, "vpmaddubsw", "vpaddw", low)                \
  "vpand %[v0], %[mask], %[w0]\n"                      \
  "vpand %[v1], %[mask], %[w1]\n"                      \
  ROWS(AWQ_NEXT, "vpmaddubsw", "vpaddw", high)

#define AWQ_NIBBLE_BLOCK(ROWS)                                                                           \
  AWQ_NIBBLES(ROWS, AWQ_FIRST, "0", "0", "16") AWQ_NIBBLES(ROWS, AWQ_NEXT, "64", "32", "48")             \
  AWQ_NIBBLES(ROWS, AWQ_NEXT, "128", "64", "80") AWQ_NIBBLES(ROWS, AWQ_NEXT, "192", "96", "112")

// Two steps of one row against two panels, %[w] and %[u]: a broadcast serves both.
#define AWQ_NIBBLES_OF(OP, weights, T)                                         \
  "vmovdqa " weights ", %[v0]\n"                                               \
  "vmovdqa 32+" weights ", %[v1]\n"                                            \
  "vpand %[v0], %[mask], %[w0]\n"                                              \
  "vpand %[v1], %[mask], %[w1]\n"                                              \
  "vpsrlw $4, %[v0], %[v0]\n"                                                  \
  "vpsrlw $4, %[v1], %[v1]\n"                                                  \
  OP(T)                                                                        \
  "vpand %[v0], %[mask], %[v0]\n"                                              \
  "vpand %[v1], %[mask], %[v1]\n"                                              \
  "vpmaddubsw %[y], %[v0], %[v0]\n"                                            \
  "vpmaddubsw %[y], %[v1], %[v1]\n"                                            \
  "vpaddw %[v0], %[" T "0], %[" T "0]\n"                                       \
  "vpaddw %[v1], %[" T "1], %[" T "1]\n"
#define AWQ_LOW_FIRST(T) "vpmaddubsw %[x], %[w0], %[" T "0]\n vpmaddubsw %[x], %[w1], %[" T "1]\n"
#define AWQ_LOW_NEXT(T)                                                        \
  "vpmaddubsw %[x], %[w0], %[w0]\n vpmaddubsw %[x], %[w1], %[w1]\n"            \
  "vpaddw %[w0], %[" T "0], %[" T "0]\n vpaddw %[w1], %[" T "1], %[" T "1]\n"
#define AWQ_NIBBLES_PAIR(OP, weights, low, high)                               \
  "vpbroadcastd " low "(%[a]), %[x]\n"                                         \
  "vpbroadcastd " high "(%[a]), %[y]\n"                                        \
  AWQ_NIBBLES_OF(OP, weights "(%[w])", "A") AWQ_NIBBLES_OF(OP, weights "(%[u])", "B")

// One row's block of both panels. Every line of both is prefetched: with one of two, which costs less where the weights are in cache, the
// processor's own prefetcher loses its stride, and Zen 3 reads weights at 73% of the memory's rate instead of 93%.
#define AWQ_PREFETCH_PAIR(ahead) "prefetcht0 " ahead "(%[w])\n prefetcht0 " ahead "(%[u])\n"
AWQ_INLINE void nibbles_pair(const uint8_t* w, const uint8_t* u, const uint8_t* a, __m256i mask, __m256i (&s)[2][1][2]) {
  __m256i w0, w1, v0, v1, x, y;
  asm volatile(AWQ_PREFETCH_PAIR("2048") AWQ_PREFETCH_PAIR("2112")
               AWQ_NIBBLES_PAIR(AWQ_LOW_FIRST, "0", "0", "16") AWQ_NIBBLES_PAIR(AWQ_LOW_NEXT, "64", "32", "48")
               AWQ_PREFETCH_PAIR("2176") AWQ_PREFETCH_PAIR("2240")
               AWQ_NIBBLES_PAIR(AWQ_LOW_NEXT, "128", "64", "80") AWQ_NIBBLES_PAIR(AWQ_LOW_NEXT, "192", "96", "112")
               : [A0] "=&x"(s[0][0][0]), [A1] "=&x"(s[0][0][1]), [B0] "=&x"(s[1][0][0]), [B1] "=&x"(s[1][0][1]), [w0] "=&x"(w0), [w1] "=&x"(w1),
                 [v0] "=&x"(v0), [v1] "=&x"(v1), [x] "=&x"(x), [y] "=&x"(y)
               : [w] "r"(w), [u] "r"(u), [a] "r"(a), [mask] "x"(mask)
               : "memory");
}

// One step of 4 channels of int8 weights straight from the panel, against int16 activations: channels (0, 2), then (1, 3).
#define AWQ_INT8_WIDE(ROWS)                            \
  "vmovdqa (%[w]), %[v0]\n"                            \
  "vmovdqa 32(%[w]), %[v1]\n"                          \
  "prefetcht0 2048(%[w])\n"                            \
  "vpsllw $8, %[v0], %[w0]\n"                          \
  "vpsllw $8, %[v1], %[w1]\n"                          \
  "vpsraw $8, %[w0], %[w0]\n"                          \
  "vpsraw $8, %[w1], %[w1]\n"                          \
  ROWS(AWQ_NEXT, "vpmaddwd", "vpaddd", "0")            \
  "vpsraw $8, %[v0], %[w0]\n"                          \
  "vpsraw $8, %[v1], %[w1]\n"                          \
  ROWS(AWQ_NEXT, "vpmaddwd", "vpaddd", "16")

#define AWQ_SUMS_1(c) [A0] c(s[0][0]), [A1] c(s[0][1])
#define AWQ_SUMS_2(c) AWQ_SUMS_1(c), [B0] c(s[1][0]), [B1] c(s[1][1])
#define AWQ_SUMS_3(c) AWQ_SUMS_2(c), [C0] c(s[2][0]), [C1] c(s[2][1])
#define AWQ_SUMS_4(c) AWQ_SUMS_3(c), [D0] c(s[3][0]), [D1] c(s[3][1])

template <int kRows>
struct Block;

// s: the sums [row][8 columns each]. w, a: the block's weights and activations; see the panel and tile layouts.
#define AWQ_DEFINE_BLOCK(n)                                                                                                     \
  template <>                                                                                                                   \
  struct Block<n> {                                                                                                             \
    AWQ_INLINE static void int8_unpacked(const uint8_t* w, const uint8_t* a, __m256i (&s)[n][2]) {                              \
      __m256i w0, w1, x, t0, t1;                                                                                                \
      asm volatile(AWQ_INT8_BLOCK(AWQ_ROWS_##n)                                                                                 \
                   : AWQ_SUMS_##n("=&x"), [w0] "=&x"(w0), [w1] "=&x"(w1), [x] "=&x"(x), [t0] "=&x"(t0), [t1] "=&x"(t1)          \
                   : [w] "r"(w), [a] "r"(a)                                                                                     \
                   : "memory");                                                                                                 \
    }                                                                                                                           \
    AWQ_INLINE static void int8_nibbles(const uint8_t* w, const uint8_t* a, __m256i mask, __m256i (&s)[n][2]) {                 \
      __m256i w0, w1, v0, v1, x, t0, t1;                                                                                        \
      asm volatile(AWQ_NIBBLE_BLOCK(AWQ_ROWS_##n)                                                                               \
                   : AWQ_SUMS_##n("=&x"), [w0] "=&x"(w0), [w1] "=&x"(w1), [v0] "=&x"(v0), [v1] "=&x"(v1), [x] "=&x"(x),         \
                     [t0] "=&x"(t0), [t1] "=&x"(t1)                                                                             \
                   : [w] "r"(w), [a] "r"(a), [mask] "x"(mask)                                                                   \
                   : "memory");                                                                                                 \
    }                                                                                                                           \
    /* 4 channels; adds to s */                                                                                                  \
    AWQ_INLINE static void int8_wide(const uint8_t* w, const uint8_t* a, __m256i (&s)[n][2]) {                                  \
      __m256i w0, w1, v0, v1, x, t0, t1;                                                                                        \
      asm volatile(AWQ_INT8_WIDE(AWQ_ROWS_##n)                                                                                  \
                   : AWQ_SUMS_##n("+x"), [w0] "=&x"(w0), [w1] "=&x"(w1), [v0] "=&x"(v0), [v1] "=&x"(v1), [x] "=&x"(x),          \
                     [t0] "=&x"(t0), [t1] "=&x"(t1)                                                                             \
                   : [w] "r"(w), [a] "r"(a)                                                                                     \
                   : "memory");                                                                                                 \
    }                                                                                                                           \
    /* 16 channels; adds to s */                                                                                                \
    AWQ_INLINE static void int16_unpacked(const uint8_t* w, const uint8_t* a, __m256i (&s)[n][2]) {                             \
      __m256i w0, w1, x, t0, t1;                                                                                                \
      asm volatile(AWQ_INT16_BLOCK(AWQ_ROWS_##n)                                                                                \
                   : AWQ_SUMS_##n("+x"), [w0] "=&x"(w0), [w1] "=&x"(w1), [x] "=&x"(x), [t0] "=&x"(t0), [t1] "=&x"(t1)           \
                   : [w] "r"(w), [a] "r"(a)                                                                                     \
                   : "memory");                                                                                                 \
    }                                                                                                                           \
  };
AWQ_DEFINE_BLOCK(1)
AWQ_DEFINE_BLOCK(2)
AWQ_DEFINE_BLOCK(3)
AWQ_DEFINE_BLOCK(4)

// ---- the fixed sequence of floating-point operations ----
// Every path below goes through these three functions, in the same order for each (row, column):
//   per block  group = block_sum * activation_scale + group   (fused; the group's first block multiplies only)
//   per group  group = group - zero * activation_sum; total = group * weight_scale + total   (both fused)
//   at the end y = total (+ bias)

template <int kRows>
struct Sums {
  __m256 v[kRows][2];
};

template <int kRows, bool kFirst>
AWQ_INLINE void add_block(const __m256i (&dot)[kRows][2], const float* scales, Sums<kRows>& group) {
  for (int r = 0; r < kRows; ++r) {
    const __m256 scale = _mm256_broadcast_ss(scales + r);
    for (int h = 0; h < 2; ++h) {
      const __m256 value = _mm256_cvtepi32_ps(dot[r][h]);
      group.v[r][h] = kFirst ? _mm256_mul_ps(value, scale) : _mm256_fmadd_ps(value, scale, group.v[r][h]);
    }
  }
}

template <int kRows>
AWQ_INLINE void widen(__m256i (&sums)[kRows][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int r = 0; r < kRows; ++r)
    for (int h = 0; h < 2; ++h) sums[r][h] = _mm256_madd_epi16(sums[r][h], ones);
}

// A group's weight scales and zero points as fp32, [16] each.
struct GroupMeta {
  __m256 scale[2];
  __m256 zero[2];
};

AWQ_INLINE __m256 load_half8(const uint8_t* data, FloatType type) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
  if (type == FloatType::kFloat16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// 16 zero points. A byte shuffle of a broadcast costs half of two vpmovzxbd.
AWQ_INLINE void load_zeros(const uint8_t* data, __m256 (&zero)[2]) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
  const __m256i low = _mm256_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1, 4, -1, -1, -1, 5, -1, -1, -1, 6, -1,
                                       -1, -1, 7, -1, -1, -1);
  const __m256i high = _mm256_setr_epi8(8, -1, -1, -1, 9, -1, -1, -1, 10, -1, -1, -1, 11, -1, -1, -1, 12, -1, -1, -1, 13, -1, -1, -1,
                                        14, -1, -1, -1, 15, -1, -1, -1);
  zero[0] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, low));
  zero[1] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, high));
}

AWQ_INLINE GroupMeta load_meta(const PackedLinear& weight, const uint8_t* panel, int64_t group) {
  GroupMeta meta;
  const int64_t index = group * kPanelColumns;
  if (weight.type == WeightType::kInt4) {
    for (int h = 0; h < 2; ++h) meta.scale[h] = load_half8(panel + (index + h * 8) * 2, weight.float_type);
    load_zeros(panel + weight.activations.num_groups * kPanelColumns * 2 + index, meta.zero);
  } else {
    for (int h = 0; h < 2; ++h) {
      meta.scale[h] = _mm256_loadu_ps(reinterpret_cast<const float*>(panel) + index + h * 8);
      meta.zero[h] = _mm256_setzero_ps();
    }
  }
  return meta;
}

template <int kRows>
AWQ_INLINE void add_group(const GroupMeta& meta, const float* sums, const Sums<kRows>& group, Sums<kRows>& total) {
  for (int r = 0; r < kRows; ++r) {
    const __m256 sum = _mm256_broadcast_ss(sums + r);
    for (int h = 0; h < 2; ++h) {
      const __m256 centred = _mm256_fnmadd_ps(meta.zero[h], sum, group.v[r][h]);
      total.v[r][h] = _mm256_fmadd_ps(centred, meta.scale[h], total.v[r][h]);
    }
  }
}

template <int kRows>
AWQ_INLINE void store_rows(const PackedLinear& weight, int64_t panel_index, Sums<kRows>& total, float* y, int64_t ldy) {
  const int64_t first = panel_index * kPanelColumns, left = weight.out_features - first;
  if (weight.bias.nbytes() != 0) {
    const float* bias = reinterpret_cast<const float*>(weight.bias.data()) + first;
    for (int r = 0; r < kRows; ++r)
      for (int h = 0; h < 2; ++h) total.v[r][h] = _mm256_add_ps(total.v[r][h], _mm256_loadu_ps(bias + h * 8));
  }
  for (int r = 0; r < kRows; ++r) {
    float* row = y + r * ldy + first;
    if (left >= kPanelColumns) {
      _mm256_storeu_ps(row, total.v[r][0]);
      _mm256_storeu_ps(row + 8, total.v[r][1]);
    } else {
      alignas(32) float columns[kPanelColumns];
      _mm256_store_ps(columns, total.v[r][0]);
      _mm256_store_ps(columns + 8, total.v[r][1]);
      std::memcpy(row, columns, static_cast<size_t>(left) * sizeof(float));
    }
  }
}

// Calls run(constant) with the blocks per group as a compile-time constant for groups of 32, 64 and 128 channels, 0 for any other:
// without a loop over a group's blocks the kernels below are 7 to 9% faster.
template <class Run>
AWQ_INLINE void with_blocks_per_group(int64_t blocks_per_group, Run&& run) {
  switch (blocks_per_group) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 4: return run(std::integral_constant<int, 4>());
    default: return run(std::integral_constant<int, 0>());
  }
}

// ---- few rows, int8 activations: straight from the packed nibbles ----

// One block of 32 channels of one panel or two, `next` bytes apart: adds to their `group`, or starts it.
template <int kRows, int kPanels, bool kFirst>
AWQ_INLINE void nibble_block(const uint8_t* w, int64_t next, const uint8_t* a, const float* scales, __m256i mask,
                             Sums<kRows> (&group)[kPanels]) {
  __m256i dot[kPanels][kRows][2];
  if constexpr (kPanels == 2)
    nibbles_pair(w, w + next, a, mask, dot);
  else
    Block<kRows>::int8_nibbles(w, a, mask, dot[0]);
  for (int p = 0; p < kPanels; ++p) widen<kRows>(dot[p]);
  add_block<kRows, kFirst>(dot[0], scales, group[0]);
  if constexpr (kPanels == 2) add_block<kRows, kFirst>(dot[1], scales, group[1]);
}

constexpr int64_t kMaxNibbleRows = 16;  // up to so many, unpacking for each tile costs less than a buffer

// Lines that a row tile reads ahead per group: two per block of 32 channels, so many at a time as the processor keeps in flight.
AWQ_INLINE constexpr int64_t group_lines(int64_t blocks_per_group) { return 2 * (blocks_per_group < 4 ? blocks_per_group : 4); }

int64_t lines_ahead_avx2(const PackedLinear& weight, int64_t num_rows) {
  const ActivationLayout& layout = weight.activations;
  if (weight.type != WeightType::kInt4 || layout.mode != ActivationMode::kInt8 || num_rows < 1 || num_rows > kMaxNibbleRows) return 0;
  return (ceil_div(num_rows, kTileRows) - 1) * layout.num_groups * group_lines(layout.blocks_per_group);
}

// kPanels: 2 is for one row, where what comes after a group of one panel runs beside the next products of the other. kPer: the blocks
// of a group, or 0. With kAhead, lines of `ahead` are fetched meanwhile. Inlined into the loop over panels, gcc makes it a sixth slower.
template <int kRows, int kPanels, FloatType kScale, int kPer, bool kAhead>
[[gnu::noinline]] void nibble_tile(const PackedLinear& weight, int64_t panel_index, const uint8_t* tile, ReadAhead::Cursor* ahead, float* y,
                                   int64_t ldy) {
  const ActivationLayout& layout = weight.activations;
  const int64_t next = weight.panel_stride;
  const uint8_t* panel = weight.panels.data() + panel_index * next;
  const uint8_t* w = panel + weight.weights_offset;
  const uint8_t* a = tile;
  const float* scales = reinterpret_cast<const float*>(tile + layout.scales_offset);
  const float* sums = reinterpret_cast<const float*>(tile + layout.sums_offset);
  const uint8_t* weight_scales = panel;
  const uint8_t* zeros = panel + layout.num_groups * kPanelColumns * 2;
  const __m256i mask = _mm256_set1_epi8(15);
  const int64_t per_group = kPer != 0 ? kPer : layout.blocks_per_group;
  Sums<kRows> total[kPanels] = {};
  for (int64_t group = 0; group < layout.num_groups; ++group) {
    Sums<kRows> partial[kPanels];
    if (kAhead) {
      const char* lines = ahead->take(group_lines(per_group));
      for (int64_t i = 0; lines != nullptr && i < group_lines(per_group); ++i) _mm_prefetch(lines + i * 64, _MM_HINT_T1);
    }
    nibble_block<kRows, kPanels, true>(w, next, a, scales, mask, partial);
#pragma GCC unroll 4
    for (int64_t b = 1; b < per_group; ++b)
      nibble_block<kRows, kPanels, false>(w + b * 256, next, a + b * 128, scales + b * kTileRows, mask, partial);
    for (int p = 0; p < kPanels; ++p) {
      GroupMeta meta;
      for (int h = 0; h < 2; ++h) meta.scale[h] = load_half8(weight_scales + p * next + h * 16, kScale);
      load_zeros(zeros + p * next, meta.zero);
      add_group<kRows>(meta, sums, partial[p], total[p]);
    }
    weight_scales += kPanelColumns * 2;
    zeros += kPanelColumns;
    w += per_group * 256;
    a += per_group * 128;
    scales += per_group * kTileRows;
    sums += kTileRows;
  }
  for (int p = 0; p < kPanels; ++p) store_rows<kRows>(weight, panel_index + p, total[p], y, ldy);
}

template <FloatType kScale, int kPer>
void run_nibbles(const PackedLinear& weight, const uint8_t* tiles, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
                 int64_t panel_end, const ReadAhead& ahead) {
  int64_t panel = panel_begin;
  if (num_rows == 1)
    for (; panel + 2 <= panel_end; panel += 2) nibble_tile<1, 2, kScale, kPer, false>(weight, panel, tiles, nullptr, y, ldy);
  ReadAhead::Cursor cursor(ahead, panel * lines_ahead_avx2(weight, num_rows));
  for (; panel < panel_end; ++panel)
    for (int64_t row = 0; row < num_rows; row += kTileRows) {
      const uint8_t* tile = tiles + row / kTileRows * weight.activations.tile_stride;
      const auto run = [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        if (row != 0 && ahead.num_blocks != 0)
          nibble_tile<kRows, 1, kScale, kPer, true>(weight, panel, tile, &cursor, y + row * ldy, ldy);
        else
          nibble_tile<kRows, 1, kScale, kPer, false>(weight, panel, tile, nullptr, y + row * ldy, ldy);
      };
      switch (num_rows - row) {
        case 1: run(std::integral_constant<int, 1>()); break;
        case 2: run(std::integral_constant<int, 2>()); break;
        case 3: run(std::integral_constant<int, 3>()); break;
        default: run(std::integral_constant<int, 4>()); break;
      }
    }
}

// ---- many rows: a chunk of the panel is unpacked once and used by up to 64 rows ----

constexpr int64_t kRowBlock = 64;
constexpr int64_t kUnpackedNbytes = 24576;  // three quarters of L1: a tile of activations needs the rest

// A tile's sums between two chunks: finished groups, and the group that spans both.
struct SavedSums {
  Sums<4> total, group;
};

struct Scratch {
  alignas(64) uint8_t weights[kUnpackedNbytes];
  alignas(64) GroupMeta metas[kUnpackedNbytes / 32 / kPanelColumns];
  alignas(64) SavedSums sums[kRowBlock / kTileRows];
};

AWQ_INLINE __m256i load_vector(const uint8_t* data) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(data)); }
AWQ_INLINE void store_vector(uint8_t* data, __m256i value) { _mm256_store_si256(reinterpret_cast<__m256i*>(data), value); }

// int4 to bytes: 64 packed bytes (8 channels) become 128, [2 steps of 4 channels][16 columns][4].
AWQ_INLINE void unpack_int4_to_int8(const uint8_t* source, int64_t nbytes, uint8_t* out) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int64_t i = 0; i < nbytes; i += 64, out += 128) {
    _mm_prefetch(reinterpret_cast<const char*>(source + i + 2048), _MM_HINT_T0);
    const __m256i a = load_vector(source + i), b = load_vector(source + i + 32);
    store_vector(out, _mm256_and_si256(a, mask));
    store_vector(out + 32, _mm256_and_si256(b, mask));
    store_vector(out + 64, _mm256_and_si256(_mm256_srli_epi16(a, 4), mask));
    store_vector(out + 96, _mm256_and_si256(_mm256_srli_epi16(b, 4), mask));
  }
}

// int4 to 16 bits: 64 packed bytes become 256, [4 steps: channel pairs (0,2) (1,3) (4,6) (5,7)][16 columns][2].
AWQ_INLINE void unpack_int4_to_int16(const uint8_t* source, int64_t nbytes, uint8_t* out) {
  const __m256i mask = _mm256_set1_epi16(15);
  for (int64_t i = 0; i < nbytes; i += 64, out += 256) {
    _mm_prefetch(reinterpret_cast<const char*>(source + i + 2048), _MM_HINT_T0);
    for (int h = 0; h < 2; ++h) {
      const __m256i v = load_vector(source + i + h * 32);
      store_vector(out + h * 32, _mm256_and_si256(v, mask));
      store_vector(out + h * 32 + 64, _mm256_and_si256(_mm256_srli_epi16(v, 8), mask));
      store_vector(out + h * 32 + 128, _mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
      store_vector(out + h * 32 + 192, _mm256_srli_epi16(v, 12));
    }
  }
}

// ---- int16 activations, weights widened in registers: few rows of int4, any number of int8 (two shifts cost less than a buffer) ----

// 16 columns x 2 channels of weights against one dword of each row.
template <int kRows>
AWQ_INLINE void add_pair(__m256i w0, __m256i w1, const uint8_t* a, __m256i (&dot)[kRows][2]) {
  for (int r = 0; r < kRows; ++r) {
    int32_t dword;
    std::memcpy(&dword, a + r * 4, 4);
    const __m256i x = _mm256_set1_epi32(dword);
    dot[r][0] = _mm256_add_epi32(dot[r][0], _mm256_madd_epi16(w0, x));
    dot[r][1] = _mm256_add_epi32(dot[r][1], _mm256_madd_epi16(w1, x));
  }
}

template <int kRows, bool kInt4>
AWQ_INLINE void wide_block(const uint8_t* w, const uint8_t* a, int64_t size, __m256i (&dot)[kRows][2]) {
  const __m256i mask = _mm256_set1_epi16(15);
  for (int r = 0; r < kRows; ++r) dot[r][0] = dot[r][1] = _mm256_setzero_si256();
  for (int64_t i = 0; i < size; i += kInt4 ? 8 : 4, w += 64) {
    if constexpr (kInt4) {
      _mm_prefetch(reinterpret_cast<const char*>(w + 2048), _MM_HINT_T0);
      const __m256i v0 = load_vector(w), v1 = load_vector(w + 32);
      add_pair<kRows>(_mm256_and_si256(v0, mask), _mm256_and_si256(v1, mask), a, dot);
      add_pair<kRows>(_mm256_and_si256(_mm256_srli_epi16(v0, 8), mask), _mm256_and_si256(_mm256_srli_epi16(v1, 8), mask), a + 16, dot);
      add_pair<kRows>(_mm256_and_si256(_mm256_srli_epi16(v0, 4), mask), _mm256_and_si256(_mm256_srli_epi16(v1, 4), mask), a + 32, dot);
      add_pair<kRows>(_mm256_srli_epi16(v0, 12), _mm256_srli_epi16(v1, 12), a + 48, dot);
      a += 64;
    } else {
      Block<kRows>::int8_wide(w, a, dot);
      a += 32;
    }
  }
}

template <int kRows, bool kInt4>
void wide_tile(const PackedLinear& weight, int64_t panel_index, const uint8_t* tile, float* y, int64_t ldy) {
  const ActivationLayout& layout = weight.activations;
  const uint8_t* panel = weight.panels.data() + panel_index * weight.panel_stride;
  const uint8_t* w = panel + weight.weights_offset;
  const uint8_t* a = tile;
  const float* scales = reinterpret_cast<const float*>(tile + layout.scales_offset);
  const float* sums = reinterpret_cast<const float*>(tile + layout.sums_offset);
  const int64_t w_step = layout.block_size * kPanelColumns / (kInt4 ? 2 : 1), a_step = layout.block_size * kTileRows * 2;
  Sums<kRows> total = {};
  for (int64_t group = 0; group < layout.num_groups; ++group) {
    Sums<kRows> partial;
    __m256i dot[kRows][2];
    wide_block<kRows, kInt4>(w, a, layout.block_size, dot);
    add_block<kRows, true>(dot, scales, partial);
    for (int64_t b = 1; b < layout.blocks_per_group; ++b) {
      wide_block<kRows, kInt4>(w + b * w_step, a + b * a_step, layout.block_size, dot);
      add_block<kRows, false>(dot, scales + b * kTileRows, partial);
    }
    w += layout.blocks_per_group * w_step;
    a += layout.blocks_per_group * a_step;
    scales += layout.blocks_per_group * kTileRows;
    add_group<kRows>(load_meta(weight, panel, group), sums, partial, total);
    sums += kTileRows;
  }
  store_rows<kRows>(weight, panel_index, total, y, ldy);
}

template <bool kInt4>
void run_wide(const PackedLinear& weight, const uint8_t* tiles, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
              int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel)
    for (int64_t row = 0; row < num_rows; row += kTileRows) {
      const uint8_t* tile = tiles + row / kTileRows * weight.activations.tile_stride;
      switch (num_rows - row) {
        case 1: wide_tile<1, kInt4>(weight, panel, tile, y + row * ldy, ldy); break;
        case 2: wide_tile<2, kInt4>(weight, panel, tile, y + row * ldy, ldy); break;
        case 3: wide_tile<3, kInt4>(weight, panel, tile, y + row * ldy, ldy); break;
        default: wide_tile<4, kInt4>(weight, panel, tile, y + row * ldy, ldy); break;
      }
    }
}

template <int kRows, bool kWide, bool kFirst>
AWQ_INLINE void unpacked_block(const uint8_t* w, const uint8_t* a, int64_t size, const float* scales, Sums<kRows>& group) {
  __m256i dot[kRows][2];
  if constexpr (kWide) {
    for (int r = 0; r < kRows; ++r) dot[r][0] = dot[r][1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < size; i += 16) Block<kRows>::int16_unpacked(w + i * 32, a + i * 8, dot);
  } else {
    Block<kRows>::int8_unpacked(w, a, dot);
    widen<kRows>(dot);
  }
  add_block<kRows, kFirst>(dot, scales, group);
}

// One tile over blocks [begin, end) of the unpacked chunk. `metas`: of the groups from begin's on. Between the chunks of a panel its
// sums are kept in `saved`; after the last they go to y.
template <int kRows, bool kWide, int kPer>
AWQ_INLINE void chunk_tile(const PackedLinear& weight, int64_t panel_index, const GroupMeta* metas, const uint8_t* w, const uint8_t* tile,
                           int64_t begin, int64_t end, SavedSums& saved, float* y, int64_t ldy) {
  const ActivationLayout& layout = weight.activations;
  const int64_t size = kWide ? layout.block_size : 32, per_group = kPer != 0 ? kPer : layout.blocks_per_group;
  const int64_t w_step = size * kPanelColumns * (kWide ? 2 : 1), a_step = size * kTileRows * (kWide ? 2 : 1);
  const uint8_t* a = tile + begin * a_step;
  const float* scales = reinterpret_cast<const float*>(tile + layout.scales_offset) + begin * kTileRows;
  const float* sums = reinterpret_cast<const float*>(tile + layout.sums_offset) + begin / per_group * kTileRows;
  int64_t within = kPer != 0 ? 0 : begin % per_group;
  Sums<kRows> total, partial;
  if (begin == 0)
    total = {};
  else
    std::memcpy(&total, &saved.total, sizeof total);
  if (within != 0) std::memcpy(&partial, &saved.group, sizeof partial);
  for (int64_t block = begin; block < end;) {
    // Chunks hold whole groups where kPer is known.
    const int64_t left = kPer != 0 ? kPer : per_group - within, count = kPer != 0 || left < end - block ? left : end - block;
    int64_t i = 0;
    if (kPer != 0 || within == 0) {
      unpacked_block<kRows, kWide, true>(w, a, size, scales, partial);
      i = 1;
    }
#pragma GCC unroll 4
    for (; i < count; ++i) unpacked_block<kRows, kWide, false>(w + i * w_step, a + i * a_step, size, scales + i * kTileRows, partial);
    w += count * w_step;
    a += count * a_step;
    scales += count * kTileRows;
    block += count;
    if (kPer == 0 && count < left) break;  // the group goes on in the next chunk
    add_group<kRows>(*metas++, sums, partial, total);
    sums += kTileRows;
    within = 0;
  }
  if (end == layout.num_blocks) return store_rows<kRows>(weight, panel_index, total, y, ldy);
  std::memcpy(&saved.total, &total, sizeof total);
  std::memcpy(&saved.group, &partial, sizeof partial);
}

template <bool kWide, int kPer>
void run_chunks(const PackedLinear& weight, const uint8_t* tiles, int64_t row_begin, int64_t row_end, float* y, int64_t ldy,
                int64_t panel_index, Scratch& scratch) {
  const ActivationLayout& layout = weight.activations;
  const uint8_t* panel = weight.panels.data() + panel_index * weight.panel_stride;
  const int64_t unpacked_block = layout.block_size * kPanelColumns * (kWide ? 2 : 1);
  const int64_t packed_block = layout.block_size * kPanelColumns / 2;
  const int64_t most = kUnpackedNbytes / unpacked_block, chunk = kPer != 0 ? most / kPer * kPer : most;
  for (int64_t begin = 0; begin < layout.num_blocks; begin += chunk) {
    const int64_t end = begin + chunk < layout.num_blocks ? begin + chunk : layout.num_blocks;
    const uint8_t* source = panel + weight.weights_offset + begin * packed_block;
    const int64_t nbytes = (end - begin) * packed_block;
    if (kWide)
      unpack_int4_to_int16(source, nbytes, scratch.weights);
    else
      unpack_int4_to_int8(source, nbytes, scratch.weights);
    const int64_t first_group = begin / layout.blocks_per_group, last_group = (end - 1) / layout.blocks_per_group;
    for (int64_t group = first_group; group <= last_group; ++group)
      scratch.metas[group - first_group] = load_meta(weight, panel, group);
    for (int64_t row = row_begin; row < row_end; row += kTileRows) {
      const uint8_t* tile = tiles + row / kTileRows * layout.tile_stride;
      SavedSums& saved = scratch.sums[(row - row_begin) / kTileRows];
      float* rows = y + row * ldy;
      switch (row_end - row) {
        case 1: chunk_tile<1, kWide, kPer>(weight, panel_index, scratch.metas, scratch.weights, tile, begin, end, saved, rows, ldy); break;
        case 2: chunk_tile<2, kWide, kPer>(weight, panel_index, scratch.metas, scratch.weights, tile, begin, end, saved, rows, ldy); break;
        case 3: chunk_tile<3, kWide, kPer>(weight, panel_index, scratch.metas, scratch.weights, tile, begin, end, saved, rows, ldy); break;
        default: chunk_tile<4, kWide, kPer>(weight, panel_index, scratch.metas, scratch.weights, tile, begin, end, saved, rows, ldy); break;
      }
    }
  }
}

// ---- dense weights ----

template <FloatType kType>
AWQ_INLINE __m256 load_dense8(const uint8_t* data) {
  if constexpr (kType == FloatType::kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(data));
  return load_half8(data, kType);
}

// Weights are converted in registers. With one or two rows several panels go at once, since one chain of additions per column would
// wait for itself. Returns the number of panels done: kPanels, or 0 where fewer are left.
template <FloatType kType, int kRows, int kPanels>
int64_t dense_panels(const PackedLinear& weight, const uint8_t* tile, float* y, int64_t ldy, int64_t panel, int64_t panel_end) {
  if (panel + kPanels > panel_end) return 0;
  constexpr int64_t kStep = kType == FloatType::kFloat32 ? 64 : 32;
  const uint8_t* w = weight.panels.data() + panel * weight.panel_stride;
  const auto* a = reinterpret_cast<const float*>(tile);
  Sums<kRows> total[kPanels] = {};
  for (int64_t k = 0; k < weight.in_features; ++k) {
    for (int p = 0; p < kPanels; ++p) {
      const uint8_t* source = w + p * weight.panel_stride + k * kStep;
      _mm_prefetch(reinterpret_cast<const char*>(source + 1024), _MM_HINT_T0);
      const __m256 w0 = load_dense8<kType>(source), w1 = load_dense8<kType>(source + kStep / 2);
      for (int r = 0; r < kRows; ++r) {
        const __m256 x = _mm256_broadcast_ss(a + k * kTileRows + r);
        total[p].v[r][0] = _mm256_fmadd_ps(w0, x, total[p].v[r][0]);
        total[p].v[r][1] = _mm256_fmadd_ps(w1, x, total[p].v[r][1]);
      }
    }
  }
  for (int p = 0; p < kPanels; ++p) store_rows<kRows>(weight, panel + p, total[p], y, ldy);
  return kPanels;
}

template <FloatType kType>
void run_dense(const PackedLinear& weight, const uint8_t* tiles, int64_t row_begin, int64_t row_end, float* y, int64_t ldy,
               int64_t panel_begin, int64_t panel_end) {
  for (int64_t row = row_begin; row < row_end; row += kTileRows) {
    const uint8_t* tile = tiles + row / kTileRows * weight.activations.tile_stride;
    float* target = y + row * ldy;
    for (int64_t panel = panel_begin; panel < panel_end;) {
      int64_t done = 0;
      switch (row_end - row) {
        case 1:
          done = dense_panels<kType, 1, 4>(weight, tile, target, ldy, panel, panel_end);
          if (done == 0) done = dense_panels<kType, 1, 1>(weight, tile, target, ldy, panel, panel_end);
          break;
        case 2:
          done = dense_panels<kType, 2, 2>(weight, tile, target, ldy, panel, panel_end);
          if (done == 0) done = dense_panels<kType, 2, 1>(weight, tile, target, ldy, panel, panel_end);
          break;
        case 3: done = dense_panels<kType, 3, 1>(weight, tile, target, ldy, panel, panel_end); break;
        default: done = dense_panels<kType, 4, 1>(weight, tile, target, ldy, panel, panel_end); break;
      }
      panel += done;
    }
  }
}

// ---- entry ----

constexpr int64_t kMaxWideInt4Rows = 4;  // as kMaxNibbleRows, for int16 activations

template <bool kWide, int kPer>
void run_row_blocks(const PackedLinear& weight, const uint8_t* tiles, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
                    int64_t panel_end) {
  Scratch scratch;
  // Rows outside, so that a block of activations stays in L2 over all panels of the range.
  for (int64_t row = 0; row < num_rows; row += kRowBlock) {
    const int64_t end = row + kRowBlock < num_rows ? row + kRowBlock : num_rows;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel)
      run_chunks<kWide, kPer>(weight, tiles, row, end, y, ldy, panel, scratch);
  }
}

void run_quantized(const PackedLinear& weight, const uint8_t* tiles, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
                   int64_t panel_end, const ReadAhead& ahead) {
  if (weight.type == WeightType::kInt8) return run_wide<false>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end);
  const bool wide = weight.activations.mode == ActivationMode::kInt16;
  if (wide && num_rows <= kMaxWideInt4Rows) return run_wide<true>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end);
  with_blocks_per_group(weight.activations.blocks_per_group, [&](auto per_group) {
    constexpr int kPer = decltype(per_group)::value;
    if (wide)
      run_row_blocks<true, kPer>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end);
    else if (num_rows > kMaxNibbleRows)
      run_row_blocks<false, kPer>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end);
    else if (weight.float_type == FloatType::kFloat16)
      run_nibbles<FloatType::kFloat16, kPer>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end, ahead);
    else
      run_nibbles<FloatType::kBFloat16, kPer>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end, ahead);
  });
}

template <FloatType kType>
void run_dense_blocks(const PackedLinear& weight, const uint8_t* tiles, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
                      int64_t panel_end) {
  constexpr int64_t kPanelBlock = 4;  // stay in L2 over all rows of a block
  for (int64_t row = 0; row < num_rows; row += kRowBlock) {
    const int64_t end = row + kRowBlock < num_rows ? row + kRowBlock : num_rows;
    for (int64_t panel = panel_begin; panel < panel_end; panel += kPanelBlock) {
      const int64_t last = panel + kPanelBlock < panel_end ? panel + kPanelBlock : panel_end;
      run_dense<kType>(weight, tiles, row, end, y, ldy, panel, last);
    }
  }
}

void run_avx2(const PackedLinear& weight, const void* activations, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
              int64_t panel_end, const ReadAhead& ahead) {
  const auto* tiles = static_cast<const uint8_t*>(activations);
  if (weight.type != WeightType::kFloat) return run_quantized(weight, tiles, num_rows, y, ldy, panel_begin, panel_end, ahead);
  switch (weight.float_type) {
    case FloatType::kFloat32: return run_dense_blocks<FloatType::kFloat32>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end);
    case FloatType::kFloat16: return run_dense_blocks<FloatType::kFloat16>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end);
    case FloatType::kBFloat16: return run_dense_blocks<FloatType::kBFloat16>(weight, tiles, num_rows, y, ldy, panel_begin, panel_end);
  }
}

double integer_peak_avx2(int64_t iterations) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a, e = a, f = a, t0, t1;
  const __m256i x = _mm256_set1_epi8(1);
  for (int64_t i = 0; i < iterations; ++i)
    asm volatile(
        "vpmaddubsw %[x], %[x], %[t0]\n vpmaddubsw %[x], %[x], %[t1]\n vpaddw %[t0], %[a], %[a]\n vpaddw %[t1], %[b], %[b]\n"
        "vpmaddubsw %[x], %[x], %[t0]\n vpmaddubsw %[x], %[x], %[t1]\n vpaddw %[t0], %[c], %[c]\n vpaddw %[t1], %[d], %[d]\n"
        "vpmaddubsw %[x], %[x], %[t0]\n vpmaddubsw %[x], %[x], %[t1]\n vpaddw %[t0], %[e], %[e]\n vpaddw %[t1], %[f], %[f]\n"
        : [a] "+x"(a), [b] "+x"(b), [c] "+x"(c), [d] "+x"(d), [e] "+x"(e), [f] "+x"(f), [t0] "=&x"(t0), [t1] "=&x"(t1)
        : [x] "x"(x));
  return static_cast<double>(iterations) * 6 * 32;
}

}  // namespace

extern const LinearKernels kAvx2Kernels = {"avx2", quantize_groups_avx2, run_avx2, lines_ahead_avx2, integer_peak_avx2};

}  // namespace awq_cpu
