// What this machine can do at most, measured: the yardsticks of `python -m kernels.bench`.
#pragma once

#include "linear_kernels.h"
#include "thread_pool.h"

namespace awq_cpu {

// Cycles per second of the calling thread's core, from a chain of dependent additions; 0 where unknown (not x86).
double measure_clock(double seconds);

// Multiply-accumulates per second on one core in the densest loop of the current instruction set over registers alone
// (AVX2: vpmaddubsw + vpaddw; AVX-512: vpdpbusd); 0 where there is none.
double measure_integer_peak(double seconds);

// Bytes per second read from `data` by the whole pool, the best of several passes.
double measure_read_bandwidth(ThreadPool& pool, const void* data, int64_t nbytes, double seconds);

}  // namespace awq_cpu
