// A plan in plain pointers; see SparsePlan in plan/plan.py.
#pragma once

#include <cstdint>

#include "kernels/integers.h"
#include "plan/extent.h"

namespace gossamer {

// Rows of ascending indices, one behind the other.
struct Lists {
  const int64_t* indptr;
  const int32_t* indices;

  const int32_t* begin(int64_t row) const { return indices + indptr[row]; }
  const int32_t* end(int64_t row) const { return indices + indptr[row + 1]; }
  int64_t size(int64_t row) const { return indptr[row + 1] - indptr[row]; }
};

struct Plan {
  Extent extent;
  int64_t heads, query_len, key_len, block_q, block_k, column_group;
  Lists blocks, columns;
  const int32_t* sink;
  const int32_t* window;
  const int32_t* q_order;  // null: not permuted
  const int32_t* k_order;

  int64_t batch() const { return extent.batch; }
  int64_t query_blocks() const { return ceil_div(query_len, block_q); }
  int64_t column_groups() const { return ceil_div(query_blocks(), column_group); }
  // Rows of the lists.
  int64_t block_list(int64_t b, int64_t head, int64_t block) const {
    return (b * heads + head) * query_blocks() + block;
  }
  int64_t column_list(int64_t b, int64_t head, int64_t block) const {
    return (b * heads + head) * column_groups() + block / column_group;
  }
};

}  // namespace gossamer
