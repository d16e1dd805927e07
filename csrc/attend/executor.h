// A plan in plain pointers, and its execution.
#pragma once

#include <cstdint>

#include "kernels/job.h"

namespace gossamer {

// A [batch, heads, tokens, dim] tensor whose last dimension is contiguous; strides in elements.
struct TensorView {
  char* data;
  int64_t stride[3];

  char* row(int64_t b, int64_t head, int64_t row, int64_t element) const {
    return data + (b * stride[0] + head * stride[1] + row * stride[2]) * element;
  }
};

inline int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct PlanView {
  int64_t batch, heads, query_len, key_len, block_q, block_k, column_group;
  const int64_t* block_indptr;
  const int32_t* block_indices;
  const int64_t* column_indptr;
  const int32_t* column_indices;
  const int32_t* sink;
  const int32_t* window;
  const int32_t* q_order;  // null: not permuted
  const int32_t* k_order;
  const int64_t* query_start;
  const int64_t* key_start;
  const int64_t* key_count;
  int64_t limit;  // kUnlimited: none
  bool causal;
};

struct Call {
  TensorView q, k, v, out;
  float* lse;  // [batch, query_heads, query_len], contiguous
  const float* sinks;
  int64_t query_heads, groups;
  int head_dim, value_dim;
  DType dtype;
  float scale, softcap;
  int threads;
};

void execute(const Kernels& kernels, const PlanView& plan, const Call& call);

}  // namespace gossamer
