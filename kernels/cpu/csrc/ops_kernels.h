// Row operations and the table of one instruction set. Included by ops_<isa>.cpp only, after AWQ_OPS_NAME is defined.
#pragma once

#include "attention_kernel.h"
#include "ops.h"
#include "simd.h"

namespace {

using awq_cpu::Activation;
using awq_cpu::KvType;
using awq_cpu::OpsTable;
using awq_cpu::RopeRow;
using awq_cpu::TableType;

// Calls body(offset, load, store) over n elements, the last, partial vector through a padded copy, so that it runs the same code.
template <class Body>
AWQ_INLINE void for_each_vector(const float* in, int64_t n, float* out, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store8(out + i, body(load8(in + i)));
  if (i < n) {
    float tail[kLanes] = {};
    for (int64_t j = i; j < n; ++j) tail[j - i] = in[j];
    store8(tail, body(load8(tail)));
    for (int64_t j = i; j < n; ++j) out[j] = tail[j - i];
  }
}

void embed_row(const uint16_t* row, TableType type, float scale, int64_t n, float* out) {
  const F8 factor = set8(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store8(out + i, (type == TableType::kHalf ? load_half8(row + i) : load_bfloat8(row + i)) * factor);
  if (i < n) {
    uint16_t tail[kLanes] = {};
    float values[kLanes];
    for (int64_t j = i; j < n; ++j) tail[j - i] = row[j];
    store8(values, (type == TableType::kHalf ? load_half8(tail) : load_bfloat8(tail)) * factor);
    for (int64_t j = i; j < n; ++j) out[j] = values[j - i];
  }
}

// 1 / sqrt(mean of squares + eps) of n values, n a multiple of 8, in four interleaved sums.
AWQ_INLINE float inverse_rms(const float* x, int64_t n, float eps) {
  F8 sums[4] = {set8(0.0f), set8(0.0f), set8(0.0f), set8(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const F8 v = load8(x + i + j * kLanes);
      sums[j] = fma8(v, v, sums[j]);
    }
  for (; i < n; i += kLanes) {
    const F8 v = load8(x + i);
    sums[0] = fma8(v, v, sums[0]);
  }
  const float mean = sum8((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(n);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

AWQ_INLINE void scale_by_weight(const float* x, const float* weight, float inverse, float offset, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes)
    store8(out + i, load8(x + i) * set8(inverse) * (load8(weight + i) + set8(offset)));
}

void norm_row(const float* x, const float* residual, const float* x_weight, const float* weight, float eps, float offset,
              int64_t n, float* total, float* out) {
  if (x_weight != nullptr) {
    scale_by_weight(x, x_weight, inverse_rms(x, n, eps), offset, n, total);
    x = total;
  }
  if (residual != nullptr) {
    for (int64_t i = 0; i < n; i += kLanes) store8(total + i, load8(x + i) + load8(residual + i));
  } else if (total != x) {
    for (int64_t i = 0; i < n; i += kLanes) store8(total + i, load8(x + i));
  }
  if (weight != nullptr)
    scale_by_weight(total, weight, inverse_rms(total, n, eps), offset, n, out);
  else
    __builtin_memcpy(out, total, n * sizeof(float));
}

void act_and_mul_row(const float* gate, const float* up, Activation activation, int64_t n, float* out) {
  const F8 one = set8(1.0f);
  if (activation == Activation::kSilu) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const F8 x = load8(gate + i);
      store8(out + i, x / (one + exp_8(-x)) * load8(up + i));
    }
    return;
  }
  // 0.5 x (1 + tanh y) = x / (1 + e^-2y) with y = sqrt(2 / pi) (x + 0.044715 x^3)
  const F8 linear = set8(-1.5957691216057308f), cubic = set8(-1.5957691216057308f * 0.044715f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F8 x = load8(gate + i);
    const F8 exponent = x * fma8(x * x, cubic, linear);
    store8(out + i, x / (one + exp_8(exponent)) * load8(up + i));
  }
}

// Pairs (i, i + half); what lies past 2 * half stays.
AWQ_INLINE void rotate_head(float* x, const float* cos, const float* sin, int half) {
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F8 first = load8(x + i), second = load8(x + half + i), c = load8(cos + i), s = load8(sin + i);
    store8(x + i, fma8(first, c, -(second * s)));
    store8(x + half + i, fma8(second, c, first * s));
  }
  if (i == half) return;
  float tail[4][kLanes] = {};
  for (int j = i; j < half; ++j) {
    tail[0][j - i] = x[j];
    tail[1][j - i] = x[half + j];
    tail[2][j - i] = cos[j];
    tail[3][j - i] = sin[j];
  }
  const F8 first = load8(tail[0]), second = load8(tail[1]), c = load8(tail[2]), s = load8(tail[3]);
  store8(tail[0], fma8(first, c, -(second * s)));
  store8(tail[1], fma8(second, c, first * s));
  for (int j = i; j < half; ++j) {
    x[j] = tail[0][j - i];
    x[half + j] = tail[1][j - i];
  }
}

// Head `head` of those at `heads`, every `span` of which are normed together: *inverse is computed at the first and kept.
AWQ_INLINE void norm_and_rotate(const RopeRow& row, const float* weight, int span, const float* heads, int head, float* inverse,
                                float* out) {
  const float* in = heads + head * row.head_dim;
  if (weight != nullptr) {
    if (head % span == 0) *inverse = inverse_rms(in, static_cast<int64_t>(span) * row.head_dim, row.eps);
    scale_by_weight(in, weight + head % span * row.head_dim, *inverse, row.unit_offset, row.head_dim, out);
  } else {
    for (int d = 0; d < row.head_dim; d += kLanes) store8(out + d, load8(in + d));
  }
  if (row.cos != nullptr) rotate_head(out, row.cos, row.sin, row.rotary_half);
}

AWQ_INLINE void store_head_half(const float* in, int n, uint16_t* out, int64_t stride) {
  for (int d = 0; d < n; d += kLanes) {
    uint16_t halves[kLanes];
    store_half8(stride == 1 ? out + d : halves, load8(in + d));
    if (stride != 1)
      for (int i = 0; i < kLanes; ++i) out[(d + i) * stride] = halves[i];
  }
}

// Symmetric, to nearest: value = integer * scale. A NaN or infinity makes the scale NaN, so that it shows.
AWQ_INLINE float store_head_int8(const float* in, int n, int8_t* out, int64_t stride) {
  F8 largest = set8(0.0f), check = set8(0.0f);
  for (int d = 0; d < n; d += kLanes) {
    const F8 v = load8(in + d);
    largest = max8((F8)((U8)v & 0x7fffffffu), largest);
    check = check + v * set8(0.0f);
  }
  const float maximum = max_lane8(largest), scale = maximum / 127.0f + sum8(check);
  const bool usable = maximum > 127.0f * 1.17549435e-38f && scale == scale;
  const F8 inverse = set8(usable ? 127.0f / maximum : 0.0f), magic = set8(kRoundingMagic);
  for (int d = 0; d < n; d += kLanes) {
    const F8 v = load8(in + d);
    const I8 integers = (I8)((usable ? v * inverse : set8(0.0f)) + magic) - 0x4b400000;
    for (int i = 0; i < kLanes; ++i) out[(d + i) * stride] = static_cast<int8_t>(integers[i]);
  }
  return usable || scale != scale ? scale : 0.0f;
}

void rope_row(const RopeRow& row) {
  const awq_cpu::KvCache& kv = *row.kv;
  const int head_dim = row.head_dim;
  float inverse = 0.0f;
  for (int head = 0; head < row.num_heads; ++head)
    norm_and_rotate(row, row.q_weight, row.q_span, row.qkv, head, &inverse, row.q + head * head_dim);
  const float* keys = row.qkv + row.num_heads * head_dim;
  const int64_t block = row.slot / kv.block_size, offset = row.slot % kv.block_size;
  const int64_t plane = static_cast<int64_t>(head_dim) * kv.block_size;
  for (int head = 0; head < row.num_kv_heads; ++head) {
    float key[1024];
    norm_and_rotate(row, row.k_weight, row.k_span, keys, head, &inverse, key);
    const float* value = row.qkv + (row.num_heads + row.num_kv_heads + head) * head_dim;
    const int64_t index = block * kv.num_kv_heads + head;
    const int64_t key_at = index * plane + offset, value_at = index * plane + offset * head_dim;
    if (kv.type == KvType::kHalf) {
      store_head_half(key, head_dim, static_cast<uint16_t*>(kv.keys) + key_at, kv.block_size);
      store_head_half(value, head_dim, static_cast<uint16_t*>(kv.values) + value_at, 1);
    } else {
      const int64_t scale_at = index * kv.block_size + offset;
      kv.key_scales[scale_at] = store_head_int8(key, head_dim, static_cast<int8_t*>(kv.keys) + key_at, kv.block_size);
      kv.value_scales[scale_at] = store_head_int8(value, head_dim, static_cast<int8_t*>(kv.values) + value_at, 1);
    }
  }
}

void soft_cap(float* x, int64_t n, float cap) {
  for_each_vector(x, n, x, [cap](F8 v) __attribute__((always_inline)) { return set8(cap) * tanh_8(v / set8(cap)); });
}

// NaN compares false with everything, so `!(x <= limit)` finds it with the infinities.
int64_t argmax(const float* x, int64_t n, bool* finite) {
  F8 best[4];
  I8 strange = {};
  const F8 limit = set8(3.40282347e+38f);
  for (int j = 0; j < 4; ++j) best[j] = set8(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const F8 v = load8(x + i + j * kLanes);
      best[j] = max8(v, best[j]);
      strange |= ~(v <= limit);  // a NaN, or infinite; minus infinity stands for a token that may not come
    }
  float maximum = max_lane8(max8(max8(best[0], best[1]), max8(best[2], best[3])));
  int any = 0;
  for (int j = 0; j < kLanes; ++j) any |= strange[j];
  for (; i < n; ++i) {
    maximum = x[i] > maximum ? x[i] : maximum;
    any |= !(x[i] <= 3.40282347e+38f);
  }
  *finite = any == 0 && maximum >= -3.40282347e+38f;
  const F8 target = set8(maximum);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const I8 equal = load8(x + i) == target;
    const D4 halves = (D4)equal;  // a quick look before the eight
    uint64_t words[4];
    __builtin_memcpy(words, &halves, sizeof words);
    if ((words[0] | words[1] | words[2] | words[3]) == 0) continue;
    for (int j = 0; j < kLanes; ++j)
      if (equal[j]) return i + j;
  }
  for (; i < n; ++i)
    if (x[i] == maximum) return i;
  return 0;
}

void chunk_maxima(const float* x, int64_t n, float* maxima) {
  for (int64_t first = 0; first < n; first += 64) {
    F8 best = set8(-__builtin_inff());
    int64_t i = first;
    const int64_t end = first + 64 < n ? first + 64 : n;
    for (; i + kLanes <= end; i += kLanes) best = max8(load8(x + i), best);
    float maximum = max_lane8(best);
    for (; i < end; ++i) maximum = x[i] > maximum ? x[i] : maximum;
    maxima[first / 64] = maximum;
  }
}

void exponentials(const float* x, int64_t n, float temperature, float maximum, float min_p, float* scores, float* mass) {
  const F8 divisor = set8(temperature), top = set8(maximum), least = set8(min_p);
  for_each_vector(x, n, scores, [divisor](F8 v) __attribute__((always_inline)) { return v / divisor; });
  for_each_vector(scores, n, mass, [top, least](F8 v) __attribute__((always_inline)) {
    const F8 e = exp_8(v - top);
    return select8(e >= least, e, set8(0.0f));
  });
}

const OpsTable kTable = {AWQ_OPS_NAME,   embed_row, norm_row, act_and_mul_row, rope_row,    attend,
                         merge_partials, soft_cap,  argmax,   chunk_maxima,    exponentials};

}  // namespace
