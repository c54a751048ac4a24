#include "huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>

namespace awq_cpu {
namespace {

constexpr size_t kHugePage = size_t{1} << 21, kRegion = size_t{1} << 25;

struct Region {
  explicit Region(size_t nbytes) : nbytes(nbytes + kHugePage) {
    base = mmap(nullptr, this->nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(base);
    next = static_cast<uint8_t*>(base) + (kHugePage - address % kHugePage) % kHugePage;
    end = next + nbytes;
#ifdef MADV_HUGEPAGE
    madvise(next, nbytes, MADV_HUGEPAGE);  // a wish: where it is refused the memory works all the same
#endif
  }
  ~Region() { munmap(base, nbytes); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  size_t nbytes;
  void* base;
  uint8_t* next;  // the first byte not given away
  uint8_t* end;
};

std::mutex mutex;
std::weak_ptr<Region> newest;  // guarded by mutex, as is Region::next

}  // namespace

HugePiece::HugePiece(size_t nbytes) : nbytes_(nbytes) {
  if (nbytes == 0) return;
  const size_t rounded = (nbytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Region> region = newest.lock();
  if (region == nullptr || static_cast<size_t>(region->end - region->next) < rounded) {
    region = std::make_shared<Region>(std::max(kRegion, (rounded + kHugePage - 1) / kHugePage * kHugePage));
    newest = region;
  }
  data_ = region->next;
  region->next += rounded;
  region_ = std::move(region);
}

}  // namespace awq_cpu
