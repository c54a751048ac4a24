// Small shared pieces of the native CPU back end: aligned memory, 16-bit floats, integer helpers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

// Functions that several translation units with different ISA flags share must not be emitted out of line: the linker keeps one copy,
// perhaps the one with instructions this machine lacks. So they are always inlined (here), or static; ISA-specific files call no
// other inline functions, the standard library's templates included.
#define AWQ_INLINE [[gnu::always_inline]] inline

namespace awq_cpu {

inline constexpr size_t kAlignment = 64;  // one cache line, and the widest vector

AWQ_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
AWQ_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

enum class FloatType : uint8_t { kFloat32, kFloat16, kBFloat16 };

AWQ_INLINE constexpr size_t float_nbytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// An owned, 64-byte aligned, zeroed buffer. Move-only. Throws std::bad_alloc.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t nbytes) : nbytes_(nbytes) {
    if (nbytes == 0) return;
    // Large buffers start on a page so that the kernel may back them by huge pages.
    const size_t alignment = nbytes >= (size_t{1} << 21) ? size_t{1} << 21 : kAlignment;
    const size_t rounded = (nbytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<uint8_t*>(std::aligned_alloc(alignment, rounded));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, nbytes);
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), nbytes_(std::exchange(other.nbytes_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(nbytes_, other.nbytes_);
    return *this;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { std::free(data_); }

  AWQ_INLINE uint8_t* data() { return data_; }
  AWQ_INLINE const uint8_t* data() const { return data_; }
  AWQ_INLINE size_t nbytes() const { return nbytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t nbytes_ = 0;
};

AWQ_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

AWQ_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

AWQ_INLINE float bfloat16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

// IEEE binary16 to binary32, exact, subnormals and NaN included.
AWQ_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return bits_to_float(float_to_bits(magnitude) | sign);
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// binary32 to binary16, to nearest, ties to even; overflow becomes infinity.
AWQ_INLINE uint16_t float_to_half(float value) {
  uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000u) {                       // below 2^-14: let an fp32 addition do the rounding
    const uint32_t rounded = float_to_bits(bits_to_float(bits) + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  bits += 0xfff + ((bits >> 13) & 1) - 0x38000000u;
  return static_cast<uint16_t>(sign | (bits >> 13));
}

AWQ_INLINE float load_float(const void* data, int64_t index, FloatType type) {
  switch (type) {
    case FloatType::kFloat16: {
      uint16_t half;
      std::memcpy(&half, static_cast<const uint16_t*>(data) + index, 2);
      return half_to_float(half);
    }
    case FloatType::kBFloat16: {
      uint16_t half;
      std::memcpy(&half, static_cast<const uint16_t*>(data) + index, 2);
      return bfloat16_to_float(half);
    }
    case FloatType::kFloat32: break;
  }
  return static_cast<const float*>(data)[index];
}

}  // namespace awq_cpu
