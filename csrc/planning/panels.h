// What the scoring stages share: rows as pointers, masks, aligned buffers. Baseline code, not for the kernels.
#pragma once

#include <algorithm>
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

// Keys at positions [first, first + 64) of a batch row as pointers; null where none is live.
inline RowList list_keys(const ScoreKernels& kernels, const Tokens& k, const Extent& extent, int64_t b, int64_t group,
                         int64_t first, int padded_dim, PointedRows& to) {
  int64_t slots[kChunk];
  for (int64_t t = 0; t < kChunk; ++t)
    slots[t] = first + t < extent.key_count[b] ? extent.key_slot(b, first + t) : -1;
  k.point_at(kernels, b, group, slots, to);
  return {to.rows, kChunk, k.dim, padded_dim, k.dtype};
}

// Queries at positions [first, first + count), all of them live.
inline RowList list_queries(const TensorView& q, const Extent& extent, int64_t b, int64_t head, int64_t first,
                            int64_t count, int padded_dim, const void** rows) {
  for (int64_t r = 0; r < count; ++r) rows[r] = q.row(b, head, extent.query_row(b, first + r));
  return {rows, static_cast<int>(count), q.dim, padded_dim, q.dtype};
}

// The first `count` pooled keys from `first` on of [batch, groups, blocks, dim]; null beyond.
inline RowList list_pooled(const TensorView& pooled, int64_t b, int64_t group, int64_t first, int64_t blocks,
                           int padded_dim, const void** rows) {
  for (int64_t t = 0; t < kChunk; ++t) rows[t] = first + t < blocks ? pooled.row(b, group, first + t) : nullptr;
  return {rows, kChunk, pooled.dim, padded_dim, pooled.dtype};
}

// The batch row of job n, where `starts` holds the number of each batch row's first job.
inline int64_t row_of_job(const std::vector<int64_t>& starts, int64_t n) {
  return std::upper_bound(starts.begin(), starts.end(), n) - starts.begin() - 1;
}

}  // namespace gossamer
