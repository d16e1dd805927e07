// Results of the stretches of keys that panels run over, until they are merged by their log-sum-exp.
#pragma once

#include <cstdint>
#include <vector>

#include "attend/operands.h"
#include "runtime/workspace.h"

namespace gossamer {

class Partials {
 public:
  void place(Pieces& pieces, int64_t stretches, int64_t most_rows, int64_t value_dim);
  // Has a panel write its results of a stretch here; the first stretch counts the sinks.
  void direct(Panel& panel, int64_t stretch, bool first);
  // out = sum of exp(lse_s - lse) out_s with lse = log sum exp(lse_s), in order, so that nothing depends on threads.
  void merge(const PanelRows& rows, int64_t first_stretch, int64_t stretches, DType dtype) const;

 private:
  float* lse(int64_t stretch, int64_t row) const { return lse_ + stretch * most_rows_ + row; }
  float* out(int64_t stretch, int64_t row) const { return out_ + (stretch * most_rows_ + row) * value_dim_; }
  void merge_row(int64_t row, const PanelRows& rows, int64_t begin, int64_t end, DType dtype,
                 std::vector<double>& sums) const;

  int64_t most_rows_ = 0, value_dim_ = 0;
  float *lse_ = nullptr, *out_ = nullptr;  // of each stretch and row
  void** outputs_ = nullptr;               // where panels write them
  float** lses_ = nullptr;
};

}  // namespace gossamer
