// What the scoring stages share: rows as pointers, masks, aligned buffers. Baseline code, not for the kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/integers.h"
#include "kernels/score_job.h"
#include "planning/planning.h"

namespace gossamer {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

inline int padded(const Kernels& kernels, int dim) {
  return round_up(dim, kernels.head_dim_multiple);
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

// What one thread needs for a panel: packed keys, packed queries and logits.
class PanelScratch {
 public:
  explicit PanelScratch(int padded_dim)
      : floats_(int64_t{2} * kChunk * padded_dim + kLanes + kScoreRows * kScorePitch + kDiagonalSlack),
        keys(floats_.data()),
        queries(keys + kChunk * padded_dim),
        logits(queries + kChunk * padded_dim + kLanes) {}
  PanelScratch(PanelScratch&&) = default;

 private:
  Aligned floats_;

 public:
  float *keys, *queries, *logits;
  uint64_t masks[kScoreRows];
};

inline std::vector<PanelScratch> scratch_for(int threads, int padded_dim) {
  std::vector<PanelScratch> all;
  all.reserve(threads);
  for (int t = 0; t < threads; ++t) all.emplace_back(padded_dim);
  return all;
}

// Rows [begin, begin + count) of a head as pointers, up to 64 of them; null outside [low, high).
inline RowList list_rows(const TensorView& t, int64_t b, int64_t h, int64_t begin, int64_t count, int64_t low,
                         int64_t high, int padded_dim, const void** rows) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = begin + r;
    rows[r] = row >= low && row < high ? t.row(b, h, row) : nullptr;
  }
  return {rows, static_cast<int>(count), t.dim, padded_dim, t.dtype};
}

}  // namespace gossamer
