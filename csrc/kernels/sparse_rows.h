// Rows of a weight with zeros: numbers are spread over the lanes that their bits name, and multiplied there.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/linear_lanes.h"

namespace gossamer {
namespace {

// Numbers of 32 columns, vector by vector; p moves on behind them.
template <class E, ValueType kType, class F>
inline __attribute__((always_inline)) void spread(uint32_t bits, const char*& p, const F& use) {
  constexpr int kParts = kColumnStep / E::kLanes;
  constexpr uint32_t kMask = E::kLanes == 32 ? ~uint32_t{0} : (uint32_t{1} << (E::kLanes % 32)) - 1;
  const int64_t size = bytes_of(kType);
#pragma GCC unroll 8
  for (int part = 0; part < kParts; ++part) {
    const int first = part * E::kLanes;
    // Counted from the word's first bit, so that no vector waits for the one before it.
    const int before = first == 0 ? 0 : __builtin_popcount(bits & ((uint32_t{1} << first) - 1));
    use(part, E::template expand<kType>(p + before * size, bits >> first & kMask));
  }
  p += __builtin_popcount(bits) * size;
}

// One row times kInputs inputs. Chains are sums that do not wait for each other.
template <class E, ValueType kType, int kInputs>
void sparse_row(const uint8_t* bitmap, const char* p, int columns, const typename E::Input* x, int64_t pitch,
                float* sums) {
  using V = typename E::Vec;
  constexpr int kParts = kColumnStep / E::kLanes, kChains = kInputs == 1 ? 4 : kInputs == 2 ? 2 : 1;
  constexpr int kWords = kChains > kParts ? kChains / kParts : 1;
  typename V::Reg sum[kInputs][kChains];
#pragma GCC unroll 8
  for (int n = 0; n < kInputs; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) sum[n][c] = V::zero();
  const auto add = [&](int chain, typename E::Weight w, const typename E::Input* at) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int n = 0; n < kInputs; ++n) sum[n][chain] = E::add_product(w, at + n * pitch, sum[n][chain]);
  };
  int c = 0;
  for (; c + kWords * kColumnStep <= columns; c += kWords * kColumnStep) {
#pragma GCC unroll 4
    for (int word = 0; word < kWords; ++word)
      spread<E, kType>(word_at(bitmap + c / 8 + 4 * word), p, [&](int part, typename E::Weight w) {
        const int vector = word * kParts + part;
        add(vector % kChains, w, x + c + vector * E::kLanes);
      });
  }
  for (; c < columns; c += kColumnStep) {
    const uint32_t bits = word_or_last(bitmap + c / 8, columns - c);
    spread<E, kType>(bits, p,
                     [&](int part, typename E::Weight w) { add(part % kChains, w, x + c + part * E::kLanes); });
  }
#pragma GCC unroll 8
  for (int n = 0; n < kInputs; ++n) {
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) sum[n][0] = V::add(sum[n][0], sum[n][chain]);
    sums[n] = V::reduce_add(sum[n][0]);
  }
}

template <class E, ValueType kType>
void sparse_sums_of(const SparseRows& rows, const InputRows& inputs, float* sums) {
  const auto* x = static_cast<const typename E::Input*>(inputs.data);
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* bitmap = rows.bitmap + r * rows.bitmap_pitch;
    const char* values = static_cast<const char*>(rows.values[r]);
    in_steps(inputs.count, [&](int first, auto number) {
      sparse_row<E, kType, decltype(number)::value>(bitmap, values, rows.columns, x + first * inputs.pitch,
                                                    inputs.pitch, sums + int64_t{r} * inputs.count + first);
    });
  }
}

template <class V, class Pairs>
void sparse_sums(const SparseRows& rows, const InputRows& inputs, float* sums) {
  if constexpr (Pairs::kThere) {
    if (inputs.form == InputForm::kPairs) return sparse_sums_of<Pairs, ValueType::kBFloat16>(rows, inputs, sums);
    if (inputs.form == InputForm::kSplit) return Pairs::split_sums(rows, inputs, sums);
  }
  using E = FloatLanes<V>;
  switch (rows.type) {
    case ValueType::kBFloat16:
      return sparse_sums_of<E, ValueType::kBFloat16>(rows, inputs, sums);
    case ValueType::kFloat16:
      return sparse_sums_of<E, ValueType::kFloat16>(rows, inputs, sums);
    case ValueType::kInt8:
      return sparse_sums_of<E, ValueType::kInt8>(rows, inputs, sums);
    default:
      return sparse_sums_of<E, ValueType::kFloat32>(rows, inputs, sums);
  }
}

template <class V, ValueType kType>
void whole_sparse_row(const uint8_t* bitmap, const char* p, int columns, float scale, DType dtype, char* out) {
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  const auto factor = V::set1(scale);
  float last[kColumnStep];
  for (int c = 0; c < columns; c += kColumnStep) {
    const bool whole = columns - c >= kColumnStep;
    const uint32_t bits = word_or_last(bitmap + c / 8, columns - c);
    spread<FloatLanes<V>, kType>(bits, p, [&](int part, typename V::Reg w) {
      if constexpr (kType == ValueType::kInt8) w = V::mul(w, factor);
      if (whole)
        store_as<V>(out + c * size, part * V::kWidth, dtype, w);
      else
        V::store(last + part * V::kWidth, w);
    });
    if (!whole)
      for (int n = 0; n < columns - c; ++n) store_scalar(out + c * size, n, dtype, last[n]);
  }
}

template <class V>
void sparse_whole(const SparseRows& rows, const float* scale, DType dtype, void* out, int64_t pitch) {
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* bitmap = rows.bitmap + r * rows.bitmap_pitch;
    const char* values = static_cast<const char*>(rows.values[r]);
    char* to = static_cast<char*>(out) + r * pitch * (dtype == DType::kFloat32 ? 4 : 2);
    const float factor = scale == nullptr ? 1.0f : scale[r];
    switch (rows.type) {
      case ValueType::kBFloat16:
        whole_sparse_row<V, ValueType::kBFloat16>(bitmap, values, rows.columns, factor, dtype, to);
        break;
      case ValueType::kFloat16:
        whole_sparse_row<V, ValueType::kFloat16>(bitmap, values, rows.columns, factor, dtype, to);
        break;
      case ValueType::kInt8:
        whole_sparse_row<V, ValueType::kInt8>(bitmap, values, rows.columns, factor, dtype, to);
        break;
      default:
        whole_sparse_row<V, ValueType::kFloat32>(bitmap, values, rows.columns, factor, dtype, to);
    }
  }
}

}  // namespace
}  // namespace gossamer
