// The AVX-512 variant (F, BW, VL and VNNI). One vector holds a panel's 16 columns, so vpdpbusd and vpdpwssd sum 4 bytes or 2 words of
// every column into 32 bits at once; nothing can saturate, and the scales come in at the same places as in the AVX2 variant.
//
// Defined AWQ_CPU_EMULATE_AVX512, the file builds on SIMDe, which computes the same on machines without these instructions (tests).
#if defined(__GNUC__) && !defined(__clang__)  // GCC's own intrinsics headers trip it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#ifdef AWQ_CPU_EMULATE_AVX512
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#else
#include <immintrin.h>
#endif

#include "linear_kernels.h"

namespace awq_cpu {
namespace {

#ifdef AWQ_CPU_EMULATE_AVX512  // these conversions are missing from Debian's SIMDe
AWQ_INLINE __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
AWQ_INLINE __m512 half_to_float16(__m256i bits) {
  return _mm512_castsi512_ps(join(_mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(bits))),
                                  _mm256_castps_si256(_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)))));
}
AWQ_INLINE __m512i widen_words(__m256i bits) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(bits)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(bits, 1)));
}
AWQ_INLINE __m512i widen_bytes(__m128i bits) {
  return join(_mm256_cvtepu8_epi32(bits), _mm256_cvtepu8_epi32(_mm_srli_si128(bits, 8)));
}
AWQ_INLINE __m512 to_float(__m512i value) {
  const __m256 low = _mm256_cvtepi32_ps(_mm512_castsi512_si256(value));
  const __m256 high = _mm256_cvtepi32_ps(_mm512_extracti64x4_epi64(value, 1));
  return _mm512_castsi512_ps(join(_mm256_castps_si256(low), _mm256_castps_si256(high)));
}
#else
AWQ_INLINE __m512 half_to_float16(__m256i bits) { return _mm512_cvtph_ps(bits); }
AWQ_INLINE __m512i widen_words(__m256i bits) { return _mm512_cvtepu16_epi32(bits); }
AWQ_INLINE __m512i widen_bytes(__m128i bits) { return _mm512_cvtepu8_epi32(bits); }
AWQ_INLINE __m512 to_float(__m512i value) { return _mm512_cvtepi32_ps(value); }
#endif

// Rows that share one unpacking of the weights: up to two activation tiles.
template <int kRows>
struct Sums {
  __m512 v[kRows];
};

template <int kRows>
struct Dots {
  __m512i v[kRows];
};

// One dword (4 bytes or 2 words) of each row. `stride`: bytes from one tile to the next.
template <int kRows, bool kWide>
AWQ_INLINE void add_step(__m512i w, const uint8_t* a, int64_t stride, Dots<kRows>& dot) {
  for (int r = 0; r < kRows; ++r) {
    int32_t dword;
    std::memcpy(&dword, a + r / kTileRows * stride + r % kTileRows * 4, 4);
    const __m512i x = _mm512_set1_epi32(dword);
    dot.v[r] = kWide ? _mm512_dpwssd_epi32(dot.v[r], w, x) : _mm512_dpbusd_epi32(dot.v[r], w, x);
  }
}

AWQ_INLINE __m512i load_vector(const uint8_t* data) { return _mm512_loadu_si512(data); }

// The integer dot products of one block. w: its packed weights, a: its activations in the first tile.
template <int kRows, bool kWide, bool kInt4>
AWQ_INLINE void dot_block(const uint8_t* w, const uint8_t* a, int64_t stride, int64_t size, Dots<kRows>& dot) {
  const __m512i bytes = _mm512_set1_epi8(15), words = _mm512_set1_epi16(15);
  for (int r = 0; r < kRows; ++r) dot.v[r] = _mm512_setzero_si512();
  for (int64_t i = 0; i < size; i += kInt4 ? 8 : 4, w += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(w + 4096), _MM_HINT_T1);
    const __m512i v = load_vector(w);
    if constexpr (!kWide) {
      add_step<kRows, false>(_mm512_and_si512(v, bytes), a, stride, dot);
      add_step<kRows, false>(_mm512_and_si512(_mm512_srli_epi16(v, 4), bytes), a + 16, stride, dot);
      a += 32;
    } else if constexpr (kInt4) {
      add_step<kRows, true>(_mm512_and_si512(v, words), a, stride, dot);
      add_step<kRows, true>(_mm512_and_si512(_mm512_srli_epi16(v, 8), words), a + 16, stride, dot);
      add_step<kRows, true>(_mm512_and_si512(_mm512_srli_epi16(v, 4), words), a + 32, stride, dot);
      add_step<kRows, true>(_mm512_srli_epi16(v, 12), a + 48, stride, dot);
      a += 64;
    } else {
      add_step<kRows, true>(_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), a, stride, dot);
      add_step<kRows, true>(_mm512_srai_epi16(v, 8), a + 16, stride, dot);
      a += 32;
    }
  }
}

AWQ_INLINE __m512 load_half16(const uint8_t* data, FloatType type) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  return type == FloatType::kFloat16 ? half_to_float16(bits) : _mm512_castsi512_ps(_mm512_slli_epi32(widen_words(bits), 16));
}

template <int kRows>
AWQ_INLINE void store_rows(const PackedLinear& weight, int64_t panel_index, const Sums<kRows>& total, float* y, int64_t ldy) {
  const int64_t first = panel_index * kPanelColumns, left = weight.out_features - first;
  const float* bias = weight.bias.nbytes() != 0 ? reinterpret_cast<const float*>(weight.bias.data()) + first : nullptr;
  for (int r = 0; r < kRows; ++r) {
    const __m512 value = bias != nullptr ? _mm512_add_ps(total.v[r], _mm512_loadu_ps(bias)) : total.v[r];
    if (left >= kPanelColumns) {
      _mm512_storeu_ps(y + r * ldy + first, value);
    } else {
      alignas(64) float columns[kPanelColumns];
      _mm512_storeu_ps(columns, value);
      std::memcpy(y + r * ldy + first, columns, static_cast<size_t>(left) * sizeof(float));
    }
  }
}

// Per (row, column): per block group = block_sum * activation_scale + group (fused); per group group -= zero * activation_sum (fused),
// total = group * weight_scale + total (fused); at the end the bias.
template <int kRows, bool kWide, bool kInt4>
void quantized_tile(const PackedLinear& weight, int64_t panel_index, const uint8_t* tile, float* y, int64_t ldy) {
  const ActivationLayout& layout = weight.activations;
  const uint8_t* panel = weight.panels.data() + panel_index * weight.panel_stride;
  const uint8_t* zeros = panel + layout.num_groups * kPanelColumns * 2;
  const uint8_t* w = panel + weight.weights_offset;
  const uint8_t* a = tile;
  const uint8_t* scales = tile + layout.scales_offset;
  const uint8_t* sums = tile + layout.sums_offset;
  const int64_t size = kWide ? layout.block_size : 32, stride = layout.tile_stride;
  const int64_t w_step = size * kPanelColumns / (kInt4 ? 2 : 1), a_step = size * kTileRows * (kWide ? 2 : 1);
  const auto row_value = [stride](const uint8_t* values, int r) __attribute__((always_inline)) {
    float value;
    std::memcpy(&value, values + r / kTileRows * stride + r % kTileRows * 4, 4);
    return _mm512_set1_ps(value);
  };
  Sums<kRows> total;
  for (int r = 0; r < kRows; ++r) total.v[r] = _mm512_setzero_ps();
  for (int64_t group = 0; group < layout.num_groups; ++group) {
    Sums<kRows> partial;
    for (int r = 0; r < kRows; ++r) partial.v[r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < layout.blocks_per_group; ++b) {
      Dots<kRows> dot;
      dot_block<kRows, kWide, kInt4>(w, a, stride, size, dot);
      for (int r = 0; r < kRows; ++r)
        partial.v[r] = _mm512_fmadd_ps(to_float(dot.v[r]), row_value(scales, r), partial.v[r]);
      w += w_step;
      a += a_step;
      scales += kTileRows * sizeof(float);
    }
    __m512 scale;
    if constexpr (kInt4) {
      scale = load_half16(panel + group * kPanelColumns * 2, weight.float_type);
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + group * kPanelColumns));
      const __m512 zero = to_float(widen_bytes(bits));
      for (int r = 0; r < kRows; ++r) partial.v[r] = _mm512_fnmadd_ps(zero, row_value(sums, r), partial.v[r]);
    } else {
      scale = _mm512_loadu_ps(panel + group * kPanelColumns * 4);
    }
    for (int r = 0; r < kRows; ++r) total.v[r] = _mm512_fmadd_ps(partial.v[r], scale, total.v[r]);
    sums += kTileRows * sizeof(float);
  }
  store_rows<kRows>(weight, panel_index, total, y, ldy);
}

template <int kRows>
void dense_tile(const PackedLinear& weight, int64_t panel_index, const uint8_t* tile, float* y, int64_t ldy) {
  const ActivationLayout& layout = weight.activations;
  const uint8_t* w = weight.panels.data() + panel_index * weight.panel_stride;
  const int64_t step = kPanelColumns * (weight.float_type == FloatType::kFloat32 ? 4 : 2);
  Sums<kRows> total;
  for (int r = 0; r < kRows; ++r) total.v[r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < layout.k; ++k, w += step) {
    _mm_prefetch(reinterpret_cast<const char*>(w + 4096), _MM_HINT_T1);
    const __m512 value = step == 64 ? _mm512_loadu_ps(w) : load_half16(w, weight.float_type);
    for (int r = 0; r < kRows; ++r) {
      float x;
      std::memcpy(&x, tile + r / kTileRows * layout.tile_stride + (k * kTileRows + r % kTileRows) * 4, 4);
      total.v[r] = _mm512_fmadd_ps(value, _mm512_set1_ps(x), total.v[r]);
    }
  }
  store_rows<kRows>(weight, panel_index, total, y, ldy);
}

template <int kRows>
AWQ_INLINE void any_tile(const PackedLinear& weight, int64_t panel, const uint8_t* tile, float* y, int64_t ldy) {
  if (weight.type == WeightType::kFloat)
    dense_tile<kRows>(weight, panel, tile, y, ldy);
  else if (weight.type == WeightType::kInt8)
    quantized_tile<kRows, true, false>(weight, panel, tile, y, ldy);
  else if (weight.activations.mode == ActivationMode::kInt16)
    quantized_tile<kRows, true, true>(weight, panel, tile, y, ldy);
  else
    quantized_tile<kRows, false, true>(weight, panel, tile, y, ldy);
}

constexpr int64_t kRowBlock = 64;

void run_avx512(const PackedLinear& weight, const void* activations, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
                int64_t panel_end, const ReadAhead&) {
  const auto* tiles = static_cast<const uint8_t*>(activations);
  // Rows outside, so that a block of activations stays in L2 over all panels of the range.
  for (int64_t begin = 0; begin < num_rows; begin += kRowBlock) {
    const int64_t end = begin + kRowBlock < num_rows ? begin + kRowBlock : num_rows;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel)
      for (int64_t row = begin; row < end;) {
        const uint8_t* tile = tiles + row / kTileRows * weight.activations.tile_stride;
        float* target = y + row * ldy;
        const int64_t left = end - row;
        if (left >= 8) {
          any_tile<8>(weight, panel, tile, target, ldy);
          row += 8;
          continue;
        }
        switch (left) {
          case 1: any_tile<1>(weight, panel, tile, target, ldy); break;
          case 2: any_tile<2>(weight, panel, tile, target, ldy); break;
          case 3: any_tile<3>(weight, panel, tile, target, ldy); break;
          default: any_tile<4>(weight, panel, tile, target, ldy); break;
        }
        row += kTileRows;
      }
  }
}

double integer_peak_avx512(int64_t iterations) {
  const __m512i x = _mm512_set1_epi8(1);
  __m512i sums[16];  // two products a cycle, each 5 cycles long
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < iterations; ++i)
    for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, x, x);
  __m512i total = sums[0];
  for (const auto& sum : sums) total = _mm512_or_si512(total, sum);
  alignas(64) volatile int32_t sink[16];  // keeps the loop
  int32_t values[16];
  std::memcpy(values, &total, sizeof values);
  sink[0] = values[0];
  (void)sink[0];
  return static_cast<double>(iterations) * 16 * 64;
}

}  // namespace

extern const LinearKernels kAvx512Kernels = {"avx512", quantize_groups_avx2, run_avx512, nullptr, integer_peak_avx512};

}  // namespace awq_cpu
