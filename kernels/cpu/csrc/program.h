// A recorded sequence of ops over one batch's buffers, replayed natively: the only thing a step costs Python is one call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "linear.h"
#include "ops.h"
#include "thread_pool.h"

namespace awq_cpu {

// How many rows this step has: of tokens, of sequences, of logits.
struct Counts {
  int64_t num_tokens = 0, num_sequences = 0, num_rows = 0;
};

// The buffers of a ForwardBatch (kernels/batch.py), at fixed addresses.
struct Batch {
  const int32_t* counts = nullptr;
  const int32_t* input_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* slot_mapping = nullptr;
  const int32_t* query_starts = nullptr;
  const int32_t* seq_lens = nullptr;
  const int32_t* block_tables = nullptr;  // [max_sequences][max_blocks]
  const int32_t* logit_rows = nullptr;
  int64_t max_tokens = 0, max_sequences = 0, max_blocks = 0, max_rows = 0;
};

// Where an op leaves its rows for a linear: packed for each layout that is wanted, or dense fp32 [rows][width].
struct RowOutput {
  struct Packed {
    ActivationLayout layout;
    void* data;
  };
  std::vector<Packed> packed;
  float* dense = nullptr;
  int64_t width = 0;
};

// Values of the batch that index memory, and what they must stay under; 0 where no op reads them.
struct Limits {
  int64_t vocab_size = 0, max_position = 0, num_slots = 0, num_blocks = 0, block_size = 0;
  bool attends = false, picks_rows = false;
  int64_t num_op_rows = INT64_MAX;  // of the shortest buffer that holds a row per token
  int64_t num_picked_rows = INT64_MAX;  // of the shortest that holds one per picked token
};

// Query tiles and key segments of one step, for one shape of attention: the same in all layers, so made once per run.
struct AttentionPlan {
  struct Unit {
    int32_t sequence, kv_head, first_query, num_queries, first_segment, num_segments;
    int64_t partials;  // offset in floats of this unit's partial results; -1: it finishes its rows itself
    int64_t cost;
  };
  struct Merge {  // of one token
    int64_t partials, kv_head_stride, segment_stride;
    int32_t num_segments;  // 0: nothing to merge
  };
  std::vector<Unit> units;
  std::vector<Merge> merges;  // per token, empty when nothing was split
  int64_t num_partial_floats = 0;
};

struct AttentionKey {
  int num_kv_heads, group, head_dim, window;
  bool operator<(const AttentionKey& other) const {
    return std::tie(num_kv_heads, group, head_dim, window) <
           std::tie(other.num_kv_heads, other.group, other.head_dim, other.window);
  }
};

struct AttentionOp;

// What an op sees of a run. `scratch(thread)` holds Program::require_scratch's floats.
struct RunContext {
  ThreadPool& pool;
  const OpsTable& ops;
  const Batch& batch;
  Counts counts;
  std::vector<AlignedBuffer>& scratch_buffers;
  std::map<AttentionKey, AttentionPlan>& plans;
  AlignedBuffer& partials;
  int64_t& num_experts_read;
  const std::vector<int32_t>& blocks_ahead;  // of all sequences, where the step only decodes; else empty
  int64_t lines_read_ahead = 0;              // of the next attention's cache

  float* scratch(int thread) { return reinterpret_cast<float*>(scratch_buffers[thread].data()); }
  const AttentionPlan& attention_plan(const AttentionKey& key);
  // For a linear that runs now. cache: its next_read.
  ReadAhead read_ahead(const KvCache* cache) const;
};

class Op {
 public:
  explicit Op(const char* kind) : kind(kind) {}
  virtual ~Op() = default;
  virtual void run(RunContext& context) = 0;
  const char* const kind;
};

// Sizes and addresses are the caller's to check (bindings.cpp does); values of the batch are checked here, at every run.
class Program {
 public:
  Program(std::shared_ptr<ThreadPool> pool, Batch batch) : pool_(std::move(pool)), batch_(batch) {}

  void add(std::unique_ptr<Op> op);
  void require_scratch(size_t num_floats) { scratch_floats_ = std::max(scratch_floats_, num_floats); }
  // A buffer that ops of this program share, one after the other.
  float* shared_rows(size_t num_floats);

  // Runs every op on `counts`. Throws std::out_of_range naming the buffer, entry, value and limit of a bad batch.
  void run(const Counts& counts);
  // The same with the counts that stand in the batch; returns them.
  Counts run_batch();

  const Batch& batch() const { return batch_; }
  const ThreadPool& pool() const { return *pool_; }
  Limits limits;
  bool profiling = false;
  std::map<std::string, double> seconds_by_kind;  // while profiling
  int64_t num_experts_read = 0;  // by all runs: an expert counts once for all tokens that a mixture computes at a time

 private:
  void check(const Counts& counts) const;
  void check_sequences(const Counts& counts) const;
  void read_ahead_of(const AttentionOp& attention);
  void list_blocks(const Counts& counts);

  std::shared_ptr<ThreadPool> pool_;
  Batch batch_;
  std::vector<std::unique_ptr<Op>> ops_;
  size_t scratch_floats_ = 0;
  std::vector<AlignedBuffer> scratch_buffers_;
  std::vector<AlignedBuffer> shared_buffers_;
  size_t shared_floats_ = 0;
  std::map<AttentionKey, AttentionPlan> plans_;
  AlignedBuffer partials_;
  std::vector<int32_t> blocks_ahead_;
};

// The table for the instruction set that the linears run with.
const OpsTable& current_ops();

// The ops. Row pointers are row-major, contiguous.
struct EmbedOp final : Op {
  EmbedOp() : Op("embed") {}
  void run(RunContext& context) override;
  const uint16_t* table;
  TableType type;
  float scale;
  int64_t width;
  float* out;
};

struct NormOp final : Op {
  NormOp() : Op("norm") {}
  void run(RunContext& context) override;
  const float* x;
  const float* residual;  // or null, like the two weights
  const float* x_weight;
  const float* weight;
  float eps, offset;
  float* total;
  RowOutput out;
};

struct ActivationOp final : Op {
  ActivationOp() : Op("activation") {}
  void run(RunContext& context) override;
  const float* gate_up;
  Activation activation;
  RowOutput out;
};

// Dense rows to packed ones, where no op before the linear could do it.
struct QuantizeOp final : Op {
  QuantizeOp() : Op("quantize") {}
  void run(RunContext& context) override;
  const float* x;
  RowOutput out;
};

struct LinearPart {
  const PackedLinear* weight;
  const void* input;
  int64_t first_column;
};

struct AnyLinearOp : Op {
  AnyLinearOp() : Op("linear") {}
  int64_t weight_nbytes() const;
  std::vector<LinearPart> parts;
  const KvCache* next_read = nullptr;  // what the next attention reads of every sequence, if this is to read it ahead
};

struct LinearOp final : AnyLinearOp {
  void run(RunContext& context) override;
  float* y;
  int64_t ldy;
};

// A linear of gates and ups side by side, and the activation of its result: where the layouts allow it, a few columns of some rows
// at a time, so that what is between never leaves the cache.
struct GatedLinearOp final : AnyLinearOp {
  void run(RunContext& context) override;
  int64_t unit_columns = 0;  // of the activation's output, computed together; 0: never
  ActivationOp activation;   // reads what the linear writes when the two go one after the other
 private:
  void run_units(RunContext& context, int64_t num_units, int64_t row_blocks);
};

constexpr int64_t kGatedRows = 64;  // of a unit: what the linear's kernels block by too

// Columns of a gated linear's output that end with a group of each packed layout and fill whole panels, or 0 where none do.
int64_t gated_unit_columns(const std::vector<LinearPart>& parts, const RowOutput& out);

struct RopeOp final : Op {
  RopeOp() : Op("rope") {}
  void run(RunContext& context) override;
  RopeRow row;  // all but the token's own pointers and slot
  const float* cos;
  const float* sin;
  const float* qkv;
  float* q;
  KvCache kv;
};

struct AttentionOp final : Op {
  AttentionOp() : Op("attention") {}
  void run(RunContext& context) override;
  const float* q;
  int num_heads;
  KvCache kv;
  float scale, soft_cap;
  int window;
  float* rows;  // dense result [num_tokens][num_heads * head_dim]
  RowOutput out;  // packed, or empty when `rows` is what was asked for
};

// The rows of the tokens that the batch picks. For the ops after this one they are the run's tokens.
struct PickOp final : Op {
  PickOp() : Op("pick") {}
  void run(RunContext& context) override;
  const float* x;
  const float* residual;
  int64_t residual_width;
  float* picked_residual;
  RowOutput out;
};

struct LogitsOp final : Op {
  LogitsOp() : Op("logits") {}
  void run(RunContext& context) override;
  std::vector<LinearPart> parts;
  float soft_cap;  // 0: none
  float* y;
  int64_t ldy;
};

// One linear's panels, shared by the pool. next_read: AnyLinearOp's.
void run_parts(RunContext& context, const std::vector<LinearPart>& parts, int64_t num_rows, float* y, int64_t ldy,
               const KvCache* next_read = nullptr);

}  // namespace awq_cpu
