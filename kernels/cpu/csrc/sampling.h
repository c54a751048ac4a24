// Choosing a token per row of logits: the semantics are kernels/reference.py's `sample`.
#pragma once

#include <cstdint>

#include "ops.h"
#include "thread_pool.h"

namespace awq_cpu {

// One entry per row.
struct SamplingParameters {
  const float* temperature;  // 0: greedy
  const int32_t* top_k;      // 0: off
  const float* top_p;        // 1: off
  const float* min_p;        // 0: off
  const float* typical_p;    // 1: off
  const int64_t* seed;
  const int64_t* index;
};

// A number in [0, 1): Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = (index, 0).
double uniform(int64_t seed, int64_t index);

// logits [num_rows][vocab_size]. Writes a token per row and whether the row was finite.
void sample_rows(ThreadPool& pool, const OpsTable& ops, const float* logits, int64_t num_rows, int64_t vocab_size,
                 const SamplingParameters& parameters, int32_t* token_ids, bool* finite);

}  // namespace awq_cpu
