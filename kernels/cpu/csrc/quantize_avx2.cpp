// Quantization of activations with AVX2, also used by the AVX-512 variant. See `ActivationLayout` for the layouts.
#include <immintrin.h>

#include "linear_kernels.h"

namespace awq_cpu {
namespace {

AWQ_INLINE uint32_t horizontal_max(__m256i v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

AWQ_INLINE int32_t horizontal_sum(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

// Largest magnitude as bits: as integers, NaN > infinity > all finite values, so none can hide.
AWQ_INLINE uint32_t largest_magnitude(const float* x, int64_t count) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8)
    largest = _mm256_max_epu32(largest, _mm256_and_si256(mask, _mm256_castps_si256(_mm256_loadu_ps(x + i))));
  return horizontal_max(largest);
}

AWQ_INLINE __m256i to_integers(const float* x, __m256 inverse) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
}

// Quantizes 32 channels to 8 dwords of 4 bytes.
AWQ_INLINE float quantize_block_int8(const float* x, __m256i* out, int32_t* sum) {
  const BlockScale block = block_scale(largest_magnitude(x, 32), 127.0f);
  if (block.inverse == 0.0f) {  // 0 times an infinity would be NaN, whose conversion is not 0
    *out = _mm256_setzero_si256();
    *sum = 0;
    return block.scale;
  }
  const __m256 inverse = _mm256_set1_ps(block.inverse);
  const __m256i a = to_integers(x, inverse), b = to_integers(x + 8, inverse), c = to_integers(x + 16, inverse),
                d = to_integers(x + 24, inverse);
  *sum = horizontal_sum(_mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)));
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  *out = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return block.scale;
}

// Quantizes `size` channels to size / 2 dwords of 2 x 16 bits, in the order (0, 2), (1, 3) of every 4 channels.
AWQ_INLINE float quantize_block_int16(const float* x, int64_t size, __m256i* out, int32_t* sum) {
  const BlockScale block = block_scale(largest_magnitude(x, size), 32767.0f);
  if (block.inverse == 0.0f) {
    for (int64_t i = 0; i < size / 16; ++i) out[i] = _mm256_setzero_si256();
    *sum = 0;
    return block.scale;
  }
  const __m256 inverse = _mm256_set1_ps(block.inverse);
  const __m256i swap = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13,
                                        10, 11, 14, 15);
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < size / 16; ++i) {
    const __m256i a = to_integers(x + i * 16, inverse), b = to_integers(x + i * 16 + 8, inverse);
    total = _mm256_add_epi32(total, _mm256_add_epi32(a, b));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    out[i] = _mm256_shuffle_epi8(packed, swap);
  }
  *sum = horizontal_sum(total);
  return block.scale;
}

// Rows in a tile are interleaved dword by dword. Spreads one row's 8 dwords,
AWQ_INLINE void spread(__m256i dwords, uint8_t* out) {
  alignas(32) int32_t values[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(values), dwords);
  for (int i = 0; i < 8; ++i) std::memcpy(out + i * 16, values + i, 4);
}

// or those of all four rows.
AWQ_INLINE void interleave(__m256i r0, __m256i r1, __m256i r2, __m256i r3, uint8_t* out) {
  const __m256i a = _mm256_unpacklo_epi32(r0, r1), b = _mm256_unpackhi_epi32(r0, r1);
  const __m256i c = _mm256_unpacklo_epi32(r2, r3), d = _mm256_unpackhi_epi32(r2, r3);
  const __m256i e = _mm256_unpacklo_epi64(a, c), f = _mm256_unpackhi_epi64(a, c);  // dwords 0 | 4, 1 | 5
  const __m256i g = _mm256_unpacklo_epi64(b, d), h = _mm256_unpackhi_epi64(b, d);  // dwords 2 | 6, 3 | 7
  auto* target = reinterpret_cast<__m256i*>(out);
  _mm256_store_si256(target + 0, _mm256_permute2x128_si256(e, f, 0x20));
  _mm256_store_si256(target + 1, _mm256_permute2x128_si256(g, h, 0x20));
  _mm256_store_si256(target + 2, _mm256_permute2x128_si256(e, f, 0x31));
  _mm256_store_si256(target + 3, _mm256_permute2x128_si256(g, h, 0x31));
}

// Channels [begin, begin + size) of a group that has `count` left, zero-padded into `buffer` where there are too few.
AWQ_INLINE const float* padded_block(const float* x, int64_t count, int64_t size, float* buffer) {
  if (count >= size) return x;
  for (int64_t i = 0; i < size; ++i) buffer[i] = i < count ? x[i] : 0.0f;
  return buffer;
}

// Quantizes rows [lane, lane + kRows) of one tile; kRows is 1 or 4.
template <int kRows, bool kWide>
void quantize_tile(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t lane, int64_t group_begin, int64_t group_end,
                   uint8_t* tile) {
  auto* scales = reinterpret_cast<float*>(tile + layout.scales_offset) + lane;
  auto* sums = reinterpret_cast<float*>(tile + layout.sums_offset) + lane;
  const int64_t size = kWide ? layout.block_size : 32;
  const int64_t block_nbytes = size * kTileRows * (kWide ? 2 : 1);
  alignas(32) float buffer[128];
  __m256i dwords[kRows][kWide ? 8 : 1];
  for (int64_t group = group_begin; group < group_end; ++group) {
    float group_sum[kRows] = {};
    for (int64_t b = 0; b < layout.blocks_per_group; ++b) {
      const int64_t block = group * layout.blocks_per_group + b;
      for (int r = 0; r < kRows; ++r) {
        const float* first = x + r * ldx + (group - group_begin) * layout.group_size + b * size;
        const float* source = padded_block(first, layout.group_size - b * size, size, buffer);
        int32_t sum;
        const float scale = kWide ? quantize_block_int16(source, size, dwords[r], &sum) : quantize_block_int8(source, dwords[r], &sum);
        scales[block * kTileRows + r] = scale;
        group_sum[r] = __builtin_fmaf(scale, static_cast<float>(sum), group_sum[r]);
      }
      uint8_t* target = tile + block * block_nbytes;
      for (int64_t i = 0; i < (kWide ? size / 16 : 1); ++i) {
        if constexpr (kRows == 4)
          interleave(dwords[0][i], dwords[1][i], dwords[2][i], dwords[3][i], target + i * 128);
        else
          spread(dwords[0][i], target + i * 128 + lane * 4);
      }
    }
    for (int r = 0; r < kRows; ++r) sums[group * kTileRows + r] = group_sum[r];
  }
}

template <int kRows>
void copy_tile(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t lane, uint8_t* tile) {
  int64_t i = 0;
  for (; i + 8 <= layout.k; i += 8) {
    __m256i rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + r * ldx + i));
    if constexpr (kRows == 4)
      interleave(rows[0], rows[1], rows[2], rows[3], tile + i * 16);
    else
      spread(rows[0], tile + i * 16 + lane * 4);
  }
  for (; i < layout.k; ++i)
    for (int r = 0; r < kRows; ++r) reinterpret_cast<float*>(tile)[i * kTileRows + lane + r] = x[r * ldx + i];
}

template <int kRows>
void quantize_any(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t lane, int64_t group_begin, int64_t group_end,
                  uint8_t* tile) {
  switch (layout.mode) {
    case ActivationMode::kInt8: return quantize_tile<kRows, false>(layout, x, ldx, lane, group_begin, group_end, tile);
    case ActivationMode::kInt16: return quantize_tile<kRows, true>(layout, x, ldx, lane, group_begin, group_end, tile);
    case ActivationMode::kFloat32: return copy_tile<kRows>(layout, x, ldx, lane, tile);
  }
}

}  // namespace

void quantize_groups_avx2(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end,
                          int64_t group_begin, int64_t group_end, void* packed) {
  int64_t row = row_begin;
  while (row < row_end) {
    uint8_t* tile = static_cast<uint8_t*>(packed) + row / kTileRows * layout.tile_stride;
    const float* source = x + (row - row_begin) * ldx;
    const bool whole = row % kTileRows == 0 && row + kTileRows <= row_end;
    if (whole)
      quantize_any<4>(layout, source, ldx, 0, group_begin, group_end, tile);
    else
      quantize_any<1>(layout, source, ldx, row % kTileRows, group_begin, group_end, tile);
    row += whole ? kTileRows : 1;
  }
}

}  // namespace awq_cpu
