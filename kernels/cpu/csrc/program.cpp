#include "program.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "moe.h"

namespace awq_cpu {
namespace {

[[noreturn]] void fail(const char* buffer, int64_t entry, int64_t value, int64_t low, int64_t high) {
  throw std::out_of_range(std::string(buffer) + "[" + std::to_string(entry) + "]: expected " + std::to_string(low) + ".." +
                          std::to_string(high) + ", found " + std::to_string(value));
}

void check_range(const char* name, const int32_t* values, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; ++i)
    if (values[i] < 0 || values[i] >= limit) fail(name, i, values[i], 0, limit - 1);
}

// Rows [4 * tile, ...) of `rows`, `count` of them.
void write_packed(const RowOutput& out, const float* rows, int64_t ldx, int64_t first_row, int64_t count) {
  for (const auto& packed : out.packed) quantize_rows(packed.layout, rows, ldx, first_row, first_row + count, packed.data);
}

// Calls make_row(row, destination) for all rows, tile by tile: into the dense output, or into scratch and then packed.
template <class MakeRow>
void for_each_row(RunContext& context, int64_t num_rows, const RowOutput& out, MakeRow&& make_row) {
  const int64_t num_tiles = ceil_div(num_rows, kTileRows);
  context.pool.parallel_for(num_tiles, context.pool.even_chunk(num_tiles), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileRows, count = std::min(kTileRows, num_rows - first);
      float* rows = out.dense != nullptr ? out.dense + first * out.width : context.scratch(thread);
      for (int64_t r = 0; r < count; ++r) make_row(first + r, rows + r * out.width);
      write_packed(out, rows, out.width, first, count);
    }
  });
}

}  // namespace

const OpsTable& current_ops() {
  // No op here gains from AVX-512 what its linears do; the AVX2 code serves both.
#if defined(__x86_64__) && !defined(AWQ_CPU_GENERIC_ONLY)
  if (current_isa() != "generic") return ops_avx2();
#endif
  return ops_generic();
}

void Program::add(std::unique_ptr<Op> op) {
  if (const auto* attention = dynamic_cast<const AttentionOp*>(op.get()); attention != nullptr && attention->window == 0)
    read_ahead_of(*attention);
  ops_.push_back(std::move(op));
}

// The linears before an attention read its cache ahead: the last of them, whose weights do not push it out of the cache again. (One with a
// window reads a part of its blocks only, and is left out.)
void Program::read_ahead_of(const AttentionOp& attention) {
  constexpr int64_t kCacheNbytes = int64_t{16} << 20;  // a share of the last level that a few threads can count on
  int64_t nbytes = 0;
  for (auto op = ops_.rbegin(); op != ops_.rend(); ++op) {
    auto* linear = dynamic_cast<AnyLinearOp*>(op->get());
    if (linear != nullptr) {
      nbytes += linear->weight_nbytes() * 5 / 2;  // its weights, and at 16 rows one and a half times as much of the cache
      if (nbytes > kCacheNbytes) return;
      linear->next_read = &attention.kv;
    } else if (dynamic_cast<AttentionOp*>(op->get()) != nullptr || dynamic_cast<MoeOp*>(op->get()) != nullptr) {
      return;
    }
  }
}

void Program::list_blocks(const Counts& counts) {
  constexpr size_t kEnoughBlocks = 4096;  // more than the linears of a layer have time to read
  blocks_ahead_.clear();
  // One tile of rows reads nothing ahead.
  if (!limits.attends || counts.num_tokens != counts.num_sequences || counts.num_tokens <= kTileRows) return;
  for (int64_t s = 0; s < counts.num_sequences && blocks_ahead_.size() < kEnoughBlocks; ++s) {
    const int32_t* table = batch_.block_tables + s * batch_.max_blocks;
    const int64_t num_blocks = ceil_div(batch_.seq_lens[s], limits.block_size);
    const int64_t num_before = s > 0 ? ceil_div(batch_.seq_lens[s - 1], limits.block_size) : 0;
    int64_t first = 0;  // that the sequence before does not have: a common prefix is read once
    while (first < std::min(num_blocks, num_before) && table[first] == (table - batch_.max_blocks)[first]) ++first;
    blocks_ahead_.insert(blocks_ahead_.end(), table + first, table + num_blocks);
  }
}

float* Program::shared_rows(size_t num_floats) {
  if (num_floats > shared_floats_) {  // earlier ops keep their pointers: buffers are added, never freed
    shared_buffers_.emplace_back(num_floats * sizeof(float));
    shared_floats_ = num_floats;
  }
  return reinterpret_cast<float*>(shared_buffers_.back().data());
}

void Program::check(const Counts& counts) const {
  const auto check_count = [](const char* name, int64_t value, int64_t limit) {
    if (value < 0 || value > limit)
      throw std::out_of_range(std::string(name) + ": expected 0.." + std::to_string(limit) + ", found " + std::to_string(value));
  };
  check_count("num_tokens", counts.num_tokens, limits.num_op_rows);
  if (batch_.counts == nullptr) return;  // ops on rows alone
  check_count("num_tokens", counts.num_tokens, batch_.max_tokens);
  check_count("num_sequences", counts.num_sequences, batch_.max_sequences);
  check_count("num_rows", counts.num_rows, std::min(batch_.max_rows, limits.num_picked_rows));
  if (limits.vocab_size) check_range("input_ids", batch_.input_ids, counts.num_tokens, limits.vocab_size);
  if (limits.max_position) check_range("positions", batch_.positions, counts.num_tokens, limits.max_position);
  if (limits.num_slots) check_range("slot_mapping", batch_.slot_mapping, counts.num_tokens, limits.num_slots);
  if (limits.picks_rows) check_range("logit_rows", batch_.logit_rows, counts.num_rows, counts.num_tokens);
  if (limits.attends) check_sequences(counts);
}

void Program::check_sequences(const Counts& counts) const {
  if (batch_.query_starts[0] != 0) fail("query_starts", 0, batch_.query_starts[0], 0, 0);
  for (int64_t s = 0; s < counts.num_sequences; ++s) {
    const int64_t begin = batch_.query_starts[s], end = batch_.query_starts[s + 1], length = batch_.seq_lens[s];
    if (end < begin || end > counts.num_tokens) fail("query_starts", s + 1, end, begin, counts.num_tokens);
    const int64_t most = batch_.max_blocks * limits.block_size;
    if (length < end - begin || length > most) fail("seq_lens", s, length, end - begin, most);
    for (int64_t t = begin; t < end; ++t) {  // attention goes by the lengths, rotation by the positions: they must agree
      const int64_t position = length - end + t;
      if (batch_.positions[t] != position) fail("positions", t, batch_.positions[t], position, position);
    }
    const int32_t* table = batch_.block_tables + s * batch_.max_blocks;
    const int64_t num_blocks = ceil_div(length, limits.block_size);
    for (int64_t i = 0; i < num_blocks; ++i)
      if (table[i] < 0 || table[i] >= limits.num_blocks)
        fail(("block_tables[" + std::to_string(s) + "]").c_str(), i, table[i], 0, limits.num_blocks - 1);
  }
  const int64_t covered = batch_.query_starts[counts.num_sequences];
  if (covered != counts.num_tokens) fail("query_starts", counts.num_sequences, covered, counts.num_tokens, counts.num_tokens);
}

void Program::run(const Counts& counts) {
  std::lock_guard<std::mutex> lock(pool_->mutex());
  pool_->check_process();
  check(counts);
  pool_->wake();
  if (scratch_buffers_.size() != static_cast<size_t>(pool_->num_threads()) ||
      scratch_buffers_[0].nbytes() < scratch_floats_ * sizeof(float)) {
    scratch_buffers_.clear();
    for (int i = 0; i < pool_->num_threads(); ++i) scratch_buffers_.emplace_back(scratch_floats_ * sizeof(float));
  }
  plans_.clear();
  list_blocks(counts);
  RunContext context{*pool_, current_ops(), batch_, counts, scratch_buffers_, plans_, partials_, num_experts_read, blocks_ahead_};
  if (!profiling) {
    for (auto& op : ops_) op->run(context);
    return;
  }
  for (auto& op : ops_) {
    const auto start = std::chrono::steady_clock::now();
    op->run(context);
    seconds_by_kind[op->kind] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}

Counts Program::run_batch() {
  const Counts counts{batch_.counts[0], batch_.counts[1], batch_.counts[2]};
  run(counts);
  return counts;
}

void EmbedOp::run(RunContext& context) {
  context.pool.parallel_for(context.counts.num_tokens, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      context.ops.embed_row(table + context.batch.input_ids[t] * width, type, scale, width, out + t * width);
  });
}

void NormOp::run(RunContext& context) {
  const int64_t n = out.width;
  for_each_row(context, context.counts.num_tokens, out, [&](int64_t row, float* to) {
    context.ops.norm_row(x + row * n, residual != nullptr ? residual + row * n : nullptr, x_weight, weight, eps, offset, n,
                         total + row * n, to);
  });
}

void ActivationOp::run(RunContext& context) {
  const int64_t n = out.width;
  for_each_row(context, context.counts.num_tokens, out, [&](int64_t row, float* to) {
    context.ops.act_and_mul_row(gate_up + row * 2 * n, gate_up + row * 2 * n + n, activation, n, to);
  });
}

namespace {

// Fewer rows are bound by reading the weights, which wants long stretches of them.
constexpr int64_t kMinGatedRows = 32;
constexpr int64_t kMaxGatedColumns = 256;  // 64 rows of 256 gates and ups are 128 KiB

}  // namespace

int64_t gated_unit_columns(const std::vector<LinearPart>& parts, const RowOutput& out) {
  if (parts.size() != 1 || out.packed.size() != 1 || out.dense != nullptr) return 0;
  const ActivationLayout& layout = out.packed[0].layout;
  if (layout.mode == ActivationMode::kFloat32 || layout.group_size % layout.block_size) return 0;
  const int64_t columns = std::max(layout.group_size, 2 * kPanelColumns);
  if (columns % kPanelColumns || columns > kMaxGatedColumns || out.width % columns) return 0;
  return columns;
}

void GatedLinearOp::run(RunContext& context) {
  const int64_t num_rows = context.counts.num_tokens, row_blocks = ceil_div(num_rows, kGatedRows);
  if (unit_columns != 0) {
    const int64_t num_units = activation.out.width / unit_columns;
    if (num_rows >= kMinGatedRows && num_units * row_blocks >= 8 * context.pool.num_threads())
      return run_units(context, num_units, row_blocks);
  }
  run_parts(context, parts, num_rows, const_cast<float*>(activation.gate_up), 2 * activation.out.width, next_read);
  activation.run(context);
}

void GatedLinearOp::run_units(RunContext& context, int64_t num_units, int64_t row_blocks) {
  const PackedLinear& weight = *parts[0].weight;
  const auto& packed = activation.out.packed[0];
  const int64_t num_rows = context.counts.num_tokens, width = activation.out.width, columns = unit_columns, ld = 2 * columns;
  const int64_t panels = columns / kPanelColumns, groups = columns / packed.layout.group_size;
  const int64_t total = num_units * row_blocks;
  // Row blocks outside: a claim's units share their input.
  context.pool.parallel_for(total, context.pool.even_chunk(total), [&](int64_t begin, int64_t end, int thread) {
    float* scratch = context.scratch(thread);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i % num_units, first_row = i / num_units * kGatedRows, rows = std::min(kGatedRows, num_rows - first_row);
      const auto* input = static_cast<const uint8_t*>(parts[0].input) + first_row / kTileRows * weight.activations.tile_stride;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t column = half * width + unit * columns, panel = column / kPanelColumns;
        linear_run(weight, input, rows, scratch + half * columns - column, ld, panel, panel + panels);
      }
      for (int64_t r = 0; r < rows; ++r)
        context.ops.act_and_mul_row(scratch + r * ld, scratch + r * ld + columns, activation.activation, columns, scratch + r * ld);
      quantize_groups(packed.layout, scratch, ld, first_row, first_row + rows, unit * groups, (unit + 1) * groups, packed.data);
    }
  });
}

void QuantizeOp::run(RunContext& context) {
  const int64_t num_rows = context.counts.num_tokens, num_tiles = ceil_div(num_rows, kTileRows);
  context.pool.parallel_for(num_tiles, context.pool.even_chunk(num_tiles), [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * kTileRows, last = std::min(end * kTileRows, num_rows);
    write_packed(out, x + first * out.width, out.width, first, last - first);
  });
}

namespace {
constexpr int64_t kClaimMacs = 4000000;  // of a linear: some forty microseconds of a core
}  // namespace

ReadAhead RunContext::read_ahead(const KvCache* cache) const {
  if (cache == nullptr || blocks_ahead.empty()) return {};
  const int64_t element = cache->type == KvType::kHalf ? 2 : 1;
  const int64_t block_nbytes = element * cache->num_kv_heads * cache->head_dim * cache->block_size;
  return {static_cast<const char*>(cache->keys), static_cast<const char*>(cache->values), blocks_ahead.data(),
          static_cast<int64_t>(blocks_ahead.size()), block_nbytes / 64, lines_read_ahead};
}

void run_parts(RunContext& context, const std::vector<LinearPart>& parts, int64_t num_rows, float* y, int64_t ldy,
               const KvCache* next_read) {
  if (num_rows == 0) return;
  int64_t num_panels = 0, macs = 0;
  for (const auto& part : parts) {
    num_panels += part.weight->num_panels;
    macs += part.weight->num_panels * kPanelColumns * part.weight->in_features * num_rows;
  }
  // Threads are not equally fast, and wait for the last claim: long phases are cut finer, but not where a claim reads more rows than
  // L2 keeps.
  const int64_t most = num_rows <= kGatedRows ? 16 : 4;
  const int64_t claims = std::clamp<int64_t>(macs / kClaimMacs / context.pool.num_threads(), 4, most);
  const ReadAhead of_all = context.read_ahead(next_read);
  context.pool.parallel_for(num_panels, context.pool.even_chunk(num_panels, claims), [&](int64_t begin, int64_t end, int) {
    int64_t first = 0;  // of the part's panels, counted over all parts
    ReadAhead ahead = of_all;
    for (const auto& part : parts) {
      const int64_t panel_begin = std::max(begin - first, int64_t{0}), panel_end = std::min(end - first, part.weight->num_panels);
      if (panel_begin < panel_end)
        linear_run(*part.weight, part.input, num_rows, y + part.first_column, ldy, panel_begin, panel_end, ahead);
      first += part.weight->num_panels;
      ahead.first_line += part.weight->num_panels * lines_ahead(*part.weight, num_rows);
    }
  });
  if (next_read == nullptr) return;
  for (const auto& part : parts) context.lines_read_ahead += part.weight->num_panels * lines_ahead(*part.weight, num_rows);
}

int64_t AnyLinearOp::weight_nbytes() const {
  int64_t nbytes = 0;
  for (const auto& part : parts) nbytes += part.weight->nbytes();
  return nbytes;
}

void LinearOp::run(RunContext& context) { run_parts(context, parts, context.counts.num_tokens, y, ldy, next_read); }

void RopeOp::run(RunContext& context) {
  const int64_t qkv_width = static_cast<int64_t>(row.num_heads + 2 * row.num_kv_heads) * row.head_dim;
  const int64_t q_width = static_cast<int64_t>(row.num_heads) * row.head_dim;
  const int64_t chunk = std::max<int64_t>(8, context.pool.even_chunk(context.counts.num_tokens));
  context.pool.parallel_for(context.counts.num_tokens, chunk, [&](int64_t begin, int64_t end, int) {
    RopeRow token = row;
    token.kv = &kv;
    for (int64_t t = begin; t < end; ++t) {
      token.qkv = qkv + t * qkv_width;
      token.q = q + t * q_width;
      token.slot = context.batch.slot_mapping[t];
      if (cos != nullptr) {
        const int64_t at = static_cast<int64_t>(context.batch.positions[t]) * row.rotary_half;
        token.cos = cos + at;
        token.sin = sin + at;
      }
      context.ops.rope_row(token);
    }
  });
}

void PickOp::run(RunContext& context) {
  const int64_t num_rows = context.counts.num_rows;
  for_each_row(context, num_rows, out, [&](int64_t row, float* to) {
    const int64_t token = context.batch.logit_rows[row];
    std::memcpy(to, x + token * out.width, out.width * sizeof(float));
    std::memcpy(picked_residual + row * residual_width, residual + token * residual_width, residual_width * sizeof(float));
  });
  context.counts.num_tokens = num_rows;
}

void LogitsOp::run(RunContext& context) {
  const int64_t num_rows = context.counts.num_tokens;
  run_parts(context, parts, num_rows, y, ldy);
  if (soft_cap <= 0.0f) return;
  constexpr int64_t kColumns = 4096;
  const int64_t per_row = ceil_div(ldy, kColumns);
  context.pool.parallel_for(num_rows * per_row, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t column = unit % per_row * kColumns;
      context.ops.soft_cap(y + unit / per_row * ldy + column, std::min(kColumns, ldy - column), soft_cap);
    }
  });
}

}  // namespace awq_cpu
