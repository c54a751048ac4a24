// How a step's attention is cut into units of work. The cut never changes a result: attention_kernel.h.
#include <algorithm>

#include "program.h"

namespace awq_cpu {
namespace {

constexpr int64_t kClaimsPerThread = 4;
constexpr int64_t kMaxPartialFloats = int64_t{16} << 20;  // 64 MiB; past it, long sequences stay whole

struct Tile {
  int32_t sequence, first_query, num_queries, first_segment, num_segments;
  int64_t cost;  // of one KV head
};

std::vector<Tile> make_tiles(const Batch& batch, const Counts& counts, const AttentionKey& key) {
  std::vector<Tile> tiles;
  const int tile_queries = std::max(1, kQueryRows / key.group);
  for (int64_t s = 0; s < counts.num_sequences; ++s) {
    const int num_queries = batch.query_starts[s + 1] - batch.query_starts[s];
    const int first_position = batch.seq_lens[s] - num_queries;
    for (int query = 0; query < num_queries; query += tile_queries) {
      const int count = std::min(tile_queries, num_queries - query);
      const int first_key = key.window ? std::max(0, first_position + query - key.window + 1) : 0;
      const int last_key = first_position + query + count - 1;
      const int first_segment = first_key / kKeySegment, end_segment = last_key / kKeySegment + 1;
      tiles.push_back({static_cast<int32_t>(s), query, count, first_segment, end_segment - first_segment,
                       static_cast<int64_t>(count) * key.group * (last_key - first_key + 1)});
    }
  }
  return tiles;
}

AttentionPlan make_plan(const Batch& batch, const Counts& counts, const AttentionKey& key, int num_threads) {
  AttentionPlan plan;
  const auto tiles = make_tiles(batch, counts, key);
  int64_t total = 0;
  for (const Tile& tile : tiles) total += tile.cost * key.num_kv_heads;
  const int64_t share = total / (kClaimsPerThread * num_threads) + 1;
  for (const Tile& tile : tiles) {
    const int64_t segment_floats = static_cast<int64_t>(tile.num_queries) * key.group * (key.head_dim + kPartialExtra);
    const int64_t floats = segment_floats * tile.num_segments;
    int64_t num_pieces = num_threads == 1 ? 1 : std::min<int64_t>(tile.num_segments, ceil_div(tile.cost, share));
    if (plan.num_partial_floats + floats * key.num_kv_heads > kMaxPartialFloats) num_pieces = 1;
    if (num_pieces > 1) {
      if (plan.merges.empty()) plan.merges.resize(counts.num_tokens);
      for (int query = tile.first_query; query < tile.first_query + tile.num_queries; ++query) {
        const int64_t row = static_cast<int64_t>(query - tile.first_query) * key.group * (key.head_dim + kPartialExtra);
        plan.merges[batch.query_starts[tile.sequence] + query] = {plan.num_partial_floats + row, floats, segment_floats,
                                                                  tile.num_segments};
      }
    }
    const int64_t per_piece = ceil_div(tile.num_segments, num_pieces);
    for (int head = 0; head < key.num_kv_heads; ++head) {
      for (int64_t first = 0; first < tile.num_segments; first += per_piece) {
        const int64_t count = std::min(per_piece, tile.num_segments - first);
        plan.units.push_back({tile.sequence, head, tile.first_query, tile.num_queries,
                              static_cast<int32_t>(tile.first_segment + first), static_cast<int32_t>(count),
                              num_pieces > 1 ? plan.num_partial_floats + head * floats + first * segment_floats : -1,
                              tile.cost * count / tile.num_segments});
      }
    }
    if (num_pieces > 1) plan.num_partial_floats += floats * key.num_kv_heads;
  }
  // The longest first, so that none starts when the others are done.
  std::stable_sort(plan.units.begin(), plan.units.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
  return plan;
}

}  // namespace

const AttentionPlan& RunContext::attention_plan(const AttentionKey& key) {
  auto found = plans.find(key);
  if (found == plans.end()) {
    found = plans.emplace(key, make_plan(batch, counts, key, pool.num_threads())).first;
    const size_t nbytes = found->second.num_partial_floats * sizeof(float);
    if (partials.nbytes() < nbytes) partials = AlignedBuffer(nbytes + nbytes / 2);
  }
  return found->second;
}

void AttentionOp::run(RunContext& context) {
  context.lines_read_ahead = 0;
  const int group = num_heads / kv.num_kv_heads, head_dim = kv.head_dim;
  const int64_t width = static_cast<int64_t>(num_heads) * head_dim;
  const AttentionPlan& plan = context.attention_plan({kv.num_kv_heads, group, head_dim, window});
  float* partials = reinterpret_cast<float*>(context.partials.data());
  const Batch& batch = context.batch;

  const auto make_task = [&](int64_t i) {
    const auto& unit = plan.units[i];
    const int32_t start = batch.query_starts[unit.sequence], num_queries = batch.query_starts[unit.sequence + 1] - start;
    const int64_t at = (start + unit.first_query) * width + static_cast<int64_t>(unit.kv_head) * group * head_dim;
    AttentionTask task = {};
    task.q = q + at;
    task.q_stride = width;
    task.num_tokens = unit.num_queries;
    task.group = group;
    task.first_position = batch.seq_lens[unit.sequence] - num_queries + unit.first_query;
    task.kv_head = unit.kv_head;
    task.num_keys = batch.seq_lens[unit.sequence];
    task.block_table = batch.block_tables + unit.sequence * batch.max_blocks;
    task.first_segment = unit.first_segment;
    task.num_segments = unit.num_segments;
    task.kv = &kv;
    task.scale = scale;
    task.soft_cap = soft_cap;
    task.window = window;
    task.output = rows + at;
    task.output_stride = width;
    task.partials = unit.partials >= 0 ? partials + unit.partials : nullptr;
    return task;
  };
  // The short units of decoding are claimed several at a time, so that a thread knows which keys it reads next.
  const auto num_units = static_cast<int64_t>(plan.units.size());
  const bool decoding = context.counts.num_tokens == context.counts.num_sequences;
  const int64_t chunk = decoding ? context.pool.even_chunk(num_units) : 1;
  context.pool.parallel_for(num_units, chunk, [&](int64_t begin, int64_t end, int thread) {
    AttentionTask task = make_task(begin);
    for (int64_t i = begin; i < end; ++i) {
      const AttentionTask next = i + 1 < end ? make_task(i + 1) : AttentionTask{};
      task.next = i + 1 < end ? &next : nullptr;
      context.ops.attend(task, context.scratch(thread));
      task = next;
    }
  });

  if (out.packed.empty() && plan.merges.empty()) return;
  const int64_t num_tokens = context.counts.num_tokens, num_tiles = ceil_div(num_tokens, kTileRows);
  context.pool.parallel_for(num_tiles, context.pool.even_chunk(num_tiles), [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * kTileRows, last = std::min(end * kTileRows, num_tokens);
    for (int64_t token = first; token < last && !plan.merges.empty(); ++token) {
      const auto& merge = plan.merges[token];
      for (int head = 0; head < num_heads && merge.num_segments; ++head)
        context.ops.merge_partials(partials + merge.partials + head / group * merge.kv_head_stride +
                                       static_cast<int64_t>(head % group) * (head_dim + kPartialExtra),
                                   merge.num_segments, merge.segment_stride, head_dim, rows + token * width + head * head_dim);
    }
    for (const auto& packed : out.packed) quantize_rows(packed.layout, rows + first * width, width, first, last, packed.data);
  });
}

}  // namespace awq_cpu
