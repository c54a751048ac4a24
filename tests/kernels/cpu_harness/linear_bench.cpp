// Microbenchmark of the native linear layers on one core, without Python: time, MAC/cycle, GB/s of weights.
// Build: g++ -O3 -std=c++17 -I kernels/cpu/csrc ... (see tests/kernels/test_cpu_linear_native.py), or use `python -m kernels.bench`.
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "linear.h"

using namespace awq_cpu;

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

static double clock_ghz() {
  double best = 1e9;
  for (int repeat = 0; repeat < 300; ++repeat) {
    const double start = now();
    uint64_t x = 1;
    for (int i = 0; i < 5000; ++i)
      asm volatile("add $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0\nadd $1,%0\n" : "+r"(x));
    const double t = now() - start;
    if (t < best) best = t;
  }
  return 5000.0 * 8 / best / 1e9;
}

template <typename F>
static double best_time(F f, double budget) {
  double best = 1e9;
  const double end = now() + budget;
  int n = 0;
  while (now() < end || n < 5) {
    const double start = now();
    f();
    const double t = now() - start;
    if (t < best) best = t;
    ++n;
  }
  return best;
}

static PackedLinear random_linear(const char* kind, int64_t n, int64_t k, int64_t group, ActivationMode mode) {
  if (kind[0] == 'a') {
    const int64_t groups = k / group;
    std::vector<int32_t> q(static_cast<size_t>(k * n / 8)), z(static_cast<size_t>(groups * n / 8));
    std::vector<uint16_t> s(static_cast<size_t>(groups * n));
    for (auto& v : q) v = rand() ^ (rand() << 16);
    for (auto& v : z) v = rand() ^ (rand() << 16);
    for (auto& v : s) v = float_to_half(0.001f + 0.0001f * static_cast<float>(rand() % 64));
    return pack_awq({{q.data(), z.data(), s.data(), n}}, k, group, FloatType::kFloat16, mode, nullptr);
  }
  std::vector<float> w(static_cast<size_t>(n * k));
  for (auto& v : w) v = static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.5f;
  if (kind[0] == 'i') return pack_int8({{w.data(), n}}, k, FloatType::kFloat32, nullptr);
  if (kind[0] == 'f') return pack_dense({{w.data(), n}}, k, FloatType::kFloat32, nullptr);
  std::vector<uint16_t> h(w.size());
  for (size_t i = 0; i < w.size(); ++i) h[i] = float_to_half(w[i]);
  return pack_dense({{h.data(), n}}, k, FloatType::kFloat16, nullptr);
}

int main(int argc, char** argv) {
  const double ghz = clock_ghz();
  const double budget = argc > 1 ? atof(argv[1]) : 0.2;
  printf("isa %s, clock %.3f GHz\n", current_isa().c_str(), ghz);
  struct Case { const char* kind; int64_t n, k, group; ActivationMode mode; };
  const Case cases[] = {
      {"awq int8", 256, 1024, 128, ActivationMode::kInt8}, {"awq int8", 256, 1024, 64, ActivationMode::kInt8},
      {"awq int8", 256, 1024, 32, ActivationMode::kInt8},  {"awq int8", 256, 1024, 1024, ActivationMode::kInt8},
      {"awq int8", 3072, 576, 64, ActivationMode::kInt8},  {"awq int8", 576, 1536, 64, ActivationMode::kInt8},
      {"awq int8", 1024, 4096, 128, ActivationMode::kInt8},
      {"awq int16", 256, 1024, 128, ActivationMode::kInt16}, {"int8 int16", 256, 576, 0, ActivationMode::kInt16},
      {"fp32", 256, 512, 0, ActivationMode::kFloat32},       {"half", 256, 512, 0, ActivationMode::kFloat32},
      {"awq int8 DRAM", 16384, 4096, 128, ActivationMode::kInt8},
  };
  for (const Case& c : cases) {
    const PackedLinear weight = random_linear(c.kind, c.n, c.k, c.group, c.mode);
    printf("%-14s N %5ld K %4ld group %4ld:", c.kind, long(c.n), long(c.k), long(c.group));
    for (int64_t m : {1, 2, 3, 4, 8, 16, 32, 64, 67, 128, 512}) {
      if (c.n * c.k * m > (int64_t{1} << 31)) continue;
      std::vector<float> x(static_cast<size_t>(m * c.k)), y(static_cast<size_t>(m * c.n));
      for (auto& v : x) v = static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.5f;
      AlignedBuffer a(static_cast<size_t>(weight.activations.nbytes(m)));
      quantize_rows(weight.activations, x.data(), c.k, 0, m, a.data());
      const double t = best_time([&] { linear_run(weight, a.data(), m, y.data(), c.n, 0, weight.num_panels); }, budget);
      const double mac = static_cast<double>(m * c.n * c.k) / t / 1e9;
      printf(" %ld:%.1f", long(m), mac / ghz);
      if (m == 1) printf("(%.1fGB/s)", static_cast<double>(weight.nbytes()) / t / 1e9);
      if (m == 64) {
        const double q = best_time([&] { quantize_rows(weight.activations, x.data(), c.k, 0, m, a.data()); }, budget / 4);
        const double q1 = best_time([&] { quantize_rows(weight.activations, x.data(), c.k, 1, 2, a.data()); }, budget / 4);
        printf("[quantize %.2f, one row %.2f cycles/value]", q * ghz * 1e9 / double(m * c.k), q1 * ghz * 1e9 / double(c.k));
      }
      fflush(stdout);
    }
    printf("\n");
  }
  return 0;
}
