// Rows of a weight of a few levels: a code's level is found in a register, and multiplied there.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/linear_lanes.h"

namespace gossamer {
namespace {

inline uint32_t salient_at(const uint8_t* bits, int slot) {
  uint32_t word;
  std::memcpy(&word, bits + slot / 32 * 4, sizeof word);
  return word >> slot % 32;
}

// The levels of 128 columns, in lanes: use(first column, which row, lanes).
template <class E, int kRows, class F>
inline __attribute__((always_inline)) void each_level(const typename E::Levels* levels, const uint8_t* const* codes,
                                                      const uint8_t* salient, const F& use) {
#pragma GCC unroll 8
  for (int part = 0; part < kCodeBytes / E::kLanes; ++part) {
    typename E::Codes own[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) own[r] = E::load_lane_codes(codes[r] + part * E::kLanes);
    const int first = part * E::kLanes;
    const auto quarter = [&](auto number) __attribute__((always_inline)) {
      constexpr int kQuarter = decltype(number)::value;
      const int column = kQuarter * kCodeBytes + first;
      const auto marks = E::salient_lanes(salient_at(salient, column));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) use(column, r, E::template level<2 * kQuarter>(levels[r], own[r], marks));
    };
    quarter(Number<0>{});
    quarter(Number<1>{});
    quarter(Number<2>{});
    quarter(Number<3>{});
  }
}

// kRows rows times kInputs inputs. Chains are sums that do not wait for each other.
template <class E, int kRows, int kInputs>
void level_rows(const LevelRows& rows, int row, const typename E::Input* x, int64_t pitch, float* sums,
                int64_t sums_pitch) {
  using V = typename E::Vec;
  constexpr int kChains = kInputs == 1 ? 2 : 1;
  typename V::Reg sum[kChains][kRows][kInputs];
#pragma GCC unroll 2
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < kInputs; ++n) sum[c][r][n] = V::zero();
  const uint8_t* codes[kRows];
  for (int r = 0; r < kRows; ++r) codes[r] = rows.codes + (row + r) * rows.codes_pitch;
  int64_t at = 0;
  for (int block = 0; block < rows.blocks; ++block) {
    typename E::Levels levels[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      levels[r] = E::load_levels(rows.levels + (row + r) * rows.levels_pitch + block * kLevels, rows.rounded);
    for (int group = 0; group < rows.groups; ++group, at += kSlots) {
      each_level<E, kRows>(levels, codes, rows.salient + at / 8, [&](int column, int r, typename E::Weight w) {
        const int chain = column / kCodeBytes % kChains;
#pragma GCC unroll 8
        for (int n = 0; n < kInputs; ++n)
          sum[chain][r][n] = E::add_product(w, x + n * pitch + at + column, sum[chain][r][n]);
      });
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        // The same place of the rows that are next: several short rows are no stream that the processor would follow.
        __builtin_prefetch(codes[r] + kRows * rows.codes_pitch);
        codes[r] += kCodeBytes;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < kInputs; ++n) {
      if (kChains > 1) sum[0][r][n] = V::add(sum[0][r][n], sum[kChains - 1][r][n]);
      sums[r * sums_pitch + n] = V::reduce_add(sum[0][r][n]);
    }
}

template <class E>
void level_sums_of(const LevelRows& rows, const InputRows& inputs, float* sums) {
  const auto* x = static_cast<const typename E::Input*>(inputs.data);
  const auto some = [&](int row, auto count) {
    in_steps(inputs.count, [&](int first, auto number) {
      constexpr int kInputs = decltype(number)::value, kAtOnce = kInputs > 4 ? 1 : decltype(count)::value;
      for (int r = row; r < row + decltype(count)::value; r += kAtOnce)
        level_rows<E, kAtOnce, kInputs>(rows, r, x + first * inputs.pitch, inputs.pitch,
                                        sums + int64_t{r} * inputs.count + first, inputs.count);
    });
  };
  int row = 0;
  for (; row + E::kLevelRows <= rows.rows; row += E::kLevelRows) some(row, Number<E::kLevelRows>{});
  for (; row < rows.rows; ++row) some(row, Number<1>{});
}

template <class V, class Pairs>
void level_sums(const LevelRows& rows, const InputRows& inputs, float* sums) {
  if constexpr (Pairs::kThere)
    if (inputs.form == InputForm::kPairs) return level_sums_of<Pairs>(rows, inputs, sums);
  level_sums_of<FloatLanes<V>>(rows, inputs, sums);
}

template <class V>
void level_whole(const LevelRows& rows, int block, int columns, DType dtype, void* out, int64_t pitch) {
  using E = FloatLanes<V>;
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  alignas(64) float found[kSlots];
  for (int r = 0; r < rows.rows; ++r) {
    const uint8_t* codes = rows.codes + r * rows.codes_pitch;
    char* row = static_cast<char*>(out) + r * pitch * size;
    for (int n = 0; n < rows.blocks; ++n) {
      const auto levels = E::load_levels(rows.levels + r * rows.levels_pitch + n * kLevels, rows.rounded);
      const int live = n + 1 < rows.blocks ? block : columns - n * block;
      for (int group = 0; group < rows.groups; ++group, codes += kCodeBytes) {
        const uint8_t* salient = rows.salient + (int64_t{n} * rows.groups + group) * kSlots / 8;
        each_level<E, 1>(&levels, &codes, salient,
                         [&](int column, int, typename V::Reg w) { V::store(found + column, w); });
        const int rest = live - group * kSlots;
        if (rest > 0)
          narrow_row<V>(found, dtype, rest < kSlots ? rest : kSlots, 1.0f,
                        row + (int64_t{n} * block + group * kSlots) * size);
      }
    }
  }
}

}  // namespace
}  // namespace gossamer
