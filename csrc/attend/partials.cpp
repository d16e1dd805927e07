#include "attend/partials.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/half.h"

namespace gossamer {
namespace {

void store(float x, DType dtype, void* row, size_t d) {
  if (dtype == DType::kBFloat16)
    static_cast<uint16_t*>(row)[d] = float_to_bf16(x);
  else if (dtype == DType::kFloat16)
    static_cast<uint16_t*>(row)[d] = float_to_fp16(x);
  else
    static_cast<float*>(row)[d] = x;
}

}  // namespace

void Partials::place(Pieces& pieces, int64_t stretches, int64_t most_rows, int64_t value_dim) {
  most_rows_ = most_rows;
  value_dim_ = value_dim;
  lse_ = reinterpret_cast<float*>(pieces.take(stretches * most_rows * sizeof(float)));
  out_ = reinterpret_cast<float*>(pieces.take(stretches * most_rows * value_dim * sizeof(float)));
  outputs_ = reinterpret_cast<void**>(pieces.take(stretches * most_rows * sizeof(void*)));
  lses_ = reinterpret_cast<float**>(pieces.take(stretches * most_rows * sizeof(float*)));
}

void Partials::direct(Panel& panel, int64_t stretch, bool first) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    outputs_[stretch * most_rows_ + r] = out(stretch, r);
    lses_[stretch * most_rows_ + r] = lse(stretch, r);
  }
  panel.outputs = outputs_ + stretch * most_rows_;
  panel.lse = lses_ + stretch * most_rows_;
  panel.output_dtype = DType::kFloat32;
  if (!first) panel.sink_logits = nullptr;
}

void Partials::merge(const PanelRows& rows, int64_t first_stretch, int64_t stretches, DType dtype) const {
  std::vector<double> sums(value_dim_);
  for (int64_t r = 0; r < rows.size(); ++r) merge_row(r, rows, first_stretch, first_stretch + stretches, dtype, sums);
}

void Partials::merge_row(int64_t row, const PanelRows& rows, int64_t begin, int64_t end, DType dtype,
                         std::vector<double>& sums) const {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float top = kNothing;
  for (int64_t s = begin; s < end; ++s) {
    const float own = *lse(s, row);
    if (!(own <= top) && top == top) top = own;  // a NaN stays
  }
  double total = 0.0;
  for (int64_t s = begin; s < end; ++s) {
    const float own = *lse(s, row);
    total += own == top ? 1.0 : std::exp(double{own} - top);
  }
  const double all = top == kNothing ? double{kNothing} : top + std::log(total);
  std::fill(sums.begin(), sums.end(), 0.0);
  for (int64_t s = begin; s < end; ++s) {
    if (*lse(s, row) == kNothing || std::isinf(all)) continue;  // a sink of infinity takes all
    const double weight = std::exp(*lse(s, row) - all);
    const float* own = out(s, row);
    for (size_t d = 0; d < sums.size(); ++d) sums[d] += weight * own[d];
  }
  *rows.lse(row) = static_cast<float>(all);
  for (size_t d = 0; d < sums.size(); ++d) store(static_cast<float>(sums[d]), dtype, rows.output(row), d);
}

}  // namespace gossamer
