// Linear layers on the CPU: y[M, N] = x[M, K] W[N, K]^T + bias, with W in int4 (AWQ), int8 or 16/32-bit floats.
//
// A linear has two sides. Its weight is packed once (`pack_*`) into panels of 16 columns, K-contiguous. Its input is quantized by
// whoever produces it (a norm, the attention, an activation function), one fp32 row at a time while the row is hot in cache
// (`quantize_rows`), into a layout that `PackedLinear::activations` describes. `linear_run` then computes a range of panels for
// all rows; ranges are independent, so threads may claim them in any way.
//
// Promises:
// - For each (row, column) the sequence of floating-point operations is fixed: it does not depend on M, on the row's place in a tile,
//   on the panel range or on threads. Results are bit-identical between M = 1 and any batch (within one ISA variant).
// - A NaN or infinity anywhere in an input row makes that whole output row NaN, and touches no other row.
//   (With fp32 activations, the row carries what IEEE arithmetic gives.)
// - An input block whose largest magnitude is under 127 * FLT_MIN (int8) or 32767 * FLT_MIN (int16) counts as zero.
// - Nothing here throws or allocates except `pack_*` and `select_isa`; nothing but `select_isa` has global effects.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common.h"
#include "huge_pages.h"

namespace awq_cpu {

inline constexpr int64_t kTileRows = 4;       // rows of a packed activation tile
inline constexpr int64_t kPanelColumns = 16;  // columns of a weight panel: the unit of work of `linear_run`

enum class ActivationMode : uint8_t {
  kInt8,     // one scale per (row, 32 channels)
  kInt16,    // one scale per (row, 128, 64 or 32 channels: the largest that divides the group)
  kFloat32,  // not quantized: for dense weights
};

// How the input of a linear lies in memory. It depends on K, the weight's group size and the mode alone, so linears that agree in
// those can share an input. Compare with operator==.
//
// Rows go in tiles of 4; tile t starts at byte t * tile_stride and holds, each part at its offset:
//   values  int8  [padded_k / 4][4 rows][4]    kInt8
//           int16 [padded_k / 4][2][4 rows][2] kInt16: of every 4 channels the pairs (0, 2) and (1, 3)
//           fp32  [k][4 rows]                  kFloat32
//   scales  fp32  [num_blocks][4 rows]         value = integer * scale; NaN where the block holds a NaN or an infinity
//   sums    fp32  [num_groups][4 rows]         sum over the group's blocks of scale * (sum of integers)
// Channels are padded per group to a multiple of `block_size`, with zeros (groups of 32 or more are normally multiples already).
// Rows past the last one of a tile are never read into a result.
struct ActivationLayout {
  ActivationMode mode = ActivationMode::kFloat32;
  int64_t k = 0;
  int64_t group_size = 0;        // of the weight; k for weights without groups
  int64_t num_groups = 0;
  int64_t block_size = 0;        // channels per activation scale
  int64_t blocks_per_group = 0;
  int64_t num_blocks = 0;
  int64_t padded_k = 0;
  int64_t scales_offset = 0;     // bytes from the start of a tile
  int64_t sums_offset = 0;
  int64_t tile_stride = 0;       // bytes, a multiple of 64

  static ActivationLayout make(ActivationMode mode, int64_t k, int64_t group_size);

  // Bytes for `rows` rows; the buffer must be 64-byte aligned.
  AWQ_INLINE int64_t nbytes(int64_t rows) const { return ceil_div(rows, kTileRows) * tile_stride; }
  AWQ_INLINE bool operator==(const ActivationLayout& other) const {
    return mode == other.mode && k == other.k && (mode == ActivationMode::kFloat32 || group_size == other.group_size);
  }
  AWQ_INLINE bool operator!=(const ActivationLayout& other) const { return !(*this == other); }
};

// Writes rows [row_begin, row_end) into `packed`. Row r is read at x + (r - row_begin) * ldx, k fp32 values. Different rows may be
// written by different threads at once. Fastest for whole tiles of 4; a single row is fine.
void quantize_rows(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end,
                   void* packed);

// The same for groups [group_begin, group_end) alone; x is at the first channel of group_begin. Not for kFloat32, which has none.
void quantize_groups(const ActivationLayout& layout, const float* x, int64_t ldx, int64_t row_begin, int64_t row_end,
                     int64_t group_begin, int64_t group_end, void* packed);

// The values back as fp32 [row_end - row_begin, k] (adapters, tests).
void dequantize_rows(const ActivationLayout& layout, const void* packed, int64_t row_begin, int64_t row_end, float* out,
                     int64_t ldo);

enum class WeightType : uint8_t {
  kInt4,   // unsigned, a zero point and a 16-bit scale per (column, group)
  kInt8,   // symmetric, an fp32 scale per (column, group)
  kFloat,  // 16 or 32 bit
};

// A packed weight. Movable; the kernels read it only. Layout of one panel (16 columns; see linear_pack.cpp):
//   kInt4:  scales 16-bit [num_groups][16], zeros uint8 [num_groups][16], padding to 64 bytes,
//           then per 8 channels two 32-byte vectors (8 columns x 4 bytes each): low nibbles are channels 0..3, high ones 4..7
//   kInt8:  scales fp32 [num_groups][16], padding to 64 bytes, then int8 [padded_k / 4][2][8 columns][4 channels]
//   kFloat: [k][16]
struct PackedLinear {
  WeightType type = WeightType::kFloat;
  FloatType float_type = FloatType::kFloat32;  // kInt4: of the scales; kFloat: of the weights
  int64_t in_features = 0;                     // K
  int64_t out_features = 0;                    // N
  int64_t num_panels = 0;                      // ceil(N / 16)
  int64_t panel_stride = 0;                    // bytes
  int64_t weights_offset = 0;                  // bytes from a panel's start to its weights
  ActivationLayout activations;                // what `linear_run` wants its input in
  HugePiece panels;
  AlignedBuffer bias;                          // fp32 [num_panels * 16], or empty

  int64_t nbytes() const { return static_cast<int64_t>(panels.nbytes() + bias.nbytes()); }
};

// One AWQ `gemm` weight as on disk: qweight int32 [K, N/8], qzeros int32 [K/G, N/8], scales 16-bit [K/G, N], all contiguous.
struct AwqPart {
  const int32_t* qweight;
  const int32_t* qzeros;
  const uint16_t* scales;
  int64_t out_features;  // a multiple of 8
};

// One dense weight [N, K], contiguous.
struct DensePart {
  const void* weight;
  int64_t out_features;
};

// Each fuses `parts` along N in the order given. bias: fp32 [sum of N] or null. Sizes must be valid (the bindings check them):
// throws std::invalid_argument otherwise. `mode` is kInt8 or kInt16.
PackedLinear pack_awq(const std::vector<AwqPart>& parts, int64_t k, int64_t group_size, FloatType scale_type,
                      ActivationMode mode, const float* bias);
PackedLinear pack_dense(const std::vector<DensePart>& parts, int64_t k, FloatType type, const float* bias);
// Quantizes a dense weight to int8, symmetric, groups of up to 256 channels; its input is always int16 (as fast as int8 here, since
// products of two int8 must be widened at once anyway, and it adds no error).
PackedLinear pack_int8(const std::vector<DensePart>& parts, int64_t k, FloatType type, const float* bias);
// Quantizes a dense weight to int4 with zero points, round to nearest after a small search of the clipping range; groups of 32.
PackedLinear pack_int4(const std::vector<DensePart>& parts, int64_t k, FloatType type, ActivationMode mode,
                       const float* bias);

// The weight back as fp32 [N, K] (tests, `.dense()` of a head).
void unpack_weight(const PackedLinear& weight, float* out);

// What attention will read after a linear: pool blocks of keys, then of values, `block_lines` cache lines each. A linear of several row
// tiles waits for memory during the first of a panel alone, so the others fetch these meanwhile: with 8 to 16 sequences that takes a
// third off attention's time and costs the linears a twentieth. A hint: it decides no result.
struct ReadAhead {
  const char* keys = nullptr;
  const char* values = nullptr;
  const int32_t* blocks = nullptr;
  int64_t num_blocks = 0, block_lines = 1;
  int64_t first_line = 0;  // of panel 0, counted over all keys, then all values

  // Walks through the lines from `first_line` + `offset` on.
  class Cursor {
   public:
    AWQ_INLINE Cursor(const ReadAhead& list, int64_t offset) : list_(list) {
      const int64_t line = list.first_line + offset, within = line % list.block_lines;
      enter(line / list.block_lines);
      if (at_ != nullptr) at_ += within * 64, left_ -= within;
    }
    // The next `count` lines of one block, or fewer where `block_lines` is less; null past the last. What is left of a block that has
    // less is passed over.
    AWQ_INLINE const char* take(int64_t count) {
      if (count > left_ && at_ != nullptr) enter(block_ + 1);
      const char* taken = at_;
      if (at_ != nullptr) at_ += count * 64, left_ -= count;
      return taken;
    }

   private:
    AWQ_INLINE void enter(int64_t block) {
      block_ = block;
      left_ = list_.block_lines;
      const bool is_key = block < list_.num_blocks;
      at_ = block < 2 * list_.num_blocks
                ? (is_key ? list_.keys : list_.values) + list_.blocks[is_key ? block : block - list_.num_blocks] * list_.block_lines * 64
                : nullptr;
    }
    const ReadAhead& list_;
    int64_t block_ = 0, left_ = 0;
    const char* at_ = nullptr;
  };
};

// Computes columns [panel_begin * 16, min(panel_end * 16, N)) of y for rows [0, num_rows).
// activations: `num_rows` rows in weight.activations' layout, 64-byte aligned. y: fp32, row stride ldy >= N floats.
void linear_run(const PackedLinear& weight, const void* activations, int64_t num_rows, float* y, int64_t ldy,
                int64_t panel_begin, int64_t panel_end, const ReadAhead& ahead = {});

// The lines that each panel of `linear_run` reads ahead; 0 where the variant in use does not.
int64_t lines_ahead(const PackedLinear& weight, int64_t num_rows);

// ISA variants: "generic", "avx2", "avx512". The first call of anything above picks the best this machine has, or the one named by
// the environment variable AWQ_CPU_ISA. `select_isa` throws std::invalid_argument for one that is unknown, not built, or not
// supported here.
std::vector<std::string> available_isas();
std::string current_isa();
void select_isa(const std::string& name);  // not thread-safe: at start, and in tests

}  // namespace awq_cpu
