// What one ISA variant provides, and the table that `linear_dispatch.cpp` chooses from.
#pragma once

#include "linear.h"

namespace awq_cpu {

struct LinearKernels {
  const char* name;
  void (*quantize_groups)(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end,
                          int64_t group_begin, int64_t group_end, void* packed);
  void (*run)(const PackedLinear& weight, const void* activations, int64_t num_rows, float* y, int64_t ldy,
              int64_t panel_begin, int64_t panel_end, const ReadAhead& ahead);
  int64_t (*lines_ahead)(const PackedLinear& weight, int64_t num_rows);  // null: reads nothing ahead
  // Runs the densest multiply-accumulate loop over registers and returns the number of multiply-accumulates; may be null.
  double (*integer_peak)(int64_t iterations);
};

extern const LinearKernels kGenericKernels;
extern const LinearKernels kAvx2Kernels;    // AVX2, FMA, F16C
extern const LinearKernels kAvx512Kernels;  // those and AVX-512 F, BW, VL, VNNI

// Also used by the AVX-512 variant.
void quantize_groups_avx2(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end,
                          int64_t group_begin, int64_t group_end, void* packed);

// The variant in use; chosen on first use.
const LinearKernels& linear_kernels();

inline constexpr float kSmallestNormal = 1.17549435e-38f;  // FLT_MIN
inline constexpr uint32_t kInfinityBits = 0x7f800000;

// The scale of a block whose largest magnitude has the given bits, and the factor that turns values into integers.
// `limit` is 127 or 32767. All variants share this, so quantized activations agree bit for bit between them.
struct BlockScale {
  float scale;    // NaN where the block holds a NaN or an infinity
  float inverse;  // 0 where all integers are to be 0
};

AWQ_INLINE BlockScale block_scale(uint32_t largest_bits, float limit) {
  if (largest_bits >= kInfinityBits) return {bits_to_float(0x7fc00000), 0.0f};
  const float largest = bits_to_float(largest_bits);
  if (largest < limit * kSmallestNormal) return {0.0f, 0.0f};
  return {largest / limit, limit / largest};
}

}  // namespace awq_cpu
