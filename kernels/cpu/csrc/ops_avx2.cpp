// The ops for AVX2, FMA and F16C: compiled with -mavx2 -mfma -mf16c, called only where the processor has them.
#define AWQ_OPS_NAME "avx2"
#include "ops_kernels.h"

#if !AWQ_SIMD_AVX2
#error "ops_avx2.cpp must be compiled with -mavx2 -mfma -mf16c"
#endif

namespace awq_cpu {
const OpsTable& ops_avx2() { return kTable; }
}  // namespace awq_cpu
