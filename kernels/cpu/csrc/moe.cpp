#include "moe.h"

#include <algorithm>
#include <cmath>

namespace awq_cpu {
namespace {

// More tokens are computed so many at a time: what is between an expert's linears would take memory for every token of every expert.
constexpr int64_t kMaxTokens = 512;
constexpr int64_t kColumns = 512;   // of the weighted sum, one unit of work
constexpr int64_t kSerialTiles = 8;  // fewer are copied before another thread would have begun

// A tile is, in every layout, an array of [4 rows] of 4 bytes each: copies one row.
void copy_row(const uint8_t* source, int64_t source_lane, uint8_t* target, int64_t target_lane, int64_t tile_stride) {
  const uint8_t* from = source + source_lane * 4;
  uint8_t* to = target + target_lane * 4;
  for (int64_t i = 0; i < tile_stride; i += 4 * kTileRows) std::memcpy(to + i, from + i, 4);
}

int64_t aligned(int64_t nbytes) { return round_up(nbytes, static_cast<int64_t>(kAlignment)); }

}  // namespace

int64_t MoeOp::plan(int64_t max_tokens) {
  const int64_t tokens = std::min(round_up(max_tokens, kTileRows), kMaxTokens), routed_rows = tokens * num_active;
  // Each expert's rows begin a tile of their own.
  const int64_t tiles = ceil_div(routed_rows, kTileRows) + std::min(num_routed(), routed_rows);
  int64_t next = 0;
  const auto take = [&next](int64_t nbytes) {
    const int64_t offset = next;
    next += aligned(nbytes);
    return offset;
  };
  plan_.tokens = tokens;
  plan_.logits = take(tokens * static_cast<int64_t>(experts.size()) * 4);
  plan_.weights = take(tokens * num_places() * 4);
  plan_.chosen = take(tokens * num_places() * 4);
  plan_.places = take(tokens * num_places() * 4);
  plan_.order = take(tokens * num_places() * 4);
  for (const Input& input : inputs) plan_.gathered.push_back(take(tiles * input.layout.tile_stride));
  int64_t gate_up = 0, down_inputs = 0;
  for (int64_t i = 0; i < num_routed(); ++i) {
    gate_up = std::max(gate_up, 2 * experts[i].width * routed_rows * 4);
    down_inputs = std::max(down_inputs, experts[i].down->activations.tile_stride * tiles);
  }
  if (shared) {
    gate_up += 2 * experts.back().width * tokens * 4;
    down_inputs += experts.back().down->activations.nbytes(tokens);
  }
  plan_.gate_up = take(gate_up);
  plan_.down_inputs = take(down_inputs);
  plan_.down = take(tokens * num_places() * out_width * 4);
  touched_.reserve(experts.size());
  starts_.resize(experts.size() + 1);
  return next / 4;
}

size_t MoeOp::scratch_floats() const {
  int64_t floats = 2 * static_cast<int64_t>(experts.size()) + 2;
  for (const MoeExpert& expert : experts) floats = std::max(floats, kTileRows * expert.width);
  return static_cast<size_t>(floats);
}

void MoeOp::run(RunContext& context) {
  for (int64_t first = 0; first < context.counts.num_tokens; first += plan_.tokens)
    run_tokens(context, first, std::min(plan_.tokens, context.counts.num_tokens - first));
}

void MoeOp::run_tokens(RunContext& context, int64_t first_token, int64_t num_tokens) {
  std::vector<LinearPart> parts = router;
  for (LinearPart& part : parts)
    part.input = static_cast<const uint8_t*>(part.input) + first_token / kTileRows * part.weight->activations.tile_stride;
  run_parts(context, parts, num_tokens, at<float>(plan_.logits), static_cast<int64_t>(experts.size()));
  route(context, num_tokens);
  sort(num_tokens);
  context.num_experts_read += static_cast<int64_t>(touched_.size());
  gather(context, first_token);
  run_gate_up(context, first_token);
  run_activation(context);
  run_down(context);
  combine(context, first_token, num_tokens);
}

// Experts and weights of each token. A NaN is never larger than anything: such a row's experts are the first that are left.
void MoeOp::route(RunContext& context, int64_t num_tokens) {
  const int64_t outputs = static_cast<int64_t>(experts.size()), routed = num_routed(), per_token = num_places();
  const int64_t chunk = std::max<int64_t>(16, context.pool.even_chunk(num_tokens));
  context.pool.parallel_for(num_tokens, chunk, [&](int64_t begin, int64_t end, int thread) {
    float *scores = context.scratch(thread), *mass = scores + outputs;
    for (int64_t token = begin; token < end; ++token) {
      const float* logits = at<float>(plan_.logits) + token * outputs;
      float* weights = at<float>(plan_.weights) + token * per_token;
      auto* chosen = at<int32_t>(plan_.chosen) + token * per_token;
      for (int64_t place = 0; place < num_active; ++place) {
        int64_t best = -1;
        for (int64_t e = 0; e < routed; ++e) {
          bool taken = false;
          for (int64_t i = 0; i < place; ++i) taken |= chosen[i] == e;
          if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        chosen[place] = static_cast<int32_t>(best);
      }
      context.ops.exponentials(logits, routed, 1.0f, logits[chosen[0]], 0.0f, scores, mass);
      float total = 0.0f, active = 0.0f;
      for (int64_t e = 0; e < routed; ++e) total += mass[e];
      for (int64_t place = 0; place < num_active; ++place) active += weights[place] = mass[chosen[place]] / total;
      if (renormalize)
        for (int64_t place = 0; place < num_active; ++place) weights[place] /= active;
      if (!shared) continue;
      const float negated = -logits[routed];
      context.ops.exponentials(&negated, 1, 1.0f, 0.0f, 0.0f, scores, mass);
      weights[num_active] = 1.0f / (1.0f + mass[0]);
      chosen[num_active] = static_cast<int32_t>(routed);
    }
  });
}

// Sorts (token, place) by expert, tokens in order: `places[token][place]` is where its row goes, `order` which token a row is.
void MoeOp::sort(int64_t num_tokens) {
  const int64_t num_rows = num_tokens * num_places();
  const int32_t *chosen = at<int32_t>(plan_.chosen), *end = chosen + num_rows;
  auto *places = at<int32_t>(plan_.places), *order = at<int32_t>(plan_.order);
  std::fill(starts_.begin(), starts_.end(), 0);
  for (const int32_t* expert = chosen; expert != end; ++expert) ++starts_[*expert + 1];
  touched_.clear();
  Touched next = {};
  for (size_t e = 0; e < experts.size(); ++e) {
    const int64_t rows = starts_[e + 1];
    starts_[e + 1] += starts_[e];
    if (rows == 0) continue;
    next.expert = &experts[e];
    next.num_rows = rows;
    next.num_tiles = ceil_div(rows, kTileRows);
    // A single token's experts read its row where it is, and so does what computes all tokens.
    next.gathered = num_tokens > 1 && !(shared && e + 1 == experts.size());
    touched_.push_back(next);
    next.first_place += rows;
    if (next.gathered) next.first_tile += next.num_tiles;
    next.gate_up_offset += rows * 2 * next.expert->width;
    next.down_offset += next.num_tiles * next.expert->down->activations.tile_stride;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    const int32_t place = starts_[chosen[row]]++;
    places[row] = place;
    order[place] = static_cast<int32_t>(row / num_places());
  }
}

void MoeOp::gather(RunContext& context, int64_t first_token) {
  int64_t num_tiles = 0;
  for (const Touched& touched : touched_)
    if (touched.gathered) num_tiles = touched.first_tile + touched.num_tiles;
  const int64_t chunk = std::max(kSerialTiles, context.pool.even_chunk(num_tiles));
  context.pool.parallel_for(num_tiles, chunk, [&](int64_t begin, int64_t end, int) {
    for (const Touched& touched : touched_) {
      if (!touched.gathered) continue;
      const int64_t from = std::max(begin, touched.first_tile), to = std::min(end, touched.first_tile + touched.num_tiles);
      for (int64_t tile = from; tile < to; ++tile) {
        const int64_t first_row = (tile - touched.first_tile) * kTileRows, rows = std::min(kTileRows, touched.num_rows - first_row);
        const int32_t* tokens = at<int32_t>(plan_.order) + touched.first_place + first_row;
        for (size_t i = 0; i < inputs.size(); ++i) {
          const int64_t stride = inputs[i].layout.tile_stride;
          uint8_t* target = at<uint8_t>(plan_.gathered[i]) + tile * stride;
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t token = first_token + tokens[r];
            copy_row(inputs[i].data + token / kTileRows * stride, token % kTileRows, target, r, stride);
          }
        }
      }
    }
  });
}

void MoeOp::run_gate_up(RunContext& context, int64_t first_token) {
  int64_t num_panels = 0;
  for (const Touched& touched : touched_)
    for (const auto& part : touched.expert->gate_up) num_panels += part.weight->num_panels;
  context.pool.parallel_for(num_panels, context.pool.even_chunk(num_panels), [&](int64_t begin, int64_t end, int) {
    int64_t first = 0;  // of the part's panels, counted over all touched experts
    for (const Touched& touched : touched_) {
      for (const auto& part : touched.expert->gate_up) {
        const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, part.weight->num_panels);
        first += part.weight->num_panels;
        if (from >= to) continue;
        const int64_t stride = inputs[part.input].layout.tile_stride;
        const uint8_t* input = touched.gathered ? at<uint8_t>(plan_.gathered[part.input]) + touched.first_tile * stride
                                                : inputs[part.input].data + first_token / kTileRows * stride;
        float* out = at<float>(plan_.gate_up) + touched.gate_up_offset + part.first_column;
        linear_run(*part.weight, input, touched.num_rows, out, 2 * touched.expert->width, from, to);
      }
    }
  });
}

void MoeOp::run_activation(RunContext& context) {
  int64_t num_tiles = 0;
  for (const Touched& touched : touched_) num_tiles += touched.num_tiles;
  context.pool.parallel_for(num_tiles, context.pool.even_chunk(num_tiles), [&](int64_t begin, int64_t end, int thread) {
    float* scratch = context.scratch(thread);
    int64_t first = 0;
    for (const Touched& touched : touched_) {
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, touched.num_tiles);
      first += touched.num_tiles;
      const int64_t width = touched.expert->width;
      uint8_t* packed = at<uint8_t>(plan_.down_inputs) + touched.down_offset;
      for (int64_t tile = from; tile < to; ++tile) {
        const int64_t row = tile * kTileRows, rows = std::min(kTileRows, touched.num_rows - row);
        const float* gate_up = at<float>(plan_.gate_up) + touched.gate_up_offset + row * 2 * width;
        for (int64_t r = 0; r < rows; ++r)
          context.ops.act_and_mul_row(gate_up + r * 2 * width, gate_up + r * 2 * width + width, activation, width, scratch + r * width);
        quantize_rows(touched.expert->down->activations, scratch, width, row, row + rows, packed);
      }
    }
  });
}

void MoeOp::run_down(RunContext& context) {
  int64_t num_panels = 0;
  for (const Touched& touched : touched_) num_panels += touched.expert->down->num_panels;
  context.pool.parallel_for(num_panels, context.pool.even_chunk(num_panels), [&](int64_t begin, int64_t end, int) {
    int64_t first = 0;
    for (const Touched& touched : touched_) {
      const PackedLinear& weight = *touched.expert->down;
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, weight.num_panels);
      first += weight.num_panels;
      if (from >= to) continue;
      const uint8_t* input = at<uint8_t>(plan_.down_inputs) + touched.down_offset;
      linear_run(weight, input, touched.num_rows, at<float>(plan_.down) + touched.first_place * out_width, out_width, from, to);
    }
  });
}

void MoeOp::combine(RunContext& context, int64_t first_token, int64_t num_tokens) {
  const int64_t per_token = num_places(), per_row = ceil_div(out_width, kColumns), num_units = num_tokens * per_row;
  const int64_t chunk = std::max<int64_t>(8, context.pool.even_chunk(num_units));
  context.pool.parallel_for(num_units, chunk, [&](int64_t begin, int64_t end, int) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t token = unit / per_row, column = unit % per_row * kColumns, count = std::min(kColumns, out_width - column);
      const float* weights = at<float>(plan_.weights) + token * per_token;
      const auto* places = at<int32_t>(plan_.places) + token * per_token;
      float* out = y + (first_token + token) * out_width + column;
      for (int64_t place = 0; place < per_token; ++place) {
        const float weight = weights[place];
        const float* row = at<float>(plan_.down) + places[place] * out_width + column;
        if (place == 0)
          for (int64_t c = 0; c < count; ++c) out[c] = weight * row[c];
        else
          for (int64_t c = 0; c < count; ++c) out[c] += weight * row[c];
      }
    }
  });
}

}  // namespace awq_cpu
