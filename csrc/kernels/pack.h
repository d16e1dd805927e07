// 64 keys and values as the kernels read them: keys [depth][64], values [depth][padded_value_dim], in 32-bit elements.
// An element is a float, or a pair of bf16 that are neighbours in the dimension which the product sums over.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/convert.h"
#include "kernels/job.h"

namespace gossamer {
namespace {

// 64 rows of `depth` 32-bit elements to [depth][64]. depth is a multiple of the vector width; rows of bf16 pairs may
// lie at any even address.
template <class V>
void transpose_keys(const void* const* rows, int depth, uint32_t* out) {
  for (int t = 0; t < kChunk; t += V::kWidth)
    for (int d = 0; d < depth; d += V::kWidth) V::transpose(rows + t, d, out + int64_t{d} * kChunk + t, kChunk);
}

// Rows of 32-bit elements: those of the tensor where they serve as they are, else copies, converted and padded.
template <class Isa>
class KeyRows {
  using V = typename Isa::Vec;

 public:
  explicit KeyRows(const PackJob& job) : depth(Isa::kPairs ? job.padded_head_dim / 2 : job.padded_head_dim) {
    const bool as_they_are =
        job.head_dim == job.padded_head_dim && (Isa::kPairs || job.dtype == DType::kFloat32);
    for (int t = 0; t < kChunk; ++t) {
      if (job.key_rows[t] == nullptr) {
        rows[t] = zeros();
      } else if (as_they_are) {
        rows[t] = job.key_rows[t];
      } else {
        uint32_t* row = copies_ + int64_t{t} * depth;
        copy(job, job.key_rows[t], row);
        rows[t] = row;
      }
    }
  }

  static const uint32_t* zeros() {
    alignas(64) static const uint32_t nothing[kMaxHeadDim] = {};
    return nothing;
  }

  const int depth;
  const void* rows[kChunk];

 private:
  void copy(const PackJob& job, const void* key, uint32_t* row) const {
    if constexpr (Isa::kPairs) {
      std::memset(row, 0, sizeof(uint32_t) * depth);
      std::memcpy(row, key, sizeof(uint16_t) * job.head_dim);
    } else {
      widen_row<V>(key, job.dtype, job.head_dim, job.padded_head_dim, 1.0f, reinterpret_cast<float*>(row));
    }
  }

  alignas(64) uint32_t copies_[kChunk * kMaxHeadDim];
};

// Two rows of dim values become one of pairs, zero up to padded; null is a row of zeros.
template <class V>
void merge_rows(const void* even, const void* odd, int dim, int padded, uint32_t* out) {
  alignas(64) static const uint16_t nothing[kMaxHeadDim] = {};
  const uint16_t* low = even != nullptr ? static_cast<const uint16_t*>(even) : nothing;
  const uint16_t* high = odd != nullptr ? static_cast<const uint16_t*>(odd) : nothing;
  constexpr int kStep = 2 * V::kWidth;
  int d = 0;
  for (; d + kStep <= dim; d += kStep) V::merge_pairs(low + d, high + d, out + d);
  for (; d < dim; ++d) out[d] = uint32_t{low[d]} | uint32_t{high[d]} << 16;
  for (; d < padded; ++d) out[d] = 0;
}

template <class Isa>
void pack_tile(const PackJob& job) {
  using V = typename Isa::Vec;
  const KeyRows<Isa> keys(job);
  transpose_keys<V>(keys.rows, keys.depth, static_cast<uint32_t*>(job.keys));
  if (job.values == nullptr) return;
  if constexpr (Isa::kPairs) {
    for (int t = 0; t < kChunk / 2; ++t)
      merge_rows<V>(job.value_rows[2 * t], job.value_rows[2 * t + 1], job.value_dim, job.padded_value_dim,
                    static_cast<uint32_t*>(job.values) + int64_t{t} * job.padded_value_dim);
  } else {
    for (int t = 0; t < kChunk; ++t) {
      float* value = static_cast<float*>(job.values) + int64_t{t} * job.padded_value_dim;
      if (job.value_rows[t] == nullptr)
        std::memset(value, 0, sizeof(float) * job.padded_value_dim);
      else
        widen_row<V>(job.value_rows[t], job.dtype, job.value_dim, job.padded_value_dim, 1.0f, value);
    }
  }
}

}  // namespace
}  // namespace gossamer
