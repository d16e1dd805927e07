// What enters a linear layer in int8, and what its scale cut off.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/quantise_job.h"

namespace gossamer {

// A matrix [rows, columns], rows contiguous; the stride in bytes.
struct MatrixView {
  char* data;
  int64_t rows, columns, stride;
  DType dtype;
};

class QuantisedInputs {
 public:
  // Writes uint8 [rows, columns] and remembers the rest.
  QuantisedInputs(const Kernels& kernels, const MatrixView& x, float scale, uint8_t* out, int threads);

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t beyond() const { return static_cast<int64_t>(beyond_.size()); }
  // Rows with a number that is not finite, which are all 0 in uint8.
  const std::vector<int64_t>& lost() const { return lost_; }

  // out [rows, outputs] += what was cut off, times int8 [outputs, columns] with a scale of each row.
  void add(const int8_t* weight, const float* by_row, const MatrixView& out, int threads) const;

 private:
  const Kernels& kernels_;
  int64_t rows_, columns_;
  std::vector<int64_t> starts_;  // of each row's in beyond_
  std::vector<Beyond> beyond_;
  std::vector<int64_t> lost_;
};

}  // namespace gossamer
