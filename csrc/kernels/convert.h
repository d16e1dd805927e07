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

template <class V>
inline void store_as(void* row, int d, DType dtype, typename V::Reg x) {
  if (dtype == DType::kBFloat16)
    V::store_bf16(static_cast<uint16_t*>(row) + d, x);
  else if (dtype == DType::kFloat16)
    V::store_fp16(static_cast<uint16_t*>(row) + d, x);
  else
    V::store(static_cast<float*>(row) + d, x);
}

inline void store_scalar(void* row, int d, DType dtype, float x) {
  if (dtype == DType::kBFloat16)
    static_cast<uint16_t*>(row)[d] = float_to_bf16(x);
  else if (dtype == DType::kFloat16)
    static_cast<uint16_t*>(row)[d] = float_to_fp16(x);
  else
    static_cast<float*>(row)[d] = x;
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
  for (; d + V::kWidth <= dim; d += V::kWidth) store_as<V>(out, d, dtype, V::mul(V::load(row + d), times));
  for (; d < dim; ++d) store_scalar(out, d, dtype, row[d] * factor);
}

}  // namespace
}  // namespace gossamer
