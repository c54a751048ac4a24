// Paged attention of one query tile against one KV head. Included once per instruction set, inside its translation unit.
//
// The bits of a row depend on its own query and keys alone: scores are sums over head_dim in order; keys are taken in blocks of
// 64 aligned to position 0, whose masked entries add exact zeros; every 256 keys form a segment with a softmax of its own, and
// segments are merged in order. Nothing depends on the tile a row is in, on the batch, or on who computes which segment.
#pragma once

#include "ops.h"
#include "simd.h"

namespace {

using awq_cpu::AttentionTask;
using awq_cpu::kKeyBlock;
using awq_cpu::kKeySegment;
using awq_cpu::kPartialExtra;
using awq_cpu::KvCache;

constexpr int kKeyGroups = kKeyBlock / kLanes;
// Rows and vectors of a register tile: what 16 registers hold. It decides speed alone, never a bit.
#if AWQ_SIMD_AVX2
constexpr int kMicroRows = 6;
constexpr int register_columns(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }
#else
constexpr int kMicroRows = 4;
constexpr int register_columns(int) { return 2; }
#endif
constexpr float kLog2E = 1.44269504088896f;

struct HalfElement {
  using type = uint16_t;
  static constexpr bool kScaled = false;
  AWQ_INLINE F8 load(const uint16_t* p) { return load_half8(p); }
};
struct Int8Element {
  using type = int8_t;
  static constexpr bool kScaled = true;
  AWQ_INLINE F8 load(const int8_t* p) { return load_int8(p); }
};

// The pointers of one 64-key block: per group of 8 keys (which never straddles a pool block) where its keys and values start.
template <class Element>
struct KeyBlock {
  const typename Element::type* keys[kKeyGroups + 3];  // past the valid groups: the last valid one, so that any width may load
  const typename Element::type* values[kKeyGroups + 3];
  // Where the eight-key groups that are read after this block begin, as `values` does for its own; null: nothing is known to follow.
  const char* next_keys[kKeyGroups];
  alignas(32) float key_scales[kKeyBlock];
  alignas(32) float value_scales[kKeyBlock];
};

// Rows of the tile and what the softmax knows of them so far in this segment.
struct TileState {
  float* q;            // [rows][head_dim], scaled
  float* accumulator;  // [rows][head_dim]
  float* sums;         // [rows][8]: lane-wise sums of the weights
  float* maxima;       // [rows]
  int32_t* positions;  // [rows]
  int head_dim;
};

// Calls visit(group, row, offset) for the groups of 8 keys from first_key on, up to a block of them: row counts [pool block][KV head].
// Returns the number of keys.
template <class Visit>
AWQ_INLINE int visit_groups(const AttentionTask& task, int first_key, Visit visit) {
  const KvCache& kv = *task.kv;
  const int left = task.num_keys - first_key, num_keys = left < kKeyBlock ? left : kKeyBlock;
  int table_entry = first_key / kv.block_size, offset = first_key % kv.block_size;
  for (int group = 0; group * kLanes < num_keys; ++group, offset += kLanes) {
    if (offset == kv.block_size) {
      offset = 0;
      ++table_entry;
    }
    visit(group, static_cast<int64_t>(task.block_table[table_entry]) * kv.num_kv_heads + task.kv_head, offset);
  }
  return num_keys;
}

template <class Element>
AWQ_INLINE int find_block(const AttentionTask& task, int first_key, KeyBlock<Element>& block) {
  const KvCache& kv = *task.kv;
  const int64_t plane = static_cast<int64_t>(kv.head_dim) * kv.block_size;
  const int num_keys = visit_groups(task, first_key, [&](int group, int64_t row, int offset) {
    block.keys[group] = static_cast<const typename Element::type*>(kv.keys) + row * plane + offset;
    block.values[group] = static_cast<const typename Element::type*>(kv.values) + row * plane + int64_t{offset} * kv.head_dim;
    if (Element::kScaled) {
      store8(block.key_scales + group * kLanes, load8(kv.key_scales + row * kv.block_size + offset));
      store8(block.value_scales + group * kLanes, load8(kv.value_scales + row * kv.block_size + offset));
    }
  });
  const int num_groups = (num_keys + kLanes - 1) / kLanes;
  for (int group = num_groups; group < kKeyGroups + 3; ++group) {
    block.keys[group] = block.keys[num_groups - 1];
    block.values[group] = block.values[num_groups - 1];
  }
  return num_keys;
}

// The first key that a task reads.
AWQ_INLINE int first_visible_key(const AttentionTask& task) {
  const int first = task.first_segment * kKeySegment, visible = task.window ? task.first_position - task.window + 1 : 0;
  return visible > first ? visible / kKeyBlock * kKeyBlock : first;
}

// Finds what is read after the block at first_key: the next block of the task, or the first of the thread's next task.
template <class Element>
AWQ_INLINE void find_next(const AttentionTask& task, int first_key, KeyBlock<Element>& block) {
  for (int group = 0; group < kKeyGroups; ++group) block.next_keys[group] = nullptr;
  const int end = (task.first_segment + task.num_segments) * kKeySegment, keys = task.first_position + task.num_tokens;
  const bool last = first_key + kKeyBlock >= (end < keys ? end : keys);
  if (last && task.next == nullptr) return;
  const AttentionTask& reader = last ? *task.next : task;
  const int64_t head_dim = task.kv->head_dim, plane = head_dim * task.kv->block_size;
  visit_groups(reader, last ? first_visible_key(reader) : first_key + kKeyBlock, [&](int group, int64_t row, int offset) {
    block.next_keys[group] = reinterpret_cast<const char*>(static_cast<const typename Element::type*>(task.kv->keys) + row * plane +
                                                           offset * head_dim);
  });
}

// scores[r][group * 8 ...] = q[r] . keys for C groups of keys. The groups' values, which are needed next, are fetched meanwhile
// with kFetch.
template <class Element, bool kFetch, int kDim, int R, int C>
AWQ_INLINE void score_groups(const float* q, int head_dim, const typename Element::type* const* keys,
                             const typename Element::type* const* values, int key_stride, float* scores) {
  if (kDim != 0) head_dim = kDim;
  F8 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = set8(0.0f);
  const typename Element::type* pointers[C];
  for (int c = 0; c < C; ++c) pointers[c] = keys[c];
  const int group_nbytes = kLanes * head_dim * static_cast<int>(sizeof(typename Element::type));
#pragma GCC unroll 4
  for (int d = 0; d < head_dim; ++d) {
    if (kFetch && d / C * 64 < group_nbytes) prefetch_line(reinterpret_cast<const char*>(values[d % C]) + d / C * 64);
    F8 query[R];
    if (R < C)  // the smaller side stays in registers: sums, that side and one vector of the other are 16 at most
      for (int r = 0; r < R; ++r) query[r] = set8(q[r * head_dim + d]);
    F8 key[C];
    for (int c = 0; c < C; ++c) {
      key[c] = Element::load(pointers[c]);
      pointers[c] += key_stride;
      if (R < C)
        for (int r = 0; r < R; ++r) sums[r][c] = fma8(query[r], key[c], sums[r][c]);
    }
    if (R >= C) {
      for (int r = 0; r < R; ++r) {
        const F8 broadcast = set8(q[r * head_dim + d]);
        for (int c = 0; c < C; ++c) sums[r][c] = fma8(broadcast, key[c], sums[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store8(scores + r * kKeyBlock + c * kLanes, sums[r][c]);
}

// accumulator[r][column ...] = accumulator * factor[r] + weights[r] . values for C * 8 columns; keys in order. With the first
// columns the keys that are needed next are fetched, with kFetch.
template <class Element, bool kFetch, int kDim, int R, int C>
AWQ_INLINE void weigh_columns(const float* weights, const float* factors, const KeyBlock<Element>& block, int first_key,
                              int end_key, int head_dim, int column, float* accumulator) {
  if (kDim != 0) head_dim = kDim;
  const int row_nbytes = head_dim * static_cast<int>(sizeof(typename Element::type));
  F8 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      sums[r][c] = load8(accumulator + r * head_dim + column + c * kLanes) * set8(factors[r]);
  for (int key = first_key; key < end_key;) {
    const int group = key / kLanes, stop = (group + 1) * kLanes < end_key ? (group + 1) * kLanes : end_key;
    const int64_t from = int64_t{key % kLanes} * head_dim;
    const typename Element::type* row = block.values[group] + from + column;
    const char* next = kFetch && column == 0 ? block.next_keys[group] : nullptr;
    if (next) next += from * row_nbytes / head_dim;
#pragma GCC unroll 2
    for (; key < stop; ++key, row += head_dim) {
      if (next) {
        for (int i = 0; i < row_nbytes; i += 64) prefetch_line(next + i);
        next += row_nbytes;
      }
      F8 weight[R], value[C];
      if (R < C)
        for (int r = 0; r < R; ++r) weight[r] = set8(weights[r * kKeyBlock + key]);
      for (int c = 0; c < C; ++c) {
        value[c] = Element::load(row + c * kLanes);
        if (R < C)
          for (int r = 0; r < R; ++r) sums[r][c] = fma8(weight[r], value[c], sums[r][c]);
      }
      if (R >= C) {
        for (int r = 0; r < R; ++r) {
          const F8 broadcast = set8(weights[r * kKeyBlock + key]);
          for (int c = 0; c < C; ++c) sums[r][c] = fma8(broadcast, value[c], sums[r][c]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store8(accumulator + r * head_dim + column + c * kLanes, sums[r][c]);
}

template <class Element, bool kFetch, int kDim, int R>
AWQ_NOINLINE void score_rows(const float* q, int head_dim, const KeyBlock<Element>& block, int block_size, int first_group,
                             int end_group, float* scores) {
  constexpr int C = register_columns(R) > 4 ? 4 : register_columns(R);
  int group = first_group;
  for (; group < end_group; group += C) {
    if (C == 4 && end_group - group <= 2) {
      score_groups<Element, kFetch, kDim, R, 2>(q, head_dim, block.keys + group, block.values + group, block_size, scores + group * kLanes);
      return;
    }
    // A last, partial tile reads the repeated pointers; what it writes past the block's end is never looked at.
    score_groups<Element, kFetch, kDim, R, C>(q, head_dim, block.keys + group, block.values + group, block_size, scores + group * kLanes);
  }
}

template <class Element, bool kFetch, int kDim, int R>
AWQ_NOINLINE void weigh_rows(const float* weights, const float* factors, const KeyBlock<Element>& block, int first_key,
                             int end_key, int head_dim, float* accumulator) {
  if (kDim != 0) head_dim = kDim;
  // With 4 and head_dim unknown, compilers spill two of the sums.
  constexpr int C = R == 3 && kDim == 0 ? 3 : register_columns(R);
  int column = 0;
  for (; column + C * kLanes <= head_dim; column += C * kLanes)
    weigh_columns<Element, kFetch, kDim, R, C>(weights, factors, block, first_key, end_key, head_dim, column, accumulator);
  if (C > 2)
    for (; column + 2 * kLanes <= head_dim; column += 2 * kLanes)
      weigh_columns<Element, kFetch, kDim, R, 2>(weights, factors, block, first_key, end_key, head_dim, column, accumulator);
  for (; column < head_dim; column += kLanes)
    weigh_columns<Element, kFetch, kDim, R, 1>(weights, factors, block, first_key, end_key, head_dim, column, accumulator);
}

// Which keys of a block a row sees: [begin, end), empty where end <= begin.
struct KeyRange {
  int begin, end;
};

AWQ_INLINE KeyRange visible_keys(const AttentionTask& task, int position, int first_key) {
  const int end = position + 1 - first_key, begin = task.window ? end - task.window : 0;
  return {begin > 0 ? begin : 0, end < kKeyBlock ? end : kKeyBlock};
}

// Whether a half vector range holds a NaN or an infinity.
AWQ_INLINE bool holds_nonfinite(const KeyBlock<HalfElement>& block, int num_keys, int head_dim) {
  unsigned found = 0;
  for (int key = 0; key < num_keys; ++key) {
    const uint16_t* row = block.values[key / kLanes] + int64_t{key % kLanes} * head_dim;
    for (int d = 0; d < head_dim; ++d) found |= (row[d] & 0x7c00) == 0x7c00;
  }
  return found != 0;
}
AWQ_INLINE bool holds_nonfinite(const KeyBlock<Int8Element>&, int, int) { return false; }  // scales are masked with the weights

// Scores to weights of one row: masks, updates maximum and sum, leaves exp2(score - maximum) in `scores` (0 where masked; times the
// values' scales where they have any). `groups` covers [range.begin, range.end).
template <class Element, bool kMasked>
AWQ_INLINE float row_maximum(const AttentionTask& task, const KeyBlock<Element>& block, KeyRange range, int first_group,
                             int end_group, float* scores) {
  const I8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  F8 maximum = set8(-__builtin_inff());
  for (int group = first_group; group < end_group; ++group) {
    F8 score = load8(scores + group * kLanes);
    if (Element::kScaled) score = score * load8(block.key_scales + group * kLanes);
    if (task.soft_cap > 0.0f) {
      const F8 cap = set8(task.soft_cap);
      score = cap * tanh_8(score / cap) * set8(kLog2E);
    }
    if (kMasked) {
      const I8 key = lane + group * kLanes;
      score = select8((key >= range.begin) & (key < range.end), score, set8(-__builtin_inff()));
    }
    if (kMasked || Element::kScaled || task.soft_cap > 0.0f) store8(scores + group * kLanes, score);
    maximum = max8(score, maximum);
  }
  return max_lane8(maximum);
}

template <class Element, bool kMasked>
AWQ_INLINE void row_weights(const KeyBlock<Element>& block, KeyRange range, int first_group, int end_group, float maximum,
                            float factor, float* sums, float* scores) {
  const I8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  F8 sum = load8(sums) * set8(factor);
  for (int group = first_group; group < end_group; ++group) {
    const I8 key = lane + group * kLanes;
    const I8 visible = (key >= range.begin) & (key < range.end);
    F8 weight = exp2_nonpositive8(load8(scores + group * kLanes) - set8(maximum));
    if (kMasked) weight = select8(visible, weight, set8(0.0f));
    sum = sum + weight;
    if (Element::kScaled) weight = weight * load8(block.value_scales + group * kLanes);
    if (Element::kScaled && kMasked) weight = select8(visible, weight, set8(0.0f));
    store8(scores + group * kLanes, weight);
  }
  store8(sums, sum);
}

// Scores of R rows to weights, with what the running maxima and sums make of them. factor[r] is what r's sums so far shrink by.
template <class Element, int R, bool kMasked>
AWQ_NOINLINE void softmax_rows(const AttentionTask& task, const KeyBlock<Element>& block, const KeyRange* ranges, int first_group,
                             int end_group, int row, TileState& state, float* scores, float* factor) {
  F8 old_maxima = set8(0.0f), new_maxima = set8(0.0f);
  for (int r = 0; r < R; ++r) {
    const float old = state.maxima[row + r];
    float maximum = old;
    if (!kMasked || ranges[r].end > 0) {
      maximum = row_maximum<Element, kMasked>(task, block, ranges[r], first_group, end_group, scores + r * kKeyBlock);
      maximum = old > maximum ? old : maximum;
    }
    old_maxima[r] = old;
    new_maxima[r] = maximum;
    state.maxima[row + r] = maximum;
  }
  // Where the maximum stands, the factor is exactly 1 and the update an exact no-op.
  F8 factors = exp2_nonpositive8(old_maxima - new_maxima);
  if (kMasked)
    for (int r = 0; r < R; ++r)
      if (ranges[r].end == 0) factors[r] = 1.0f;
  store8(factor, factors);
  for (int r = 0; r < R; ++r)
    row_weights<Element, kMasked>(block, ranges[r], first_group, end_group, new_maxima[r], factor[r],
                                  state.sums + (row + r) * kLanes, scores + r * kKeyBlock);
}

// One block of keys for R rows from `row` on.
template <class Element, bool kFetch, int kDim, int R>
AWQ_INLINE void attend_rows(const AttentionTask& task, const KeyBlock<Element>& block, int first_key, int row, bool nonfinite,
                            TileState& state) {
  KeyRange ranges[R], hull = {kKeyBlock, 0};
  bool uniform = true;
  for (int r = 0; r < R; ++r) {
    ranges[r] = visible_keys(task, state.positions[row + r], first_key);
    if (ranges[r].end <= ranges[r].begin) ranges[r] = {0, 0};
    uniform = uniform && ranges[r].begin == ranges[0].begin && ranges[r].end == ranges[0].end;
    if (ranges[r].end == 0) continue;
    hull.begin = ranges[r].begin < hull.begin ? ranges[r].begin : hull.begin;
    hull.end = ranges[r].end > hull.end ? ranges[r].end : hull.end;
  }
  if (hull.end <= hull.begin) return;
  const int first_group = hull.begin / kLanes, end_group = (hull.end + kLanes - 1) / kLanes;
  const int head_dim = kDim != 0 ? kDim : state.head_dim;
  alignas(32) float scores[R * kKeyBlock + 3 * kLanes], factor[kLanes];
  score_rows<Element, kFetch, kDim, R>(state.q + row * head_dim, head_dim, block, task.kv->block_size, first_group, end_group, scores);
  if (uniform && hull.begin == 0 && hull.end == kKeyBlock) {
    softmax_rows<Element, R, false>(task, block, ranges, 0, kKeyGroups, row, state, scores, factor);
  } else {
    softmax_rows<Element, R, true>(task, block, ranges, first_group, end_group, row, state, scores, factor);
  }
  float* accumulator = state.accumulator + row * head_dim;
  if (uniform || !nonfinite) {
    weigh_rows<Element, kFetch, kDim, R>(scores, factor, block, hull.begin, hull.end, head_dim, accumulator);
    return;
  }
  // A NaN or infinity that some of these rows may not see: 0 * NaN would show it to them, so each row takes its own keys.
  for (int r = 0; r < R; ++r)
    if (ranges[r].end > 0)
      weigh_rows<Element, false, kDim, 1>(scores + r * kKeyBlock, factor + r, block, ranges[r].begin, ranges[r].end, head_dim,
                             accumulator + r * head_dim);
}

// The last, fewer than kMicroRows rows.
template <class Element, bool kFetch, int kDim, int R>
AWQ_INLINE void attend_remainder(const AttentionTask& task, const KeyBlock<Element>& block, int first_key, int row, int count,
                                 bool nonfinite, TileState& state) {
  if constexpr (R > 0) {
    if (count == R) {
      attend_rows<Element, kFetch, kDim, R>(task, block, first_key, row, nonfinite, state);
    } else {
      attend_remainder<Element, kFetch, kDim, R - 1>(task, block, first_key, row, count, nonfinite, state);
    }
  }
}

template <class Element, bool kFetch, int kDim>
AWQ_INLINE void attend_block(const AttentionTask& task, const KeyBlock<Element>& block, int first_key, int num_rows,
                             bool nonfinite, TileState& state) {
  int row = 0;
  for (; row + kMicroRows <= num_rows; row += kMicroRows)
    attend_rows<Element, kFetch, kDim, kMicroRows>(task, block, first_key, row, nonfinite, state);
  attend_remainder<Element, kFetch, kDim, kMicroRows - 1>(task, block, first_key, row, num_rows - row, nonfinite, state);
}

// Adds a segment's (accumulator, maximum, sum) to the total's. A segment of which the row saw nothing changes nothing.
AWQ_INLINE void fold_segment(float* total, float& total_maximum, float& total_sum, bool& any, const float* accumulator,
                             float maximum, float sum, int head_dim) {
  if (sum == 0.0f && maximum == -__builtin_inff()) return;
  if (!any) {
    for (int d = 0; d < head_dim; d += kLanes) store8(total + d, load8(accumulator + d));
    total_maximum = maximum;
    total_sum = sum;
    any = true;
    return;
  }
  const float merged = total_maximum > maximum ? total_maximum : maximum;
  const F8 factors = exp2_nonpositive8(F8{total_maximum - merged, maximum - merged});
  const F8 left = set8(factors[0]), right = set8(factors[1]);
  for (int d = 0; d < head_dim; d += kLanes)
    store8(total + d, fma8(load8(total + d), left, load8(accumulator + d) * right));
  total_sum = total_sum * factors[0] + sum * factors[1];
  total_maximum = merged;
}

AWQ_INLINE void finish_row(const float* total, float sum, int head_dim, float* out) {
  const F8 inverse = set8(1.0f / sum);
  for (int d = 0; d < head_dim; d += kLanes) store8(out + d, load8(total + d) * inverse);
}

template <class Element, bool kFetch, int kDim>
AWQ_NOINLINE void attend_segment(const AttentionTask& task, int segment, int num_rows, TileState& state) {
  for (int row = 0; row < num_rows; ++row) {
    state.maxima[row] = -__builtin_inff();
    store8(state.sums + row * kLanes, set8(0.0f));
    for (int d = 0; d < state.head_dim; d += kLanes) store8(state.accumulator + row * state.head_dim + d, set8(0.0f));
  }
  const int last_position = task.first_position + task.num_tokens - 1;
  KeyBlock<Element> block;
  for (int first_key = segment * kKeySegment; first_key < (segment + 1) * kKeySegment; first_key += kKeyBlock) {
    if (first_key > last_position) break;
    if (task.window && first_key + kKeyBlock <= task.first_position - task.window + 1) continue;
    const int num_keys = find_block(task, first_key, block);
    if (kFetch) find_next(task, first_key, block);
    const bool edge = first_key + kKeyBlock > task.first_position + 1 ||
                      (task.window && first_key <= last_position - task.window);
    const bool nonfinite = task.num_tokens > 1 && edge && holds_nonfinite(block, num_keys, state.head_dim);
    attend_block<Element, kFetch, kDim>(task, block, first_key, num_rows, nonfinite, state);
  }
}

// kFetch: memory is read ahead. For one token's rows, that is; more rows read a block again and again, from the cache.
template <class Element, bool kFetch, int kDim>
void attend_tile(const AttentionTask& task, float* scratch) {
  const int head_dim = task.kv->head_dim, num_rows = task.num_tokens * task.group;
  TileState state;
  state.head_dim = head_dim;
  // Set apart by more than whole pages: equal low address bits would make loads wait for unrelated stores.
  const int64_t stride = static_cast<int64_t>(num_rows) * head_dim + awq_cpu::kScratchSkew;
  state.q = scratch;
  state.accumulator = state.q + stride;
  float* totals = state.accumulator + stride;
  state.sums = totals + stride;
  state.maxima = state.sums + num_rows * kLanes;
  float* total_maxima = state.maxima + num_rows;
  float* total_sums = total_maxima + num_rows;
  state.positions = reinterpret_cast<int32_t*>(total_sums + num_rows);
  bool* any = reinterpret_cast<bool*>(state.positions + num_rows);

  // exp2 instead of exp: the factor goes into the queries, or after the soft cap.
  const F8 scale = set8(task.soft_cap > 0.0f ? task.scale : task.scale * kLog2E);
  for (int row = 0; row < num_rows; ++row) {
    const float* q = task.q + (row / task.group) * task.q_stride + (row % task.group) * head_dim;
    for (int d = 0; d < head_dim; d += kLanes) store8(state.q + row * head_dim + d, load8(q + d) * scale);
    state.positions[row] = task.first_position + row / task.group;
    any[row] = false;
  }
  if (task.num_segments == 1 && task.partials == nullptr) {  // folding into nothing copies
    attend_segment<Element, kFetch, kDim>(task, task.first_segment, num_rows, state);
    for (int row = 0; row < num_rows; ++row)
      finish_row(state.accumulator + row * head_dim, sum8(load8(state.sums + row * kLanes)), head_dim,
                 task.output + (row / task.group) * task.output_stride + (row % task.group) * head_dim);
    return;
  }
  for (int segment = task.first_segment; segment < task.first_segment + task.num_segments; ++segment) {
    attend_segment<Element, kFetch, kDim>(task, segment, num_rows, state);
    for (int row = 0; row < num_rows; ++row) {
      const float* accumulator = state.accumulator + row * head_dim;
      const float sum = sum8(load8(state.sums + row * kLanes));
      if (task.partials == nullptr) {
        fold_segment(totals + row * head_dim, total_maxima[row], total_sums[row], any[row], accumulator, state.maxima[row], sum,
                     head_dim);
        continue;
      }
      float* partial = task.partials + (static_cast<int64_t>(segment - task.first_segment) * num_rows + row) *
                                           (head_dim + kPartialExtra);
      for (int d = 0; d < head_dim; d += kLanes) store8(partial + d, load8(accumulator + d));
      partial[head_dim] = state.maxima[row];
      partial[head_dim + 1] = sum;
    }
  }
  if (task.partials != nullptr) return;
  for (int row = 0; row < num_rows; ++row)
    finish_row(totals + row * head_dim, total_sums[row], head_dim,
               task.output + (row / task.group) * task.output_stride + (row % task.group) * head_dim);
}

// kDim: head_dim where it is known at compile time, which makes the arithmetic a tenth faster, else 0.
template <class Element, bool kFetch>
void attend_dim(const AttentionTask& task, float* scratch) {
  switch (task.kv->head_dim) {
    case 64: return attend_tile<Element, kFetch, 64>(task, scratch);
    case 128: return attend_tile<Element, kFetch, 128>(task, scratch);
    default: return attend_tile<Element, kFetch, 0>(task, scratch);
  }
}

template <class Element>
void attend_typed(const AttentionTask& task, float* scratch) {
  if (task.num_tokens == 1) return attend_dim<Element, true>(task, scratch);
  attend_dim<Element, false>(task, scratch);
}

void attend(const AttentionTask& task, float* scratch) {
  if (task.kv->type == awq_cpu::KvType::kHalf) return attend_typed<HalfElement>(task, scratch);
  attend_typed<Int8Element>(task, scratch);
}

void merge_partials(const float* partials, int num_segments, int64_t stride, int head_dim, float* out) {
  float maximum = 0.0f, sum = 0.0f;
  bool any = false;
  for (int segment = 0; segment < num_segments; ++segment) {
    const float* partial = partials + segment * stride;
    fold_segment(out, maximum, sum, any, partial, partial[head_dim], partial[head_dim + 1], head_dim);
  }
  finish_row(out, sum, head_dim, out);
}

}  // namespace
