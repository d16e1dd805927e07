#include <algorithm>
#include <vector>

#include "linear/inputs.h"

namespace gossamer {
namespace {

LevelRows rows_of(const LevelWeight& weight, int64_t first, int64_t end) {
  const int64_t codes_pitch = weight.slots() / 4, levels_pitch = weight.blocks() * kLevels;
  return {static_cast<int>(end - first),
          static_cast<int>(weight.blocks()),
          static_cast<int>(weight.groups()),
          weight.codes + first * codes_pitch,
          codes_pitch,
          weight.levels + first * levels_pitch,
          levels_pitch,
          weight.salient,
          weight.rounded};
}

}  // namespace

void multiply(const Kernels& kernels, const LevelWeight& weight, const Matrix& inputs, const void* bias,
              const Matrix& out, int threads) {
  const bool pairs = kernels.linear->pairs && inputs.dtype == DType::kBFloat16;
  const Inputs copied(*kernels.linear, inputs, pairs ? InputForm::kPairs : InputForm::kFloats, weight.block,
                      weight.groups() * kSlots);
  over_rows(weight.rows, weight.columns, threads, [&](int64_t first, int64_t end) {
    std::vector<float> sums((end - first) * inputs.rows);
    LevelRows rows = rows_of(weight, first, end);
    rows.rounded |= inputs.dtype == DType::kBFloat16;
    kernels.linear->level_sums(rows, copied.rows(), sums.data());
    finish(sums.data(), first, end - first, nullptr, bias, out);
  });
}

void make_whole(const Kernels& kernels, const LevelWeight& weight, int64_t first, const Matrix& out, int threads) {
  over_rows(out.rows, weight.columns, threads, [&](int64_t from, int64_t end) {
    kernels.linear->level_whole(rows_of(weight, first + from, first + end), static_cast<int>(weight.block),
                                static_cast<int>(weight.columns), out.dtype, out.data + from * out.stride,
                                out.stride / (out.dtype == DType::kFloat32 ? 4 : 2));
  });
}

}  // namespace gossamer
