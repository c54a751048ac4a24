// Chooses the ISA variant and forwards to it.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "linear_kernels.h"

#if defined(__x86_64__) && !defined(AWQ_CPU_GENERIC_ONLY)
#define AWQ_CPU_X86 1
#endif

namespace awq_cpu {
namespace {

// The variants this build has and this machine runs, best first. `__builtin_cpu_supports` looks at XCR0 too, so a feature counts only
// if the operating system saves its registers.
std::vector<const LinearKernels*> supported() {
  std::vector<const LinearKernels*> found;
#ifdef AWQ_CPU_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#ifdef AWQ_CPU_EMULATE_AVX512  // tests: the AVX-512 file was built on an emulation library
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
  if (avx512) found.push_back(&kAvx512Kernels);
  if (avx2) found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kGenericKernels);
  return found;
}

const LinearKernels* find(const std::string& name) {
  std::string names;
  for (const LinearKernels* kernels : supported()) {
    if (name == kernels->name) return kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("CPU instruction set '" + name + "' (AWQ_CPU_ISA): this machine and build have " + names);
}

std::atomic<const LinearKernels*> current{nullptr};

}  // namespace

const LinearKernels& linear_kernels() {
  const LinearKernels* kernels = current.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* wanted = std::getenv("AWQ_CPU_ISA");
    kernels = wanted != nullptr && *wanted != '\0' ? find(wanted) : supported().front();
    current.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const LinearKernels* kernels : supported()) names.push_back(kernels->name);
  return names;
}

std::string current_isa() { return linear_kernels().name; }

void select_isa(const std::string& name) { current.store(find(name), std::memory_order_release); }

void quantize_rows(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, void* packed) {
  linear_kernels().quantize_groups(layout, x, ldx, row_begin, row_end, 0, layout.num_groups, packed);
}

void quantize_groups(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end,
                     int64_t group_begin, int64_t group_end, void* packed) {
  linear_kernels().quantize_groups(layout, x, ldx, row_begin, row_end, group_begin, group_end, packed);
}

void linear_run(const PackedLinear& weight, const void* activations, int64_t num_rows, float* y, int64_t ldy, int64_t panel_begin,
                int64_t panel_end, const ReadAhead& ahead) {
  linear_kernels().run(weight, activations, num_rows, y, ldy, panel_begin, panel_end, ahead);
}

int64_t lines_ahead(const PackedLinear& weight, int64_t num_rows) {
  const auto lines = linear_kernels().lines_ahead;
  return lines != nullptr ? lines(weight, num_rows) : 0;
}

}  // namespace awq_cpu
