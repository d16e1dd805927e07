#include "workspace.h"

#include <mutex>
#include <new>
#include <utility>

namespace gossamer {
namespace {

// Kept for the next call: fresh pages cost about as much as packing into them.
constexpr int64_t kKeptBytes = int64_t{256} << 20;

std::mutex& mutex() {
  static std::mutex instance;
  return instance;
}

Buffer& kept() {
  static Buffer instance;
  return instance;
}

}  // namespace

char* Buffer::reserve(int64_t bytes) {
  if (bytes > capacity_) {
    data_.reset();
    capacity_ = (bytes + 63) / 64 * 64;
    data_.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(capacity_))));
    if (data_ == nullptr) {
      capacity_ = 0;
      throw std::bad_alloc();
    }
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
