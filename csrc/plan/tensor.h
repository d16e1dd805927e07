// Tensors of the caller, in plain pointers.
#pragma once

#include <cstdint>

#include "kernels/job.h"

namespace gossamer {

inline int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// [batch, heads, tokens, dim], the last dimension contiguous; strides in bytes.
struct TensorView {
  char* data;
  int64_t batch, heads, tokens;
  int dim;
  int64_t batch_stride, head_stride, token_stride;
  DType dtype;

  int64_t row_bytes() const { return int64_t{dim} * element_size(dtype); }
  char* row(int64_t b, int64_t head, int64_t token) const {
    return data + b * batch_stride + head * head_stride + token * token_stride;
  }
};

}  // namespace gossamer
