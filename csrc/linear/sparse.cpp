#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/integers.h"
#include "linear/inputs.h"

namespace gossamer {
namespace {

constexpr int64_t kRowsAtOnce = 64;

int64_t size_of(ValueType type) {
  return type == ValueType::kFloat32 ? 4 : type == ValueType::kInt8 ? 1 : 2;
}

// Where rows find their values. A row reads at most as many as the weight has columns, and a few behind them: rows that
// begin that near to the end, or whose start lies outside, get a copy with zeros behind it.
class Values {
 public:
  Values(const SparseWeight& weight, int64_t first, int64_t count) {
    const int64_t size = size_of(weight.type), most = weight.columns + kValueSlack;
    int64_t short_rows = 0;
    for (int64_t r = 0; r < count; ++r) short_rows += !enough(weight, first + r, most);
    copies_.resize(short_rows * most * size);
    char* copy = copies_.data();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t start = weight.starts[first + r];
      if (enough(weight, first + r, most)) {
        rows_[r] = weight.values + start * size;
        continue;
      }
      const int64_t there = start < 0 || start > weight.count ? 0 : std::min(weight.count - start, most);
      if (there > 0) std::memcpy(copy, weight.values + start * size, there * size);
      rows_[r] = copy;
      copy += most * size;
    }
  }
  const void* const* rows() const { return rows_; }

 private:
  static bool enough(const SparseWeight& weight, int64_t row, int64_t most) {
    const int64_t start = weight.starts[row];
    return start >= 0 && start <= weight.count - most;
  }
  std::vector<char> copies_;
  const void* rows_[kRowsAtOnce];
};

// Calls use(rows, first row, how many) for the rows in turn.
template <class F>
void in_batches(const SparseWeight& weight, int64_t first, int64_t end, const F& use) {
  const int64_t pitch = ceil_div(weight.columns, 8);
  for (int64_t r = first; r < end; r += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, end - r);
    const Values values(weight, r, count);
    use(SparseRows{static_cast<int>(count), static_cast<int>(weight.columns), weight.bitmap + r * pitch, pitch,
                   values.rows(), weight.type},
        r, count);
  }
}

InputForm form_of(const Kernels& kernels, ValueType type, DType inputs) {
  if (kernels.linear->pairs && inputs == DType::kBFloat16) {
    if (type == ValueType::kBFloat16) return InputForm::kPairs;
    if (type == ValueType::kInt8) return InputForm::kSplit;
  }
  return InputForm::kFloats;
}

}  // namespace

void multiply(const Kernels& kernels, const SparseWeight& weight, const Matrix& inputs, const void* bias,
              const Matrix& out, int threads) {
  const Inputs copied(*kernels.linear, inputs, form_of(kernels, weight.type, inputs.dtype), weight.columns,
                      ceil_div(weight.columns, kInputStep) * kInputStep);
  over_rows(weight.rows, weight.columns, threads, [&](int64_t first, int64_t end) {
    std::vector<float> sums(std::min(kRowsAtOnce, end - first) * inputs.rows);
    in_batches(weight, first, end, [&](const SparseRows& rows, int64_t row, int64_t count) {
      kernels.linear->sparse_sums(rows, copied.rows(), sums.data());
      finish(sums.data(), row, count, weight.scale, bias, out);
    });
  });
}

void make_whole(const Kernels& kernels, const SparseWeight& weight, int64_t first, const Matrix& out, int threads) {
  over_rows(out.rows, weight.columns, threads, [&](int64_t from, int64_t end) {
    in_batches(weight, first + from, first + end, [&](const SparseRows& rows, int64_t row, int64_t) {
      const float* scale = weight.scale == nullptr ? nullptr : weight.scale + row;
      kernels.linear->sparse_whole(rows, scale, out.dtype, out.data + (row - first) * out.stride,
                                   out.stride / (out.dtype == DType::kFloat32 ? 4 : 2));
    });
  });
}

}  // namespace gossamer
