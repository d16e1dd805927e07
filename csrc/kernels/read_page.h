// Tokens of a page as rows, on one instruction set's transpositions. Numbers are moved, never computed with.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/page_job.h"

namespace gossamer {
namespace {

// 32-bit element d of token t lies at source + d * pitch + t, and goes to rows + t * depth + d.
template <class V>
void transpose_tokens(const uint32_t* source, int64_t pitch, int64_t count, int depth, uint32_t* rows) {
  int64_t t = 0;
  for (; t + V::kWidth <= count; t += V::kWidth) {
    int d = 0;
    for (; d + V::kWidth <= depth; d += V::kWidth) {
      const void* columns[V::kWidth];
      for (int n = 0; n < V::kWidth; ++n) columns[n] = source + (d + n) * pitch + t;
      V::transpose(columns, 0, rows + t * depth + d, depth);
    }
    for (; d < depth; ++d)
      for (int n = 0; n < V::kWidth; ++n) rows[(t + n) * depth + d] = source[d * pitch + t + n];
  }
  for (; t < count; ++t)
    for (int d = 0; d < depth; ++d) rows[t * depth + d] = source[d * pitch + t];
}

// The same of 16-bit elements; two neighbours of a row move as one.
template <class V>
void transpose_narrow_tokens(const uint16_t* source, int64_t pitch, int64_t count, int dim, uint16_t* rows) {
  constexpr int kStep = 2 * V::kWidth;
  const int depth = dim / 2;
  int64_t t = 0;
  for (; dim % 2 == 0 && t + kStep <= count; t += kStep) {
    uint32_t* to = reinterpret_cast<uint32_t*>(rows + t * dim);
    int d = 0;
    for (; d + V::kWidth <= depth; d += V::kWidth) {
      alignas(64) uint32_t pairs[V::kWidth][kStep];
      const void* columns[V::kWidth];
      for (int n = 0; n < V::kWidth; ++n) {
        const uint16_t* even = source + 2 * (d + n) * pitch + t;
        V::merge_pairs(even, even + pitch, pairs[n]);
        columns[n] = pairs[n];
      }
      V::transpose(columns, 0, to + d, depth);
      V::transpose(columns, V::kWidth, to + V::kWidth * depth + d, depth);
    }
    for (d *= 2; d < dim; ++d)
      for (int n = 0; n < kStep; ++n) rows[(t + n) * dim + d] = source[d * pitch + t + n];
  }
  for (; t < count; ++t)
    for (int d = 0; d < dim; ++d) rows[t * dim + d] = source[d * pitch + t];
}

template <class V>
void read_key_tiles(const PageJob& job, uint32_t* rows) {
  const int depth = job.dim / 2;
  for (int64_t t = job.first; t < job.first + job.count;) {
    const int64_t inside = t % kTileTokens, rest = job.first + job.count - t;
    const int64_t count = kTileTokens - inside < rest ? kTileTokens - inside : rest;
    const uint32_t* tile = static_cast<const uint32_t*>(job.page) + t / kTileTokens * kTileTokens * depth;
    transpose_tokens<V>(tile + inside, kTileTokens, count, depth, rows + (t - job.first) * depth);
    t += count;
  }
}

inline void read_value_tiles(const PageJob& job, uint16_t* rows) {
  for (int d = 0; d < job.dim; d += kTileTokens) {
    const uint16_t* tile = static_cast<const uint16_t*>(job.page) + d * job.page_tokens;
    for (int64_t t = 0; t < job.count; ++t) {
      const int64_t token = job.first + t;
      const uint16_t* from = tile + token / 2 * 2 * kTileTokens + token % 2;
      uint16_t* to = rows + t * job.dim + d;
      for (int n = 0; n < kTileTokens; ++n) to[n] = from[2 * n];
    }
  }
}

template <class V>
void read_page(const PageJob& job) {
  const char* page = static_cast<const char*>(job.page);
  switch (job.form) {
    case PageForm::kRows:
      std::memcpy(job.rows, page + job.first * job.dim * job.element_bytes,
                  static_cast<size_t>(job.count * job.dim * job.element_bytes));
      return;
    case PageForm::kColumns:
      if (job.element_bytes == 4)
        transpose_tokens<V>(static_cast<const uint32_t*>(job.page) + job.first, job.page_tokens, job.count, job.dim,
                            static_cast<uint32_t*>(job.rows));
      else
        transpose_narrow_tokens<V>(static_cast<const uint16_t*>(job.page) + job.first, job.page_tokens, job.count,
                                   job.dim, static_cast<uint16_t*>(job.rows));
      return;
    case PageForm::kKeyTiles:
      return read_key_tiles<V>(job, static_cast<uint32_t*>(job.rows));
    case PageForm::kValueTiles:
      return read_value_tiles(job, static_cast<uint16_t*>(job.rows));
  }
}

}  // namespace
}  // namespace gossamer
