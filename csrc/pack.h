// 64 keys and values as the kernels read them: keys [depth][64], values [depth][padded_value_dim], in 32-bit elements.
// An element is a float, or a pair of bf16 that are neighbours in the dimension which the product sums over.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "job.h"

namespace gossamer {
namespace {

// [64][depth] to [depth][64]. depth is a multiple of the vector width.
template <class V>
void transpose_keys(const uint32_t* rows, int depth, uint32_t* out) {
  for (int d = 0; d < depth; d += V::kWidth)
    for (int t = 0; t < kChunk; t += V::kWidth)
      V::transpose(rows + int64_t{t} * depth + d, depth, out + int64_t{d} * kChunk + t, kChunk);
}

template <class Isa>
void pack_tile(const PackJob& job) {
  using V = typename Isa::Vec;
  alignas(64) static const uint16_t kNothing[kMaxHeadDim] = {};
  alignas(64) uint32_t rows[kChunk * kMaxHeadDim];
  uint32_t* keys = static_cast<uint32_t*>(job.keys);
  if constexpr (Isa::kPairs) {
    const int depth = job.padded_head_dim / 2;
    for (int t = 0; t < kChunk; ++t) {
      uint32_t* row = rows + int64_t{t} * depth;
      std::memset(row, 0, sizeof(uint32_t) * depth);
      if (job.key_rows[t] != nullptr) std::memcpy(row, job.key_rows[t], sizeof(uint16_t) * job.head_dim);
    }
    transpose_keys<V>(rows, depth, keys);
    for (int t = 0; t < kChunk / 2; ++t) {
      const void* even = job.value_rows[2 * t];
      const void* odd = job.value_rows[2 * t + 1];
      const uint16_t* low = even != nullptr ? static_cast<const uint16_t*>(even) : kNothing;
      const uint16_t* high = odd != nullptr ? static_cast<const uint16_t*>(odd) : kNothing;
      uint32_t* out = static_cast<uint32_t*>(job.values) + int64_t{t} * job.padded_value_dim;
      for (int d = 0; d < job.value_dim; ++d) out[d] = uint32_t{low[d]} | uint32_t{high[d]} << 16;
      for (int d = job.value_dim; d < job.padded_value_dim; ++d) out[d] = 0;
    }
  } else {
    float* wide = reinterpret_cast<float*>(rows);
    float* values = static_cast<float*>(job.values);
    for (int t = 0; t < kChunk; ++t) {
      float* key = wide + int64_t{t} * job.padded_head_dim;
      float* value = values + int64_t{t} * job.padded_value_dim;
      if (job.key_rows[t] == nullptr) {
        std::memset(key, 0, sizeof(float) * job.padded_head_dim);
        std::memset(value, 0, sizeof(float) * job.padded_value_dim);
        continue;
      }
      widen_row<V>(job.key_rows[t], job.dtype, job.head_dim, job.padded_head_dim, 1.0f, key);
      widen_row<V>(job.value_rows[t], job.dtype, job.value_dim, job.padded_value_dim, 1.0f, value);
    }
    transpose_keys<V>(rows, job.padded_head_dim, keys);
  }
}

}  // namespace
}  // namespace gossamer
