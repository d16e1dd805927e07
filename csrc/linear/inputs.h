// What products of packed weights share: inputs in the form that kernels read, work in parts, sums that become outputs.
#pragma once

#include <cstdint>
#include <functional>

#include "linear/linear.h"
#include "runtime/workspace.h"

namespace gossamer {

// Copies of inputs in a form that kernels read; a row's end is padded with zeros.
class Inputs {
 public:
  // Of each `block` columns, `slots` are made. Inputs that are not finite are not split, but floats.
  Inputs(const LinearKernels& kernels, const Matrix& inputs, InputForm form, int64_t block, int64_t slots);
  const InputRows& rows() const { return rows_; }

 private:
  bool split(const LinearKernels& kernels, const Matrix& inputs, int64_t pitch);

  KeptBuffer buffer_;
  InputRows rows_;
};

// Calls job(first, end) for ranges of a weight's rows, on several threads where that pays.
void over_rows(int64_t rows, int64_t columns, int threads, const std::function<void(int64_t, int64_t)>& job);

// Sums [rows][inputs] to columns first .. first + rows - 1 of outputs.
void finish(const float* sums, int64_t first, int64_t rows, const float* scale, const void* bias, const Matrix& out);

}  // namespace gossamer
