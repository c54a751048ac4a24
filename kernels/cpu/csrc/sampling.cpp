#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace awq_cpu {
namespace {

struct Candidate {
  float score, mass;
  int32_t token;
};

// Scores in steps of 1/16 below the largest; the last bin holds all the rest.
constexpr int kNumBins = 1024;
constexpr float kBinsPerUnit = 16.0f;
constexpr size_t kNucleusGuess = 256;  // tokens that top-p is first looked for in

// Per-thread working memory, kept between rows and steps.
struct Workspace {
  std::vector<float> scores, mass;
  std::vector<float> maxima;
  std::vector<float> spread;
  std::vector<int16_t> bins;
  std::vector<Candidate> candidates;
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

double sum_range(const float* mass, int64_t begin, int64_t end) {
  double sums[4] = {0, 0, 0, 0};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4)
    for (int j = 0; j < 4; ++j) sums[j] += mass[i + j];
  for (; i < end; ++i) sums[0] += mass[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The first token, in vocabulary order, whose cumulative mass exceeds random * total; the last one with any mass where rounding
// leaves none.
int32_t pick_from_all(const std::vector<float>& mass, double random) {
  constexpr int64_t kSpan = 512;
  const int64_t n = static_cast<int64_t>(mass.size());
  double total = 0.0;
  for (int64_t i = 0; i < n; i += kSpan) total += sum_range(mass.data(), i, std::min(i + kSpan, n));
  const double target = random * total;
  double cumulative = 0.0;
  for (int64_t i = 0; i < n; i += kSpan) {
    const int64_t end = std::min(i + kSpan, n);
    const double span = sum_range(mass.data(), i, end);
    if (cumulative + span > target) {
      double within = cumulative;
      for (int64_t j = i; j < end; ++j) {
        within += mass[j];
        if (within > target) return static_cast<int32_t>(j);
      }
    }
    cumulative += span;
  }
  int64_t last = n - 1;
  while (last > 0 && !(mass[last] > 0.0f)) --last;
  return static_cast<int32_t>(last);
}

// How many of the candidates, best first, top-k leaves: all that tie with the k-th stay.
size_t count_top_k(const std::vector<Candidate>& ranked, int64_t top_k) {
  if (top_k <= 0 || static_cast<size_t>(top_k) >= ranked.size()) return ranked.size();
  size_t count = static_cast<size_t>(top_k);
  while (count < ranked.size() && ranked[count].score >= ranked[top_k - 1].score) ++count;
  return count;
}

void rank(std::vector<Candidate>& candidates) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.score != b.score ? a.score > b.score : a.token < b.token;
  });
}

double mass_of(const std::vector<Candidate>& candidates, size_t count) {
  double sum = 0.0;
  for (size_t i = 0; i < count; ++i) sum += candidates[i].mass;
  return sum;
}

// Every token with a mass and a score not under the count-th largest of the chunks' maxima: at least `count` tokens have such a
// score, and for the peaked distributions of language models hardly more. False where there are too few chunks.
bool gather_best(Workspace& work, const OpsTable& ops, size_t count) {
  const int64_t n = static_cast<int64_t>(work.scores.size());
  work.maxima.resize((n + 63) / 64);
  if (count > work.maxima.size()) return false;
  ops.chunk_maxima(work.scores.data(), n, work.maxima.data());
  std::nth_element(work.maxima.begin(), work.maxima.begin() + count - 1, work.maxima.end(), std::greater<float>());
  const float threshold = work.maxima[count - 1];
  work.candidates.clear();
  for (int64_t i = 0; i < n; ++i)
    if (work.scores[i] >= threshold && work.mass[i] > 0.0f)
      work.candidates.push_back({work.scores[i], work.mass[i], static_cast<int32_t>(i)});
  return true;
}

// The same for any distribution and any filter: sorts tokens into bins by score and takes as many bins as the filters may need.
// Top-k decides first, because top-p's share is of what top-k leaves.
void gather_bins(Workspace& work, float maximum, int64_t top_k, double enough) {
  const size_t n = work.mass.size();
  int64_t counts[kNumBins] = {};
  double masses[kNumBins] = {};
  work.bins.resize(n);
  for (size_t i = 0; i < n; ++i) {
    if (!(work.mass[i] > 0.0f)) {
      work.bins[i] = kNumBins;  // no candidate
      continue;
    }
    const float steps = (maximum - work.scores[i]) * kBinsPerUnit;
    const int bin = steps < kNumBins - 1 ? static_cast<int>(steps) : kNumBins - 1;
    work.bins[i] = static_cast<int16_t>(bin);
    ++counts[bin];
    masses[bin] += work.mass[i];
  }
  int last_bin = 0;
  int64_t num_seen = counts[0];
  double mass_seen = masses[0];
  while (last_bin < kNumBins - 1 && (top_k > 0 ? num_seen < top_k : mass_seen <= enough)) {
    ++last_bin;
    num_seen += counts[last_bin];
    mass_seen += masses[last_bin];
  }
  work.candidates.clear();
  for (size_t i = 0; i < n; ++i)
    if (work.bins[i] <= last_bin) work.candidates.push_back({work.scores[i], work.mass[i], static_cast<int32_t>(i)});
}

// Takes the mass from tokens that are not typical, and from those under min_p.
void keep_typical(Workspace& work, float maximum, double typical_p, float min_p) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const size_t n = work.mass.size();
  double total = 0.0, weighted = 0.0;
  for (size_t i = 0; i < n; ++i) {
    if (!(work.mass[i] > 0.0f)) continue;
    total += work.mass[i];
    weighted += static_cast<double>(work.mass[i]) * (work.scores[i] - maximum);
  }
  const float mean = static_cast<float>(weighted / total);
  // The tokens by their distance from the mean, in bins: only the bin in which the mass is reached has to be sorted.
  double masses[kNumBins] = {};
  work.spread.resize(n);
  const auto bin_of = [](float distance) {
    const float steps = distance * kBinsPerUnit;
    return steps < kNumBins - 1 ? static_cast<int>(steps) : kNumBins - 1;
  };
  for (size_t i = 0; i < n; ++i) {
    work.spread[i] = work.mass[i] > 0.0f ? std::fabs((work.scores[i] - maximum) - mean) : kInfinity;
    if (work.mass[i] > 0.0f) masses[bin_of(work.spread[i])] += work.mass[i];
  }
  const double wanted = typical_p * total;
  int bin = 0;
  double before = 0.0;
  while (bin < kNumBins - 1 && before + masses[bin] < wanted) before += masses[bin++];
  work.candidates.clear();
  for (size_t i = 0; i < n; ++i)
    if (work.mass[i] > 0.0f && bin_of(work.spread[i]) == bin)
      work.candidates.push_back({work.spread[i], work.mass[i], static_cast<int32_t>(i)});
  std::sort(work.candidates.begin(), work.candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.score < b.score; });
  float within = kInfinity;
  for (const Candidate& candidate : work.candidates) {
    within = candidate.score;
    before += candidate.mass;
    if (before >= wanted) break;
  }
  for (size_t i = 0; i < n; ++i)
    if (!(work.spread[i] <= within && work.mass[i] >= min_p)) work.mass[i] = 0.0f;
}

int32_t pick_filtered(Workspace& work, const OpsTable& ops, float maximum, int64_t top_k, double top_p, double random,
                      bool is_typical) {
  const double total = top_k > 0 ? 0.0 : sum_range(work.mass.data(), 0, static_cast<int64_t>(work.mass.size()));
  const double enough = top_p * total * (1.0 + 1e-9);
  // What typical sampling leaves are not the likeliest.
  const bool found = !is_typical && gather_best(work, ops, top_k > 0 ? static_cast<size_t>(top_k) : kNucleusGuess);
  if (!found || (top_k <= 0 && mass_of(work.candidates, work.candidates.size()) <= enough))
    gather_bins(work, maximum, top_k, enough);
  rank(work.candidates);
  size_t kept = count_top_k(work.candidates, top_k);
  if (top_p < 1.0) {
    const double limit = top_p * (top_k > 0 ? mass_of(work.candidates, kept) : total);
    double before = 0.0;
    size_t nucleus = 0;
    for (; nucleus < kept && before < limit; ++nucleus) before += work.candidates[nucleus].mass;
    kept = nucleus;
  }
  work.candidates.resize(std::max<size_t>(kept, 1));
  auto& candidates = work.candidates;
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  const double kept_mass = mass_of(candidates, candidates.size());
  double cumulative = 0.0;
  for (const Candidate& candidate : candidates) {
    cumulative += candidate.mass;
    if (cumulative > random * kept_mass) return candidate.token;
  }
  return candidates.back().token;
}

int32_t sample_row(const OpsTable& ops, const float* logits, int64_t n, const SamplingParameters& parameters, int64_t row,
                   bool* finite) {
  const int64_t best = ops.argmax(logits, n, finite);
  const float temperature = parameters.temperature[row];
  if (!*finite || !(temperature > 0.0f)) return static_cast<int32_t>(best);
  Workspace& work = workspace();
  work.scores.resize(n);
  work.mass.resize(n);
  const float maximum = logits[best] / temperature;
  // A temperature so small that scores overflow leaves the largest logit alone.
  if (!std::isfinite(maximum)) return static_cast<int32_t>(best);
  const float min_p = parameters.min_p[row], typical_p = parameters.typical_p[row];
  const bool is_typical = typical_p < 1.0f;
  ops.exponentials(logits, n, temperature, maximum, is_typical ? 0.0f : min_p, work.scores.data(), work.mass.data());
  if (is_typical) keep_typical(work, maximum, typical_p, min_p);
  const double random = uniform(parameters.seed[row], parameters.index[row]);
  const int64_t top_k = parameters.top_k[row];
  const double top_p = parameters.top_p[row];
  if (top_k <= 0 && top_p >= 1.0) return pick_from_all(work.mass, random);
  return pick_filtered(work, ops, maximum, top_k, top_p, random, is_typical);
}

}  // namespace

double uniform(int64_t seed, int64_t index) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
  uint32_t counter[4] = {static_cast<uint32_t>(index), static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32), 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0], product1 = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
                              static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const uint64_t bits = (static_cast<uint64_t>(counter[0]) << 21) | (counter[1] >> 11);
  return static_cast<double>(bits) * 0x1p-53;
}

void sample_rows(ThreadPool& pool, const OpsTable& ops, const float* logits, int64_t num_rows, int64_t vocab_size,
                 const SamplingParameters& parameters, int32_t* token_ids, bool* finite) {
  std::lock_guard<std::mutex> lock(pool.mutex());
  pool.check_process();
  pool.parallel_for(num_rows, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      token_ids[row] = sample_row(ops, logits + row * vocab_size, vocab_size, parameters, row, finite + row);
  });
}

}  // namespace awq_cpu
