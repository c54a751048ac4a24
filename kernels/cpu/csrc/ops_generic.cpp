// The ops for any machine: compiled with the baseline's flags.
#define AWQ_OPS_NAME "generic"
#include "ops_kernels.h"

namespace awq_cpu {
const OpsTable& ops_generic() { return kTable; }
}  // namespace awq_cpu
