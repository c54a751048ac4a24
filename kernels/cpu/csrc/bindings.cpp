// The Python module kernels.cpu._native. Everything that could make the library read or write where it should not is checked
// here: dtype, shape, contiguity, alignment and device of every array, and every size that one argument owes another.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "linear.h"
#include "machine.h"
#include "moe.h"
#include "program.h"
#include "sampling.h"

namespace nb = nanobind;
using namespace awq_cpu;

namespace {

using Array = nb::ndarray<nb::ro>;
using Outputs = std::vector<std::pair<ActivationLayout, Array>>;

enum class Dtype { kFloat32, kFloat16, kBfloat16, kInt8, kUint8, kInt32, kInt64, kBool };

struct DtypeName {
  Dtype dtype;
  nb::dlpack::dtype code;
  const char* name;
};

nb::dlpack::dtype make_dtype(nb::dlpack::dtype_code code, uint8_t bits) {
  return {static_cast<uint8_t>(code), bits, 1};
}

const DtypeName kDtypes[] = {
    {Dtype::kFloat32, make_dtype(nb::dlpack::dtype_code::Float, 32), "float32"},
    {Dtype::kFloat16, make_dtype(nb::dlpack::dtype_code::Float, 16), "float16"},
    {Dtype::kBfloat16, make_dtype(nb::dlpack::dtype_code::Bfloat, 16), "bfloat16"},
    {Dtype::kInt8, make_dtype(nb::dlpack::dtype_code::Int, 8), "int8"},
    {Dtype::kUint8, make_dtype(nb::dlpack::dtype_code::UInt, 8), "uint8"},
    {Dtype::kInt32, make_dtype(nb::dlpack::dtype_code::Int, 32), "int32"},
    {Dtype::kInt64, make_dtype(nb::dlpack::dtype_code::Int, 64), "int64"},
    {Dtype::kBool, make_dtype(nb::dlpack::dtype_code::Bool, 8), "bool"},
};

std::string dtype_name(Dtype dtype) {
  for (const auto& entry : kDtypes)
    if (entry.dtype == dtype) return entry.name;
  return "?";
}

std::string dtype_name(const nb::dlpack::dtype& code) {
  for (const auto& entry : kDtypes)
    if (entry.code == code) return entry.name;
  return "code " + std::to_string(code.code) + " with " + std::to_string(code.bits) + " bits";
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  return text + "]";
}

[[noreturn]] void type_error(const std::string& message) { throw nb::type_error(message.c_str()); }
[[noreturn]] void value_error(const std::string& message) { throw nb::value_error(message.c_str()); }

Dtype check_dtype(const char* name, const Array& array, std::initializer_list<Dtype> allowed) {
  std::string expected;
  for (const auto& entry : kDtypes) {
    for (Dtype dtype : allowed) {
      if (entry.dtype != dtype) continue;
      if (entry.code == array.dtype()) return dtype;
      expected += (expected.empty() ? "" : " or ") + dtype_name(dtype);
    }
  }
  type_error(std::string(name) + ": expected dtype " + expected + ", found " + dtype_name(array.dtype()));
}

// A size of -1 takes any. Rows are contiguous, in CPU memory.
void check_array(const char* name, const Array& array, const std::vector<int64_t>& shape) {
  if (array.device_type() != nb::device::cpu::value)
    value_error(std::string(name) + ": expected a tensor in CPU memory, found device type " + std::to_string(array.device_type()));
  std::vector<int64_t> found(array.ndim());
  for (size_t i = 0; i < array.ndim(); ++i) found[i] = static_cast<int64_t>(array.shape(i));
  bool matches = found.size() == shape.size();
  for (size_t i = 0; matches && i < shape.size(); ++i) matches = shape[i] < 0 || shape[i] == found[i];
  if (!matches) value_error(std::string(name) + ": expected shape " + shape_text(shape) + ", found " + shape_text(found));
  int64_t stride = 1;
  for (size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != stride)
      value_error(std::string(name) + ": expected a contiguous tensor, found stride " + std::to_string(array.stride(i)) +
                  " in dimension " + std::to_string(i) + " of shape " + shape_text(found));
    stride *= static_cast<int64_t>(array.shape(i));
  }
}

// Outputs and inputs come as the same read-only view; what is written is decided by the op.
template <class T>
T* data_of(const Array& array) {
  return const_cast<T*>(static_cast<const T*>(static_cast<const void*>(array.data())));
}

float* floats(const char* name, const Array& array, const std::vector<int64_t>& shape) {
  check_dtype(name, array, {Dtype::kFloat32});
  check_array(name, array, shape);
  return data_of<float>(array);
}

const int32_t* integers(const char* name, const Array& array, const std::vector<int64_t>& shape) {
  check_dtype(name, array, {Dtype::kInt32});
  check_array(name, array, shape);
  return data_of<int32_t>(array);
}

int64_t size_of(const Array& array, size_t dimension) {
  return dimension < array.ndim() ? static_cast<int64_t>(array.shape(dimension)) : 0;
}

void check_multiple(const char* name, int64_t value, int64_t unit) {
  if (value <= 0 || value % unit)
    value_error(std::string(name) + ": expected a positive multiple of " + std::to_string(unit) + ", found " + std::to_string(value));
}

void* packed_buffer(const char* name, const Array& array, const ActivationLayout& layout, int64_t rows) {
  check_dtype(name, array, {Dtype::kUint8});
  check_array(name, array, {-1});
  if (size_of(array, 0) < layout.nbytes(rows))
    value_error(std::string(name) + ": expected at least " + std::to_string(layout.nbytes(rows)) + " bytes for " +
                std::to_string(rows) + " rows, found " + std::to_string(size_of(array, 0)));
  if (reinterpret_cast<uintptr_t>(array.data()) % kAlignment)
    value_error(std::string(name) + ": expected memory aligned to " + std::to_string(kAlignment) + " bytes");
  return data_of<void>(array);
}

RowOutput row_output(const Outputs& packed, const std::optional<Array>& dense, int64_t rows, int64_t width) {
  RowOutput out;
  out.width = width;
  if (dense) out.dense = floats("dense", *dense, {rows, width});
  for (const auto& [layout, buffer] : packed) {
    if (layout.k != width)
      value_error("packed: expected a layout for " + std::to_string(width) + " channels, found " + std::to_string(layout.k));
    out.packed.push_back({layout, packed_buffer("packed", buffer, layout, rows)});
  }
  if (!dense && packed.empty()) value_error("packed: expected at least one output");
  return out;
}

FloatType float_type(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? FloatType::kFloat32 : dtype == Dtype::kFloat16 ? FloatType::kFloat16 : FloatType::kBFloat16;
}

Batch make_batch(const Array& counts, const Array& input_ids, const Array& positions, const Array& slot_mapping,
                 const Array& query_starts, const Array& seq_lens, const Array& block_tables, const Array& logit_rows) {
  Batch batch;
  batch.max_tokens = size_of(input_ids, 0);
  batch.max_sequences = size_of(seq_lens, 0);
  batch.max_blocks = size_of(block_tables, 1);
  batch.max_rows = size_of(logit_rows, 0);
  batch.counts = integers("counts", counts, {3});
  batch.input_ids = integers("input_ids", input_ids, {-1});
  batch.positions = integers("positions", positions, {batch.max_tokens});
  batch.slot_mapping = integers("slot_mapping", slot_mapping, {batch.max_tokens});
  batch.query_starts = integers("query_starts", query_starts, {batch.max_sequences + 1});
  batch.seq_lens = integers("seq_lens", seq_lens, {-1});
  batch.block_tables = integers("block_tables", block_tables, {batch.max_sequences, -1});
  batch.logit_rows = integers("logit_rows", logit_rows, {-1});
  return batch;
}

KvCache make_kv(const Array& keys, const Array& values, const std::optional<Array>& key_scales,
                const std::optional<Array>& value_scales) {
  KvCache kv;
  const Dtype dtype = check_dtype("keys", keys, {Dtype::kFloat16, Dtype::kInt8});
  check_dtype("values", values, {dtype});
  check_array("keys", keys, {-1, -1, -1, -1});
  const int64_t blocks = size_of(keys, 0), heads = size_of(keys, 1), head_dim = size_of(keys, 2), block_size = size_of(keys, 3);
  check_array("values", values, {blocks, heads, block_size, head_dim});
  check_multiple("head_dim", head_dim, 8);
  check_multiple("block_size", block_size, 8);
  if (head_dim > 1024) value_error("head_dim: expected at most 1024, found " + std::to_string(head_dim));
  if (heads < 1) value_error("num_kv_heads: expected at least 1, found 0");
  if (blocks * block_size > INT32_MAX) value_error("keys: expected at most 2147483647 slots, found " + std::to_string(blocks * block_size));
  kv.type = dtype == Dtype::kInt8 ? KvType::kInt8 : KvType::kHalf;
  if (kv.type == KvType::kInt8) {
    if (!key_scales || !value_scales) value_error("key_scales, value_scales: int8 needs both");
    kv.key_scales = floats("key_scales", *key_scales, {blocks, heads, block_size});
    kv.value_scales = floats("value_scales", *value_scales, {blocks, heads, block_size});
  }
  kv.keys = data_of<void>(keys);
  kv.values = data_of<void>(values);
  kv.num_blocks = static_cast<int>(blocks);
  kv.num_kv_heads = static_cast<int>(heads);
  kv.head_dim = static_cast<int>(head_dim);
  kv.block_size = static_cast<int>(block_size);
  return kv;
}

// A cache keeps the tensors it points into alive. (The buffers of ops are kept by whoever hands them out: kernels/cpu/backend.py.)
struct KvCacheObject {
  KvCache kv;
  std::vector<Array> tensors;
};

void limit_kv(Program& program, const KvCache& kv) {
  auto& limits = program.limits;
  const int64_t slots = static_cast<int64_t>(kv.num_blocks) * kv.block_size;
  if (limits.block_size && limits.block_size != kv.block_size)
    value_error("block_size: expected " + std::to_string(limits.block_size) + " as in the program's other caches, found " +
                std::to_string(kv.block_size));
  limits.block_size = kv.block_size;
  limits.num_slots = limits.num_slots ? std::min(limits.num_slots, slots) : slots;
  limits.num_blocks = limits.num_blocks ? std::min<int64_t>(limits.num_blocks, kv.num_blocks) : kv.num_blocks;
}

void narrow(int64_t& limit, int64_t value) { limit = limit ? std::min(limit, value) : value; }

// Every buffer of an op has been checked to have as many rows as its first.
void add_op(Program& program, std::unique_ptr<Op> op, int64_t rows) {
  int64_t& limit = program.limits.picks_rows ? program.limits.num_picked_rows : program.limits.num_op_rows;
  limit = std::min(limit, rows);
  program.add(std::move(op));
}

void need_batch(const Program& program) {
  if (program.batch().counts == nullptr) value_error("batch: needed here, and the program was made without");
}

void need_batch_of_tokens(const Program& program) {
  need_batch(program);
  if (program.limits.picks_rows) value_error("batch: rows have been picked from it; no op may read it after that");
}

void add_embed(Program& program, const Array& table, float scale, const Array& out) {
  need_batch_of_tokens(program);
  const Dtype dtype = check_dtype("table", table, {Dtype::kFloat16, Dtype::kBfloat16});
  check_array("table", table, {-1, -1});
  auto op = std::make_unique<EmbedOp>();
  op->table = data_of<uint16_t>(table);
  op->type = dtype == Dtype::kFloat16 ? TableType::kHalf : TableType::kBfloat;
  op->scale = scale;
  op->width = size_of(table, 1);
  op->out = floats("out", out, {program.batch().max_tokens, op->width});
  narrow(program.limits.vocab_size, size_of(table, 0));
  add_op(program, std::move(op), program.batch().max_tokens);
}

void add_norm(Program& program, const Array& x, const std::optional<Array>& residual, const std::optional<Array>& x_weight,
              const std::optional<Array>& weight, float eps, bool unit_offset, const Array& total, const Outputs& packed,
              const std::optional<Array>& dense) {
  const int64_t rows = size_of(x, 0), width = size_of(x, 1);
  auto op = std::make_unique<NormOp>();
  op->x = floats("x", x, {-1, -1});
  check_multiple("x: hidden size", width, 8);
  op->residual = residual ? floats("residual", *residual, {rows, width}) : nullptr;
  op->x_weight = x_weight ? floats("x_weight", *x_weight, {width}) : nullptr;
  op->weight = weight ? floats("weight", *weight, {width}) : nullptr;
  op->eps = eps;
  op->offset = unit_offset ? 1.0f : 0.0f;
  op->total = floats("total", total, {rows, width});
  op->out = row_output(packed, dense, rows, width);
  program.require_scratch(kTileRows * width);
  add_op(program, std::move(op), rows);
}

void add_quantize(Program& program, const Array& x, const Outputs& packed) {
  auto op = std::make_unique<QuantizeOp>();
  op->x = floats("x", x, {-1, -1});
  op->out = row_output(packed, std::nullopt, size_of(x, 0), size_of(x, 1));
  add_op(program, std::move(op), size_of(x, 0));
}

// Weights with what they read, side by side along N; `inputs[i]` is in the layout of `weights[i]`.
std::vector<LinearPart> linear_parts(const std::vector<std::shared_ptr<PackedLinear>>& weights, const std::vector<Array>& inputs,
                                     int64_t rows) {
  if (weights.empty() || weights.size() != inputs.size())
    value_error("inputs: expected one per weight, found " + std::to_string(inputs.size()) + " for " + std::to_string(weights.size()));
  std::vector<LinearPart> parts;
  int64_t column = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    parts.push_back({weights[i].get(), packed_buffer("inputs", inputs[i], weights[i]->activations, rows), column});
    column += weights[i]->out_features;
  }
  return parts;
}

int64_t total_columns(const std::vector<LinearPart>& parts) {
  return parts.back().first_column + parts.back().weight->out_features;
}

void add_linear(Program& program, const std::vector<std::shared_ptr<PackedLinear>>& weights, const std::vector<Array>& inputs,
                const Array& y) {
  auto op = std::make_unique<LinearOp>();
  op->parts = linear_parts(weights, inputs, size_of(y, 0));
  op->ldy = total_columns(op->parts);
  op->y = floats("y", y, {-1, op->ldy});
  add_op(program, std::move(op), size_of(y, 0));
}

Activation activation_of(const std::string& name) {
  if (name != "silu" && name != "gelu_tanh") value_error("activation: expected silu or gelu_tanh, found " + name);
  return name == "silu" ? Activation::kSilu : Activation::kGeluTanh;
}

void add_gated_linear(Program& program, const std::vector<std::shared_ptr<PackedLinear>>& weights, const std::vector<Array>& inputs,
                      const Array& gate_up, const std::string& activation, const Outputs& packed, const std::optional<Array>& dense) {
  const int64_t rows = size_of(gate_up, 0);
  auto op = std::make_unique<GatedLinearOp>();
  op->parts = linear_parts(weights, inputs, rows);
  ActivationOp& act = op->activation;
  act.gate_up = floats("gate_up", gate_up, {-1, total_columns(op->parts)});
  check_multiple("gate_up: columns", size_of(gate_up, 1), 16);
  act.activation = activation_of(activation);
  act.out = row_output(packed, dense, rows, size_of(gate_up, 1) / 2);
  op->unit_columns = gated_unit_columns(op->parts, op->activation.out);
  program.require_scratch(std::max(kTileRows * op->activation.out.width, kGatedRows * 2 * op->unit_columns));
  add_op(program, std::move(op), rows);
}

using Weights = std::vector<std::shared_ptr<PackedLinear>>;

// inputs: all tokens' rows in every layout that an expert's gate_up reads. experts: the parts of gate_up, and down.
void add_moe(Program& program, const Weights& router, const std::vector<Array>& router_inputs, const Outputs& inputs,
             const std::vector<std::pair<Weights, std::shared_ptr<PackedLinear>>>& experts, int64_t num_active, bool renormalize,
             bool shared, const std::string& activation, const Array& y) {
  const int64_t rows = size_of(y, 0), num_experts = static_cast<int64_t>(experts.size()), routed = num_experts - (shared ? 1 : 0);
  if (num_active < 1 || num_active > routed)
    value_error("num_active: expected 1.." + std::to_string(routed) + " experts, found " + std::to_string(num_active));
  auto op = std::make_unique<MoeOp>();
  op->num_active = num_active;
  op->renormalize = renormalize;
  op->shared = shared;
  op->activation = activation_of(activation);
  op->out_width = size_of(y, 1);
  op->y = floats("y", y, {-1, -1});
  op->router = linear_parts(router, router_inputs, rows);
  if (total_columns(op->router) != num_experts)
    value_error("router: expected " + std::to_string(num_experts) + " outputs, found " + std::to_string(total_columns(op->router)));
  for (const auto& [layout, buffer] : inputs)
    op->inputs.push_back({layout, static_cast<const uint8_t*>(packed_buffer("inputs", buffer, layout, rows))});
  for (const auto& [gate_up, down] : experts) {
    MoeExpert expert;
    int64_t columns = 0;
    for (const auto& weight : gate_up) {
      const auto found = std::find_if(op->inputs.begin(), op->inputs.end(),
                                      [&](const MoeOp::Input& input) { return input.layout == weight->activations; });
      if (found == op->inputs.end()) value_error("inputs: none is in the layout that an expert takes");
      expert.gate_up.push_back({weight.get(), found - op->inputs.begin(), columns});
      columns += weight->out_features;
    }
    check_multiple("gate_up: columns", columns, 16);
    expert.down = down.get();
    expert.width = columns / 2;
    if (down->in_features != expert.width || down->out_features != op->out_width)
      value_error("down: expected [" + std::to_string(op->out_width) + ", " + std::to_string(expert.width) + "], found [" +
                  std::to_string(down->out_features) + ", " + std::to_string(down->in_features) + "]");
    op->experts.push_back(std::move(expert));
  }
  op->memory = reinterpret_cast<uint8_t*>(program.shared_rows(op->plan(rows)));
  program.require_scratch(op->scratch_floats());
  add_op(program, std::move(op), rows);
}

// A norm's weight over each head, or over all of them together; says over how many.
const float* head_norm(const char* name, const Array& weight, int num_heads, int64_t head_dim, int& span) {
  span = size_of(weight, 0) == head_dim ? 1 : num_heads;
  return floats(name, weight, {span * head_dim});
}

void add_rope(Program& program, const Array& qkv, int num_heads, const KvCacheObject& cache, const std::optional<Array>& q_weight,
              const std::optional<Array>& k_weight, float eps, bool unit_offset, const std::optional<Array>& cos,
              const std::optional<Array>& sin, const Array& q) {
  need_batch_of_tokens(program);
  const KvCache& kv = cache.kv;
  if (num_heads < 1 || num_heads % kv.num_kv_heads)
    value_error("num_heads: expected a multiple of " + std::to_string(kv.num_kv_heads) + " KV heads, found " + std::to_string(num_heads));
  const int64_t rows = size_of(qkv, 0), head_dim = kv.head_dim;
  auto op = std::make_unique<RopeOp>();
  op->qkv = floats("qkv", qkv, {-1, (num_heads + 2 * kv.num_kv_heads) * head_dim});
  op->q = floats("q", q, {rows, num_heads, head_dim});
  op->kv = kv;
  op->row = {};
  op->row.num_heads = num_heads;
  op->row.num_kv_heads = kv.num_kv_heads;
  op->row.head_dim = kv.head_dim;
  if (q_weight.has_value() != k_weight.has_value()) value_error("q_weight, k_weight: expected both or neither");
  op->row.q_span = op->row.k_span = 1;
  op->row.q_weight = q_weight ? head_norm("q_weight", *q_weight, num_heads, head_dim, op->row.q_span) : nullptr;
  op->row.k_weight = k_weight ? head_norm("k_weight", *k_weight, kv.num_kv_heads, head_dim, op->row.k_span) : nullptr;
  op->row.eps = eps;
  op->row.unit_offset = unit_offset ? 1.0f : 0.0f;
  op->cos = op->sin = nullptr;
  if (cos.has_value() != sin.has_value()) value_error("cos, sin: expected both or neither");
  if (cos) {
    op->cos = floats("cos", *cos, {-1, -1});
    op->sin = floats("sin", *sin, {size_of(*cos, 0), size_of(*cos, 1)});
    op->row.rotary_half = static_cast<int>(size_of(*cos, 1));
    if (2 * op->row.rotary_half > head_dim)
      value_error("cos: expected at most " + std::to_string(head_dim / 2) + " columns, found " + std::to_string(op->row.rotary_half));
    narrow(program.limits.max_position, size_of(*cos, 0));
  }
  limit_kv(program, kv);
  add_op(program, std::move(op), rows);
}

void add_attention(Program& program, const Array& q, const KvCacheObject& cache, float scale, int window, float soft_cap,
                   const Outputs& packed, const std::optional<Array>& dense) {
  need_batch_of_tokens(program);
  const KvCache& kv = cache.kv;
  const int64_t rows = size_of(q, 0), num_heads = size_of(q, 1);
  auto op = std::make_unique<AttentionOp>();
  op->q = floats("q", q, {-1, -1, kv.head_dim});
  if (num_heads < 1 || num_heads % kv.num_kv_heads)
    value_error("q: expected a multiple of " + std::to_string(kv.num_kv_heads) + " heads, found " + std::to_string(num_heads));
  if (window < 0) value_error("window: expected 0 (none) or more, found " + std::to_string(window));
  op->num_heads = static_cast<int>(num_heads);
  op->kv = kv;
  op->scale = scale;
  op->soft_cap = soft_cap;
  op->window = window;
  op->out = row_output(packed, dense, rows, num_heads * kv.head_dim);
  op->rows = dense ? op->out.dense : program.shared_rows(rows * num_heads * kv.head_dim);
  const int group = static_cast<int>(num_heads) / kv.num_kv_heads;
  program.require_scratch(attention_scratch_floats(std::max(group, kQueryRows), kv.head_dim));
  limit_kv(program, kv);
  program.limits.attends = true;
  add_op(program, std::move(op), rows);
}

void add_pick_rows(Program& program, const Array& x, const Array& residual, const Array& picked_residual, const Outputs& packed,
                   const std::optional<Array>& dense) {
  need_batch_of_tokens(program);
  const int64_t tokens = size_of(x, 0), width = size_of(x, 1), rows = size_of(picked_residual, 0);
  auto op = std::make_unique<PickOp>();
  op->x = floats("x", x, {-1, -1});
  op->residual = floats("residual", residual, {tokens, -1});
  op->residual_width = size_of(residual, 1);
  op->picked_residual = floats("picked_residual", picked_residual, {-1, op->residual_width});
  op->out = row_output(packed, dense, rows, width);
  program.require_scratch(kTileRows * width);
  program.limits.num_op_rows = std::min(program.limits.num_op_rows, tokens);
  program.limits.picks_rows = true;
  add_op(program, std::move(op), rows);
}

void add_logits(Program& program, const std::vector<std::shared_ptr<PackedLinear>>& weights, const std::vector<Array>& inputs,
                float soft_cap, const Array& y) {
  const int64_t rows = size_of(y, 0);
  auto op = std::make_unique<LogitsOp>();
  op->parts = linear_parts(weights, inputs, rows);
  op->soft_cap = soft_cap;
  op->ldy = total_columns(op->parts);
  op->y = floats("y", y, {rows, op->ldy});
  add_op(program, std::move(op), rows);
}

// How each row is sampled, in buffers that are checked once: taking seven arrays anew in every step costs more than a greedy row.
struct SamplingBuffers {
  SamplingBuffers(const Array& temperature, const Array& top_k, const Array& top_p, const Array& min_p, const Array& typical_p,
                  const Array& seed, const Array& index)
      : max_rows(size_of(temperature, 0)), kept{temperature, top_k, top_p, min_p, typical_p, seed, index} {
    parameters.temperature = floats("temperature", temperature, {max_rows});
    parameters.top_k = integers("top_k", top_k, {max_rows});
    parameters.top_p = floats("top_p", top_p, {max_rows});
    parameters.min_p = floats("min_p", min_p, {max_rows});
    parameters.typical_p = floats("typical_p", typical_p, {max_rows});
    check_array("seed", seed, {max_rows});
    check_dtype("seed", seed, {Dtype::kInt64});
    check_array("index", index, {max_rows});
    check_dtype("index", index, {Dtype::kInt64});
    parameters.seed = data_of<int64_t>(seed);
    parameters.index = data_of<int64_t>(index);
  }

  int64_t max_rows;
  SamplingParameters parameters;
  std::vector<Array> kept;  // what the parameters point into
};

void sample(ThreadPool& pool, const Array& logits, const SamplingBuffers& buffers, const Array& token_ids, const Array& finite) {
  const int64_t rows = size_of(logits, 0), vocab_size = size_of(logits, 1);
  const float* values = floats("logits", logits, {-1, -1});
  if (vocab_size < 1) value_error("logits: expected at least 1 column, found 0");
  if (rows > buffers.max_rows)
    value_error("logits: expected at most " + std::to_string(buffers.max_rows) + " rows, found " + std::to_string(rows));
  integers("token_ids", token_ids, {rows});
  check_array("finite", finite, {rows});
  check_dtype("finite", finite, {Dtype::kBool});
  nb::gil_scoped_release release;
  sample_rows(pool, current_ops(), values, rows, vocab_size, buffers.parameters, data_of<int32_t>(token_ids),
              data_of<bool>(finite));
}

ActivationMode activation_mode(const std::string& name) {
  if (name == "int8") return ActivationMode::kInt8;
  if (name == "int16") return ActivationMode::kInt16;
  value_error("activations: expected int8 or int16, found " + name);
}

const float* optional_bias(const std::optional<Array>& bias, int64_t columns) {
  return bias ? floats("bias", *bias, {columns}) : nullptr;
}

std::shared_ptr<PackedLinear> bind_pack_awq(const std::vector<std::tuple<Array, Array, Array>>& parts, int64_t group_size,
                                            const std::string& activations, const std::optional<Array>& bias) {
  if (parts.empty()) value_error("parts: expected at least one");
  const int64_t k = size_of(std::get<0>(parts[0]), 0);
  if (group_size <= 0 || k <= 0 || k % group_size)
    value_error("group_size: expected a divisor of " + std::to_string(k) + " input features, found " + std::to_string(group_size));
  std::vector<AwqPart> native;
  int64_t columns = 0;
  const Dtype scale_type = check_dtype("scales", std::get<2>(parts[0]), {Dtype::kFloat16, Dtype::kBfloat16});
  for (const auto& [qweight, qzeros, scales] : parts) {
    const int64_t words = size_of(qweight, 1), groups = k / group_size;
    check_dtype("scales", scales, {scale_type});
    check_array("scales", scales, {groups, words * 8});
    native.push_back({integers("qweight", qweight, {k, -1}), integers("qzeros", qzeros, {groups, words}), data_of<uint16_t>(scales),
                      words * 8});
    columns += words * 8;
  }
  const float* bias_values = optional_bias(bias, columns);
  const ActivationMode mode = activation_mode(activations);
  nb::gil_scoped_release release;
  return std::make_shared<PackedLinear>(pack_awq(native, k, group_size, float_type(scale_type), mode, bias_values));
}

std::shared_ptr<PackedLinear> bind_pack_dense(const std::vector<Array>& parts, const std::string& type,
                                              const std::string& activations, const std::optional<Array>& bias) {
  if (parts.empty()) value_error("parts: expected at least one");
  const int64_t k = size_of(parts[0], 1);
  const Dtype dtype = check_dtype("weight", parts[0], {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBfloat16});
  std::vector<DensePart> native;
  int64_t columns = 0;
  for (const Array& weight : parts) {
    check_dtype("weight", weight, {dtype});
    check_array("weight", weight, {-1, k});
    native.push_back({data_of<void>(weight), size_of(weight, 0)});
    columns += size_of(weight, 0);
  }
  if (k < 1 || columns < 1) value_error("weight: expected at least one input and one output feature");
  const float* bias_values = optional_bias(bias, columns);
  if (type == "dense") {
    nb::gil_scoped_release release;
    return std::make_shared<PackedLinear>(pack_dense(native, k, float_type(dtype), bias_values));
  }
  if (type == "int8") {
    nb::gil_scoped_release release;
    return std::make_shared<PackedLinear>(pack_int8(native, k, float_type(dtype), bias_values));
  }
  if (type != "int4") value_error("type: expected dense, int8 or int4, found " + type);
  const ActivationMode mode = activation_mode(activations);
  nb::gil_scoped_release release;
  return std::make_shared<PackedLinear>(pack_int4(native, k, float_type(dtype), mode, bias_values));
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels. Use kernels.cpu.backend, which owns the buffers that programs point into.";
  m.def("current_isa", &current_isa);
  m.def("available_isas", &available_isas);
  m.def("select_isa", &select_isa, nb::arg("name"));
  m.def("uniform", &uniform, nb::arg("seed"), nb::arg("index"));

  m.def("measure_clock", &measure_clock, nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>());
  m.def("measure_integer_peak", &measure_integer_peak, nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>());
  m.def("measure_read_bandwidth", [](ThreadPool& pool, const Array& data, double seconds) {
    check_array("data", data, {-1});
    if (size_of(data, 0) < 1 || (check_dtype("data", data, {Dtype::kUint8}), reinterpret_cast<uintptr_t>(data.data()) % kAlignment))
      value_error("data: expected a byte or more in memory aligned to " + std::to_string(kAlignment) + " bytes");
    const int64_t nbytes = size_of(data, 0);
    const void* bytes = data.data();
    nb::gil_scoped_release release;
    return measure_read_bandwidth(pool, bytes, nbytes, seconds);
  }, nb::arg("pool"), nb::arg("data"), nb::arg("seconds"));

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), nb::arg("num_threads"))
      .def_prop_ro("num_threads", &ThreadPool::num_threads);

  nb::class_<ActivationLayout>(m, "ActivationLayout")
      .def_prop_ro("mode", [](const ActivationLayout& layout) {
        return layout.mode == ActivationMode::kInt8 ? "int8" : layout.mode == ActivationMode::kInt16 ? "int16" : "float32";
      })
      .def_ro("k", &ActivationLayout::k)
      .def("nbytes", &ActivationLayout::nbytes, nb::arg("rows"))
      .def("__eq__", [](const ActivationLayout& a, const ActivationLayout& b) { return a == b; })
      .def("dequantize", [](const ActivationLayout& layout, const Array& packed, const Array& out) {
        const int64_t rows = size_of(out, 0);
        float* values = floats("out", out, {-1, layout.k});
        dequantize_rows(layout, packed_buffer("packed", packed, layout, rows), 0, rows, values, layout.k);
      }, nb::arg("packed"), nb::arg("out"));

  nb::class_<PackedLinear>(m, "PackedLinear")
      .def_ro("in_features", &PackedLinear::in_features)
      .def_ro("out_features", &PackedLinear::out_features)
      .def_ro("num_panels", &PackedLinear::num_panels)
      .def_prop_ro("nbytes", &PackedLinear::nbytes)
      .def_prop_ro("activations", [](const PackedLinear& weight) { return weight.activations; })
      .def("unpack", [](const PackedLinear& weight, const Array& out) {
        unpack_weight(weight, floats("out", out, {weight.out_features, weight.in_features}));
      }, nb::arg("out"))
      .def("run", [](const PackedLinear& weight, const Array& packed, const Array& y, int64_t panel_begin, int64_t panel_end) {
        const int64_t rows = size_of(y, 0);
        float* values = floats("y", y, {-1, weight.out_features});
        if (panel_begin < 0 || panel_end > weight.num_panels || panel_begin > panel_end)
          value_error("panel_begin, panel_end: expected a range within 0.." + std::to_string(weight.num_panels) + ", found " +
                      std::to_string(panel_begin) + ".." + std::to_string(panel_end));
        const void* input = packed_buffer("packed", packed, weight.activations, rows);
        nb::gil_scoped_release release;
        linear_run(weight, input, rows, values, weight.out_features, panel_begin, panel_end);
      }, nb::arg("packed"), nb::arg("y"), nb::arg("panel_begin"), nb::arg("panel_end"));

  m.def("pack_awq", &bind_pack_awq, nb::arg("parts"), nb::arg("group_size"), nb::arg("activations"),
        nb::arg("bias") = nb::none());
  m.def("pack_dense", &bind_pack_dense, nb::arg("parts"), nb::arg("type"), nb::arg("activations"), nb::arg("bias") = nb::none());

  nb::class_<KvCacheObject>(m, "KvCache")
      .def("__init__", [](KvCacheObject* self, const Array& keys, const Array& values, const std::optional<Array>& key_scales,
                          const std::optional<Array>& value_scales) {
        const KvCache kv = make_kv(keys, values, key_scales, value_scales);
        new (self) KvCacheObject{kv, {keys, values}};
        if (key_scales) self->tensors.push_back(*key_scales);
        if (value_scales) self->tensors.push_back(*value_scales);
      }, nb::arg("keys"), nb::arg("values"), nb::arg("key_scales") = nb::none(), nb::arg("value_scales") = nb::none());

  nb::class_<Program>(m, "Program")
      .def("__init__", [](Program* self, std::shared_ptr<ThreadPool> pool) { new (self) Program(std::move(pool), Batch{}); },
           nb::arg("pool"))
      .def("__init__", [](Program* self, std::shared_ptr<ThreadPool> pool, const Array& counts, const Array& input_ids,
                          const Array& positions, const Array& slot_mapping, const Array& query_starts, const Array& seq_lens,
                          const Array& block_tables, const Array& logit_rows) {
        new (self) Program(std::move(pool), make_batch(counts, input_ids, positions, slot_mapping, query_starts, seq_lens,
                                                       block_tables, logit_rows));
      }, nb::arg("pool"), nb::arg("counts"), nb::arg("input_ids"), nb::arg("positions"), nb::arg("slot_mapping"),
           nb::arg("query_starts"), nb::arg("seq_lens"), nb::arg("block_tables"), nb::arg("logit_rows"))
      .def("embed", &add_embed, nb::arg("table"), nb::arg("scale"), nb::arg("out"))
      .def("add_rms_norm", &add_norm, nb::arg("x"), nb::arg("residual").none(), nb::arg("x_weight").none(),
           nb::arg("weight").none(), nb::arg("eps"), nb::arg("unit_offset"), nb::arg("total"), nb::arg("packed"), nb::arg("dense").none())
      .def("quantize", &add_quantize, nb::arg("x"), nb::arg("packed"))
      .def("linear", &add_linear, nb::arg("weights"), nb::arg("inputs"), nb::arg("y"))
      .def("gated_linear", &add_gated_linear, nb::arg("weights"), nb::arg("inputs"), nb::arg("gate_up"), nb::arg("activation"),
           nb::arg("packed"), nb::arg("dense").none())
      .def("moe", &add_moe, nb::arg("router"), nb::arg("router_inputs"), nb::arg("inputs"), nb::arg("experts"), nb::arg("num_active"),
           nb::arg("renormalize"), nb::arg("shared"), nb::arg("activation"), nb::arg("y"))
      .def("rope_and_store", &add_rope, nb::arg("qkv"), nb::arg("num_heads"), nb::arg("kv"), nb::arg("q_weight").none(),
           nb::arg("k_weight").none(), nb::arg("eps"), nb::arg("unit_offset"), nb::arg("cos").none(), nb::arg("sin").none(),
           nb::arg("q"))
      .def("attention", &add_attention, nb::arg("q"), nb::arg("kv"), nb::arg("scale"), nb::arg("window"), nb::arg("soft_cap"),
           nb::arg("packed"), nb::arg("dense").none())
      .def("pick_rows", &add_pick_rows, nb::arg("x"), nb::arg("residual"), nb::arg("picked_residual"), nb::arg("packed"),
           nb::arg("dense").none())
      .def("logits", &add_logits, nb::arg("weights"), nb::arg("inputs"), nb::arg("soft_cap"), nb::arg("y"))
      .def("run_batch", [](Program& program) {
        need_batch(program);
        Counts counts;
        {
          nb::gil_scoped_release release;
          counts = program.run_batch();
        }
        return counts.num_rows;
      })
      .def("run", [](Program& program, int64_t num_tokens, int64_t num_sequences, int64_t num_rows) {
        nb::gil_scoped_release release;
        program.run({num_tokens, num_sequences, num_rows});
      }, nb::arg("num_tokens"), nb::arg("num_sequences") = 0, nb::arg("num_rows") = 0)
      .def_rw("profiling", &Program::profiling)
      .def_ro("num_experts_read", &Program::num_experts_read)
      .def_prop_ro("seconds_by_kind", [](const Program& program) {
        nb::dict result;
        for (const auto& [kind, seconds] : program.seconds_by_kind) result[kind.c_str()] = seconds;
        return result;
      });

  nb::class_<SamplingBuffers>(m, "SamplingBuffers")
      .def(nb::init<const Array&, const Array&, const Array&, const Array&, const Array&, const Array&, const Array&>(),
           nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("typical_p"), nb::arg("seed"),
           nb::arg("index"));
  m.def("sample", &sample, nb::arg("pool"), nb::arg("logits"), nb::arg("buffers"), nb::arg("token_ids"), nb::arg("finite"));
}
