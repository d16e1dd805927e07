// Memory that calls leave to each other.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace gossamer {

// Asks for huge pages where a range holds whole ones: the first touch of fresh memory in small pages costs as much as
// computing a few tiles. A hint; where the system has none, nothing happens.
void prefer_huge_pages(void* begin, int64_t bytes);

// Uninitialised, aligned to 64 bytes; only grows.
class Buffer {
 public:
  char* reserve(int64_t bytes);
  int64_t capacity() const { return capacity_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t capacity_ = 0;
};

// The buffer of the last call that has ended, if it is not large; calls that overlap get buffers of their own.
class KeptBuffer {
 public:
  KeptBuffer();
  ~KeptBuffer();
  KeptBuffer(const KeptBuffer&) = delete;
  KeptBuffer& operator=(const KeptBuffer&) = delete;

  char* reserve(int64_t bytes) { return buffer_.reserve(bytes); }

 private:
  Buffer buffer_;
};

// Takes aligned pieces of a size that is found by a first pass over null.
class Pieces {
 public:
  explicit Pieces(char* base) : base_(base) {}
  char* take(int64_t bytes) {
    char* piece = base_ == nullptr ? nullptr : base_ + taken_;
    taken_ += (bytes + 63) / 64 * 64;
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  char* base_;
  int64_t taken_ = 0;
};

}  // namespace gossamer
