// What one step needs besides its linears, as plain functions on rows: one table per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace awq_cpu {

enum class Activation : int { kSilu, kGeluTanh };
enum class TableType : int { kHalf, kBfloat };
enum class KvType : int { kHalf, kInt8 };

constexpr int kKeyBlock = 64;     // keys per step of the online softmax, aligned to position 0
constexpr int kKeySegment = 256;  // keys whose partial softmax is computed on its own; segments are merged in order
constexpr int kQueryRows = 48;    // (token, head) rows that an attention tile aims at

// One layer's pool. Keys [num_blocks][num_kv_heads][head_dim][block_size], so that a dot product runs over eight keys at a
// time; values [num_blocks][num_kv_heads][block_size][head_dim]; with int8 one fp32 scale per token and KV head,
// [num_blocks][num_kv_heads][block_size]. block_size and head_dim are multiples of 8.
struct KvCache {
  KvType type = KvType::kHalf;
  void* keys = nullptr;
  void* values = nullptr;
  float* key_scales = nullptr;
  float* value_scales = nullptr;
  int num_blocks = 0, block_size = 0, num_kv_heads = 0, head_dim = 0;
};

// Rotation, normalization and storage of one token's heads. cos and sin are the token's table rows; null leaves positions out.
struct RopeRow {
  const float* qkv;  // [q heads + 2 kv heads][head_dim]
  float* q;          // [q heads][head_dim]
  int num_heads, num_kv_heads, head_dim, rotary_half;
  const float* cos;
  const float* sin;
  const float* q_weight;  // null: no qk-norm
  const float* k_weight;
  int q_span, k_span;     // heads that are normed together: 1, or all
  float eps, unit_offset;  // unit_offset 1 multiplies by 1 + weight
  int32_t slot;
  const KvCache* kv;
};

// One tile of query tokens of one sequence against one KV head, over a range of key segments.
struct AttentionTask {
  const float* q;  // the tile's first token, first query head of the group: rows at q_stride per token, head_dim per head
  int64_t q_stride;
  int num_tokens, group;    // group: query heads per KV head
  int first_position;       // of the tile's first token
  int kv_head;
  int num_keys;             // of the sequence, this step's included
  const int32_t* block_table;
  int first_segment, num_segments;
  const KvCache* kv;
  float scale, soft_cap;    // soft_cap 0: none
  int window;               // 0: none
  float* output;            // as q, when partials is null: the finished rows
  int64_t output_stride;
  const AttentionTask* next;  // what the same thread computes next, where it is known: its first keys are fetched ahead
  float* partials;          // else [num_segments][num_tokens * group][head_dim + kPartialExtra]: accumulator, maximum, sum
};
constexpr int kPartialExtra = 8;

struct OpsTable {
  const char* name;
  void (*embed_row)(const uint16_t* row, TableType type, float scale, int64_t n, float* out);
  // total = x + residual (residual may be null, total may be x), or with x_weight x / rms(x) * (offset + x_weight) + residual;
  // out = total / rms(total) * (offset + weight), or total where weight is null
  void (*norm_row)(const float* x, const float* residual, const float* x_weight, const float* weight, float eps, float offset,
                   int64_t n, float* total, float* out);
  void (*act_and_mul_row)(const float* gate, const float* up, Activation activation, int64_t n, float* out);
  void (*rope_row)(const RopeRow& row);
  void (*attend)(const AttentionTask& task, float* scratch);
  // Folds num_segments partials, `stride` floats apart, in order; writes head_dim floats.
  void (*merge_partials)(const float* partials, int num_segments, int64_t stride, int head_dim, float* out);
  void (*soft_cap)(float* x, int64_t n, float cap);
  // The lowest index among the largest values; *finite says whether that is finite and no value is a NaN.
  int64_t (*argmax)(const float* x, int64_t n, bool* finite);
  // The largest of each 64 values, the last few included: ceil(n / 64) of them.
  void (*chunk_maxima)(const float* x, int64_t n, float* maxima);
  // scores[i] = x[i] / temperature; mass[i] = exp(scores[i] - maximum), 0 where under min_p.
  void (*exponentials)(const float* x, int64_t n, float temperature, float maximum, float min_p, float* scores, float* mass);
};

// Floats of scratch that `attend` needs per thread.
constexpr int kScratchSkew = 208;
inline size_t attention_scratch_floats(int rows, int head_dim) {
  return static_cast<size_t>(rows) * (3 * head_dim + 8 + 6) + 3 * kScratchSkew;
}

const OpsTable& ops_generic();
const OpsTable& ops_avx2();

}  // namespace awq_cpu
