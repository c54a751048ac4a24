// A mixture of experts as one op: router, gathering, the experts' linears and activations, and the weighted sum.
#pragma once

#include <vector>

#include "program.h"

namespace awq_cpu {

// One expert's weights. `input` of a part is the index of the layout it reads, in MoeOp::inputs.
struct MoeExpert {
  struct Part {
    const PackedLinear* weight;
    int64_t input, first_column;
  };
  std::vector<Part> gate_up;  // the gates' `width` outputs first, then the ups'
  const PackedLinear* down;
  int64_t width;
};

// Rows are sorted by expert: each expert that is touched computes its rows together, by the kernels of a linear of that many rows,
// and one that is not touched is not read. All threads share all touched experts' panels. What a row gets does not depend on
// where it lies among an expert's rows, and a token's results are added up in the router's order, so bits depend on neither the
// batch nor on threads.
struct MoeOp final : Op {
  MoeOp() : Op("moe") {}
  void run(RunContext& context) override;

  struct Input {  // all tokens' rows
    ActivationLayout layout;
    const uint8_t* data;
  };

  // Floats of memory that `max_tokens` need at once, and of scratch per thread.
  int64_t plan(int64_t max_tokens);
  size_t scratch_floats() const;

  std::vector<LinearPart> router;
  std::vector<Input> inputs;
  std::vector<MoeExpert> experts;  // a shared one last
  int64_t num_active, out_width;
  bool renormalize, shared;
  Activation activation;
  uint8_t* memory;
  float* y;

 private:
  // An expert that computes rows in this step: places [first_place, first_place + num_rows) of the sorted rows.
  struct Touched {
    const MoeExpert* expert;
    bool gathered;  // its rows lie among the gathered tiles, from first_tile on; else where the tokens lie
    int64_t first_place, num_rows, first_tile, num_tiles;
    int64_t gate_up_offset;  // floats
    int64_t down_offset;     // bytes
  };
  // Offsets in bytes into `memory`, for up to `tokens` tokens at a time.
  struct Plan {
    int64_t tokens, logits, weights, chosen, places, order, gate_up, down_inputs, down, end;
    std::vector<int64_t> gathered;  // per input
  };

  int64_t num_routed() const { return static_cast<int64_t>(experts.size()) - (shared ? 1 : 0); }
  int64_t num_places() const { return num_active + (shared ? 1 : 0); }  // per token
  template <class T>
  T* at(int64_t offset) const { return reinterpret_cast<T*>(memory + offset); }

  void run_tokens(RunContext& context, int64_t first_token, int64_t num_tokens);
  void route(RunContext& context, int64_t num_tokens);
  void sort(int64_t num_tokens);
  void gather(RunContext& context, int64_t first_token);
  void run_gate_up(RunContext& context, int64_t first_token);
  void run_activation(RunContext& context);
  void run_down(RunContext& context);
  void combine(RunContext& context, int64_t first_token, int64_t num_tokens);

  Plan plan_ = {};
  std::vector<Touched> touched_;
  std::vector<int32_t> starts_;  // scratch of `sort`
};

}  // namespace awq_cpu
