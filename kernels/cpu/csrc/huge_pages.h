// Memory in huge pages, shared by the many weights of a model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "common.h"

namespace awq_cpu {

// A zeroed piece, 64-byte aligned, of a region that asks for huge pages. A projection of a small model is smaller than one such page,
// so pieces allocated one after the other lie side by side; a region goes when its last piece does. A step reads all weights
// once: in pages of 4 KiB that is a TLB miss every 64 cache lines, at each of which the hardware's prefetching ends too. Movable.
class HugePiece {
 public:
  HugePiece() = default;
  explicit HugePiece(size_t nbytes);  // throws std::bad_alloc

  AWQ_INLINE uint8_t* data() { return data_; }
  AWQ_INLINE const uint8_t* data() const { return data_; }
  AWQ_INLINE size_t nbytes() const { return nbytes_; }

 private:
  std::shared_ptr<void> region_;
  uint8_t* data_ = nullptr;
  size_t nbytes_ = 0;
};

}  // namespace awq_cpu
