// Rows that enter a linear layer, in uint8, and what their scale cuts off.
#pragma once

#include "kernels/convert.h"
#include "kernels/quantise_job.h"

namespace gossamer {
namespace {

// As torch does it: divided, rounded to even, clipped.
template <class V>
int64_t quantise_row(const QuantiseJob& job, Beyond* beyond) {
  const float limit = kTop * job.scale;
  const auto scale = V::set1(job.scale), top = V::set1(kTop), bottom = V::set1(-kTop), limits = V::set1(limit);
  auto spread = V::zero();  // 0, and NaN once a number is not finite
  float rest = 0.0f;
  int64_t count = 0;
  const auto list = [&](int d) {
    const float x = scalar_as_float(job.row, d, job.dtype);
    if (x > limit)
      beyond[count++] = {d, x - limit};
    else if (x < -limit)
      beyond[count++] = {d, x + limit};
  };
  int d = 0;
  for (; d + V::kWidth <= job.features; d += V::kWidth) {
    const auto x = load_as_float<V>(job.row, d, job.dtype);
    spread = V::fma(x, V::zero(), spread);
    if (V::any_greater(V::abs(x), limits))
      for (int t = 0; t < V::kWidth; ++t) list(d + t);
    const auto lower = V::max(V::div(x, scale), bottom);
    V::store_u8(job.out + d, V::select_less(lower, top, lower, top), kZeroAt);
  }
  for (; d < job.features; ++d) {
    const float x = scalar_as_float(job.row, d, job.dtype);
    rest += x * 0.0f;
    list(d);
    float q = x / job.scale;
    q = q < kTop ? q : kTop;
    q = q > -kTop ? q : -kTop;
    job.out[d] = static_cast<uint8_t>(static_cast<int>(__builtin_nearbyintf(q)) + kZeroAt);
  }
  return V::reduce_add(spread) + rest == 0.0f ? count : -1;
}

template <class V>
void add_beyond_to_row(const BeyondJob& job) {
  constexpr int kAhead = 4, kStep = kAhead * V::kWidth;
  int64_t n = 0;
  for (; n + kStep <= job.outputs; n += kStep) {
    typename V::Reg sums[kAhead];
    for (int t = 0; t < kAhead; ++t) sums[t] = V::zero();
    for (int64_t i = 0; i < job.count; ++i) {
      const auto value = V::set1(job.beyond[i].value);
      const int8_t* column = job.columns + job.beyond[i].feature * job.outputs + n;
#pragma GCC unroll 4
      for (int t = 0; t < kAhead; ++t) sums[t] = V::fma(value, V::load_s8(column + t * V::kWidth), sums[t]);
    }
    for (int t = 0; t < kAhead; ++t) {
      const int at = static_cast<int>(n) + t * V::kWidth;
      store_as<V>(job.out, at, job.dtype,
                  V::fma(sums[t], V::load(job.by_row + at), load_as_float<V>(job.out, at, job.dtype)));
    }
  }
  for (; n < job.outputs; ++n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < job.count; ++i)
      sum += job.beyond[i].value * job.columns[job.beyond[i].feature * job.outputs + n];
    const int at = static_cast<int>(n);
    store_scalar(job.out, at, job.dtype, scalar_as_float(job.out, at, job.dtype) + sum * job.by_row[n]);
  }
}

template <class V>
const QuantiseKernels* quantise_kernels() {
  static const QuantiseKernels kernels{quantise_row<V>, add_beyond_to_row<V>};
  return &kernels;
}

}  // namespace
}  // namespace gossamer
