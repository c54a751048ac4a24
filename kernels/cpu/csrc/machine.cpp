#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace awq_cpu {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The best rate of `work`, which returns how much it did; other processes only ever make it slower.
template <typename Work>
double best_rate(double seconds, Work work) {
  double best = 0.0;
  const double end = now() + seconds;
  do {
    const double start = now(), amount = work();
    best = std::max(best, amount / (now() - start));
  } while (now() < end);
  return best;
}

}  // namespace

double measure_clock(double seconds) {
#if defined(__x86_64__)
  return best_rate(seconds, [] {
    // Each product waits 3 cycles for the one before, on every core of Intel's since Nehalem and of AMD's since Zen. (Additions
    // will not do: Intel's since Golden Cove fold a chain of them.)
    uint64_t x = 3;
    for (int i = 0; i < 2000; ++i)
      asm volatile("imul %0, %0\n imul %0, %0\n imul %0, %0\n imul %0, %0\n imul %0, %0\n imul %0, %0\n" : "+r"(x));
    return 2000.0 * 6 * 3;
  });
#else
  (void)seconds;
  return 0.0;
#endif
}

double measure_integer_peak(double seconds) {
  const LinearKernels& kernels = linear_kernels();
  if (kernels.integer_peak == nullptr) return 0.0;
  return best_rate(seconds, [&kernels] { return kernels.integer_peak(4096); });
}

double measure_read_bandwidth(ThreadPool& pool, const void* data, int64_t nbytes, double seconds) {
  constexpr int64_t kUnit = int64_t{1} << 20;
  const auto* words = static_cast<const uint64_t*>(data);
  std::atomic<uint64_t> sink{0};  // keeps the loads
  const std::lock_guard<std::mutex> lock(pool.mutex());
  return best_rate(seconds, [&] {
    pool.parallel_for(ceil_div(nbytes, kUnit), 4, [&](int64_t begin, int64_t end, int) {
      uint64_t sums[8] = {};
      const int64_t last = std::min(end * kUnit, nbytes) / 64 * 8;
      for (int64_t i = begin * kUnit / 8; i < last; i += 8)
        for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
      uint64_t total = 0;
      for (uint64_t sum : sums) total += sum;
      sink.fetch_xor(total, std::memory_order_relaxed);
    });
    return static_cast<double>(nbytes);
  });
}

}  // namespace awq_cpu
