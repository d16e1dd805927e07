// Packed weights of linear layers, allocated to the byte.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/half.h"
#include "linear/linear.h"
#include "problem.h"

namespace gossamer {

class WeightProblem {
 public:
  explicit WeightProblem(unsigned seed) : random(seed) {
    rows = 1 + random.below(random.one_of({3, 90}));
    columns = random.one_of({1, 31, 32, 33, 64, 130, 500, 4100}) + random.below(3);
    count = 1 + random.below(11);
    dtype = static_cast<DType>(random.below(3));
    type = static_cast<ValueType>(random.below(4));
    block = random.one_of({7, 128, 150, 256});
    const double share = random.one_of({0, 3, 7, 10}) / 10.0;
    bitmap.resize(rows * ((columns + 7) / 8));
    starts.push_back(0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c)
        if (random.chance(share)) {
          bitmap[r * ((columns + 7) / 8) + c / 8] |= static_cast<uint8_t>(1 << c % 8);
          add_value();
        }
      starts.push_back(static_cast<int64_t>(values.size()) / size());
      scale.push_back(0.5f + 0.01f * static_cast<float>(random.below(100)));
    }
    values.shrink_to_fit();  // nothing behind the last number
    x.resize(count * columns * (dtype == DType::kFloat32 ? 4 : 2));
    for (int64_t n = 0; n < count * columns; ++n) write(x.data(), n, dtype, random.normal());
    const LevelWeight shape = levels_view();
    codes.resize(rows * shape.slots() / 4);
    levels.resize(rows * shape.blocks() * kLevels);
    salient.resize(shape.slots() / 8);
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random.below(256));
    for (uint8_t& byte : salient) byte = static_cast<uint8_t>(random.below(256));
    for (uint16_t& level : levels) level = float_to_fp16(random.normal());
  }

  // Both weights' products are those of what they are when they are made whole, which the tests in Python compare.
  bool is_multiplied_right(const Kernels& kernels, int threads) {
    return is_right(kernels, sparse_view(), threads) && is_right(kernels, levels_view(), threads);
  }

  // Bits and starts that were written after they were checked: whatever comes out, nothing is read outside.
  void run_spoiled(const Kernels& kernels, int threads) {
    for (uint8_t& byte : bitmap) byte = static_cast<uint8_t>(random.below(256));
    for (int64_t& start : starts) start = random.one_of({-1, 0, 5, int64_t{1} << 62, static_cast<int64_t>(values.size())});
    multiplied(kernels, sparse_view(), threads);
    whole(kernels, sparse_view(), threads);
  }

 private:
  int64_t size() const { return type == ValueType::kFloat32 ? 4 : type == ValueType::kInt8 ? 1 : 2; }

  void add_value() {
    const size_t at = values.size();
    values.resize(at + size());
    if (type == ValueType::kInt8)
      values[at] = static_cast<char>(random.below(255) - 127);
    else
      write(values.data() + at, 0, static_cast<DType>(type), random.normal());
  }

  static void write(char* to, int64_t n, DType dtype, float value) {
    const uint16_t half = dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
    if (dtype == DType::kFloat32)
      std::memcpy(to + 4 * n, &value, 4);
    else
      std::memcpy(to + 2 * n, &half, 2);
  }
  static float read(const char* from, int64_t n, DType dtype) {
    float value;
    uint16_t half;
    if (dtype == DType::kFloat32) {
      std::memcpy(&value, from + 4 * n, 4);
      return value;
    }
    std::memcpy(&half, from + 2 * n, 2);
    return dtype == DType::kBFloat16 ? bf16_to_float(half) : fp16_to_float(half);
  }

  SparseWeight sparse_view() const {
    return {rows, columns, bitmap.data(), values.data(), type, static_cast<int64_t>(values.size()) / size(),
            starts.data(), type == ValueType::kInt8 ? scale.data() : nullptr};
  }
  LevelWeight levels_view() const {
    return {rows, columns, block, codes.data(), levels.data(), salient.data(), dtype == DType::kBFloat16};
  }

  template <class Weight>
  std::vector<char> multiplied(const Kernels& kernels, const Weight& weight, int threads) {
    const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
    std::vector<char> out(count * rows * element);
    multiply(kernels, weight, {x.data(), count, columns, columns * element, dtype}, nullptr,
             {out.data(), count, rows, rows * element, dtype}, threads);
    return out;
  }
  template <class Weight>
  std::vector<float> whole(const Kernels& kernels, const Weight& weight, int threads) {
    std::vector<float> out(rows * columns);
    make_whole(kernels, weight, 0, {reinterpret_cast<char*>(out.data()), rows, columns, columns * 4, DType::kFloat32},
               threads);
    return out;
  }
  template <class Weight>
  bool is_right(const Kernels& kernels, const Weight& weight, int threads) {
    const std::vector<float> all = whole(kernels, weight, threads);
    const std::vector<char> out = multiplied(kernels, weight, threads);
    for (int64_t n = 0; n < count; ++n)
      for (int64_t r = 0; r < rows; ++r) {
        double sum = 0.0, most = 0.01;
        for (int64_t c = 0; c < columns; ++c) {
          const double product = double{read(x.data(), n * columns + c, dtype)} * all[r * columns + c];
          sum += product;
          most += std::fabs(product);
        }
        if (!(std::fabs(read(out.data(), n * rows + r, dtype) - sum) <= 0.01 * most)) return false;
      }
    return true;
  }

  Random random;
  int64_t rows, columns, count, block;
  DType dtype;
  ValueType type;
  std::vector<uint8_t> bitmap, codes, salient;
  std::vector<char> values, x;
  std::vector<int64_t> starts;
  std::vector<float> scale;
  std::vector<uint16_t> levels;
};

}  // namespace gossamer
