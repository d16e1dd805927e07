// What the scoring stages share: rows as pointers, masks, aligned buffers. Baseline code, not for the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "planning.h"
#include "planning_job.h"
#include "worklist.h"

namespace gossamer {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634074;

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline int padded(const Kernels& kernels, int dim) {
  return static_cast<int>(ceil_div(dim, kernels.head_dim_multiple)) * kernels.head_dim_multiple;
}

// Bits [low, high) of the 64 from `start` on.
inline uint64_t range_mask(int64_t low, int64_t high, int64_t start) {
  low = std::clamp<int64_t>(low - start, 0, kChunk);
  high = std::clamp<int64_t>(high - start, 0, kChunk);
  if (low >= high) return 0;
  const uint64_t upper = high == kChunk ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
  return upper & ~((uint64_t{1} << low) - 1);
}

// Floats on a cache line, zero at first.
class Aligned {
 public:
  explicit Aligned(int64_t floats)
      : storage_(static_cast<size_t>(floats) + 16),
        offset_((64 - reinterpret_cast<uintptr_t>(storage_.data()) % 64) % 64 / sizeof(float)) {}
  float* data() { return storage_.data() + offset_; }
  const float* data() const { return storage_.data() + offset_; }

 private:
  std::vector<float> storage_;
  size_t offset_;
};

inline const char* row_of(const TensorView& t, int64_t b, int64_t h, int64_t row, int64_t element) {
  return t.data + (b * t.stride[0] + h * t.stride[1] + row * t.stride[2]) * element;
}

// Rows [begin, end) of a head as pointers; null outside [low, high), up to 64 of them.
inline RowList list_rows(const TensorView& t, int64_t b, int64_t h, int64_t begin, int64_t count, int64_t low,
                         int64_t high, const ScoreCall& call, int padded_dim, const void** rows) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = begin + r;
    rows[r] = row >= low && row < high ? row_of(t, b, h, row, element_size(call.dtype)) : nullptr;
  }
  return {rows, static_cast<int>(count), call.dim, padded_dim, call.dtype};
}

}  // namespace gossamer
