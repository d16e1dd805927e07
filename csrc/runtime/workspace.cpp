#include "runtime/workspace.h"

#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gossamer {
namespace {

// Kept for the next call: fresh pages cost about as much as packing into them. All that a pass needs, but for scratch
// of more than a hundred threads.
constexpr int64_t kKeptBytes = int64_t{768} << 20;

std::mutex& mutex() {
  static std::mutex instance;
  return instance;
}

Buffer& kept() {
  static Buffer instance;
  return instance;
}

}  // namespace

void prefer_huge_pages(void* begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(begin);
  static_cast<void>(bytes);
#endif
}

char* Buffer::reserve(int64_t bytes) {
  if (bytes > capacity_) {
    data_.reset();
    capacity_ = (bytes + 63) / 64 * 64;
    data_.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(capacity_))));
    if (data_ == nullptr) {
      capacity_ = 0;
      throw std::bad_alloc();
    }
    prefer_huge_pages(data_.get(), capacity_);
  }
  return data_.get();
}

// Nobody waits for the mutex: a fork may have copied it in the locked state.
KeptBuffer::KeptBuffer() {
  const std::unique_lock<std::mutex> lock(mutex(), std::try_to_lock);
  if (lock.owns_lock()) std::swap(buffer_, kept());
}

KeptBuffer::~KeptBuffer() {
  const std::unique_lock<std::mutex> lock(mutex(), std::try_to_lock);
  if (lock.owns_lock() && buffer_.capacity() <= kKeptBytes && buffer_.capacity() > kept().capacity())
    std::swap(buffer_, kept());
}

}  // namespace gossamer
