// Rows of fp32, bf16 or fp16 to floats and back.
#pragma once

#include <cstdint>

#include "kernels/half.h"
#include "kernels/job.h"

namespace gossamer {
namespace {

template <class V>
inline typename V::Reg load_as_float(const void* row, int d, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return V::load_bf16(static_cast<const uint16_t*>(row) + d);
    case DType::kFloat16:
      return V::load_fp16(static_cast<const uint16_t*>(row) + d);
    default:
      return V::load(static_cast<const float*>(row) + d);
  }
}

inline float scalar_as_float(const void* row, int d, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(row)[d]);
    case DType::kFloat16:
      return fp16_to_float(static_cast<const uint16_t*>(row)[d]);
    default:
      return static_cast<const float*>(row)[d];
  }
}

// A row of dim values as floats, times a factor, zero up to padded.
template <class V>
inline void widen_row(const void* row, DType dtype, int dim, int padded, float factor, float* out) {
  const auto times = V::set1(factor);
  int d = 0;
  for (; d + V::kWidth <= dim; d += V::kWidth) V::store(out + d, V::mul(load_as_float<V>(row, d, dtype), times));
  for (; d < dim; ++d) out[d] = scalar_as_float(row, d, dtype) * factor;
  for (; d < padded; ++d) out[d] = 0.0f;
}

// Floats, times a factor, to a row of dim values.
template <class V>
inline void narrow_row(const float* row, DType dtype, int dim, float factor, void* out) {
  const auto times = V::set1(factor);
  int d = 0;
  for (; d + V::kWidth <= dim; d += V::kWidth) {
    const auto x = V::mul(V::load(row + d), times);
    if (dtype == DType::kBFloat16)
      V::store_bf16(static_cast<uint16_t*>(out) + d, x);
    else if (dtype == DType::kFloat16)
      V::store_fp16(static_cast<uint16_t*>(out) + d, x);
    else
      V::store(static_cast<float*>(out) + d, x);
  }
  for (; d < dim; ++d) {
    const float x = row[d] * factor;
    if (dtype == DType::kBFloat16)
      static_cast<uint16_t*>(out)[d] = float_to_bf16(x);
    else if (dtype == DType::kFloat16)
      static_cast<uint16_t*>(out)[d] = float_to_fp16(x);
    else
      static_cast<float*>(out)[d] = x;
  }
}

}  // namespace
}  // namespace gossamer
