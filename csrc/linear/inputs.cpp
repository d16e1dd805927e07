#include "linear/inputs.h"

#include <algorithm>
#include <cstring>

#include "kernels/half.h"
#include "kernels/integers.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

// Weights that a thread works on before it asks for more, and those below which another thread costs more than it does.
constexpr int64_t kWeightsAJob = 1 << 17;
constexpr int64_t kWeightsForThreads = 1 << 16;
constexpr int64_t kLeastRows = 8;

float input_at(const char* row, int64_t n, DType dtype) {
  if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row)[n];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[n];
  return dtype == DType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

void widen(const char* from, DType dtype, int64_t count, float* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  if (dtype == DType::kBFloat16)
    for (int64_t n = 0; n < count; ++n) to[n] = bf16_to_float(bits[n]);
  else
    for (int64_t n = 0; n < count; ++n) to[n] = fp16_to_float(bits[n]);
}

}  // namespace

Inputs::Inputs(const LinearKernels& kernels, const Matrix& inputs, InputForm form, int64_t block, int64_t slots) {
  const int64_t blocks = ceil_div(inputs.columns, block), pitch = blocks * slots;
  if (form == InputForm::kSplit) {
    if (split(kernels, inputs, pitch)) return;
    form = InputForm::kFloats;
  }
  const int64_t size = form == InputForm::kPairs ? 2 : 4;
  char* to = buffer_.reserve(inputs.rows * pitch * size);
  for (int64_t r = 0; r < inputs.rows; ++r)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * block, live = std::min(block, inputs.columns - first);
      const char* from = inputs.data + r * inputs.stride;
      char* own = to + (r * pitch + b * slots) * size;
      if (form == InputForm::kPairs || inputs.dtype == DType::kFloat32)
        std::memcpy(own, from + first * size, live * size);
      else
        widen(from + 2 * first, inputs.dtype, live, reinterpret_cast<float*>(own));
      std::memset(own + live * size, 0, (slots - live) * size);
    }
  rows_ = {to, pitch, static_cast<int>(inputs.rows), form, nullptr};
}

bool Inputs::split(const LinearKernels& kernels, const Matrix& inputs, int64_t pitch) {
  char* to = buffer_.reserve(inputs.rows * (4 * pitch + 4));
  auto* scales = reinterpret_cast<float*>(to + inputs.rows * 4 * pitch);
  for (int64_t r = 0; r < inputs.rows; ++r)
    if (!kernels.split(inputs.data + r * inputs.stride, inputs.dtype, static_cast<int>(inputs.columns),
                       reinterpret_cast<int16_t*>(to + r * 4 * pitch), pitch, scales + r))
      return false;
  rows_ = {to, pitch, static_cast<int>(inputs.rows), InputForm::kSplit, scales};
  return true;
}

void over_rows(int64_t rows, int64_t columns, int threads, const std::function<void(int64_t, int64_t)>& job) {
  if (rows * columns < kWeightsForThreads || threads <= 1) return job(0, rows);
  const int64_t even = ceil_div(rows, 2 * int64_t{threads});
  const int64_t step = std::max(kLeastRows, std::min(even, ceil_div(kWeightsAJob, std::max<int64_t>(1, columns))));
  run_parallel(threads, ceil_div(rows, step),
               [&](int, int64_t n) { job(n * step, std::min(rows, (n + 1) * step)); });
}

void finish(const float* sums, int64_t first, int64_t rows, const float* scale, const void* bias, const Matrix& out) {
  constexpr int64_t kPart = 64;
  float made[kPart];
  for (int64_t n = 0; n < out.rows; ++n)
    for (int64_t begin = 0; begin < rows; begin += kPart) {
      const int64_t row = first + begin, count = std::min(kPart, rows - begin);
      for (int64_t r = 0; r < count; ++r) made[r] = sums[(begin + r) * out.rows + n];
      if (scale != nullptr)
        for (int64_t r = 0; r < count; ++r) made[r] *= scale[row + r];
      if (bias != nullptr)
        for (int64_t r = 0; r < count; ++r)
          made[r] += input_at(static_cast<const char*>(bias), row + r, out.dtype);
      char* to = out.data + n * out.stride;
      auto* halves = reinterpret_cast<uint16_t*>(to) + row;
      if (out.dtype == DType::kFloat32)
        std::memcpy(reinterpret_cast<float*>(to) + row, made, count * sizeof *made);
      else if (out.dtype == DType::kBFloat16)
        for (int64_t r = 0; r < count; ++r) halves[r] = float_to_bf16(made[r]);
      else
        for (int64_t r = 0; r < count; ++r) halves[r] = float_to_fp16(made[r]);
    }
}

}  // namespace gossamer
