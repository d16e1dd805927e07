// Products of a few queries with many rows, each of which is read once.
#pragma once

#include <cstdint>

#include "kernels/convert.h"
#include "kernels/score_job.h"

namespace gossamer {
namespace {

constexpr int64_t kAhead = 4096, kLine = 64;  // bytes

template <class V, DType kDType, int kHeads, int kPages>
inline void score_some(const PageScores& job, int head, int64_t page) {
  using Reg = typename V::Reg;
  constexpr int64_t kBytes = kDType == DType::kFloat32 ? 4 : 2;
  Reg sums[kHeads][kPages];
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 16
    for (int p = 0; p < kPages; ++p) sums[h][p] = V::zero();
  const float* queries = job.queries + int64_t{head} * job.dim;
  const char* rows = job.pages + page * job.stride_bytes;
  int d = 0;
  for (; d + V::kWidth <= job.dim; d += V::kWidth) {
    __builtin_prefetch(rows + kPages * d * kBytes + kAhead);
    __builtin_prefetch(rows + kPages * d * kBytes + kAhead + kLine);
    Reg x[kPages];
#pragma GCC unroll 16
    for (int p = 0; p < kPages; ++p) x[p] = load_as_float<V>(rows + p * job.stride_bytes, d, kDType);
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      const Reg q = V::load(queries + int64_t{h} * job.dim + d);
#pragma GCC unroll 16
      for (int p = 0; p < kPages; ++p) sums[h][p] = V::fma(q, x[p], sums[h][p]);
    }
  }
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 16
    for (int p = 0; p < kPages; ++p) {
      float sum = V::reduce_add(sums[h][p]);
      for (int rest = d; rest < job.dim; ++rest)
        sum += queries[int64_t{h} * job.dim + rest] * scalar_as_float(rows + p * job.stride_bytes, rest, kDType);
      job.scores[(head + h) * job.pitch + page + p] = sum;
    }
}

template <class V, DType kDType, int kPages>
inline void score_heads(const PageScores& job, int64_t page) {
  int head = 0;
  for (; head + 4 <= job.heads; head += 4) score_some<V, kDType, 4, kPages>(job, head, page);
  for (; head < job.heads; ++head) score_some<V, kDType, 1, kPages>(job, head, page);
}

template <class V, DType kDType>
void score_pages_of(const PageScores& job) {
  int64_t page = 0;
  for (; page + 2 <= job.count; page += 2) score_heads<V, kDType, 2>(job, page);
  if (page < job.count) score_heads<V, kDType, 1>(job, page);
}

template <class V>
void score_pages(const PageScores& job) {
  switch (job.dtype) {
    case DType::kBFloat16:
      return score_pages_of<V, DType::kBFloat16>(job);
    case DType::kFloat16:
      return score_pages_of<V, DType::kFloat16>(job);
    default:
      return score_pages_of<V, DType::kFloat32>(job);
  }
}

}  // namespace
}  // namespace gossamer
