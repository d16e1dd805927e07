// Weights in lanes, and their products with inputs: floats of any instruction set, or pairs of bf16.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/convert.h"
#include "kernels/linear_job.h"

namespace gossamer {
namespace {

inline int64_t bytes_of(ValueType type) {
  return type == ValueType::kFloat32 ? 4 : type == ValueType::kInt8 ? 1 : 2;
}

inline uint32_t word_at(const uint8_t* bits) {
  uint32_t word;
  std::memcpy(&word, bits, sizeof word);
  return word;
}

// Bits of the last columns, fewer than 64; no byte behind theirs is read.
inline uint64_t last_bits(const uint8_t* bits, int columns) {
  uint64_t word = 0;
  for (int n = 0; 8 * n < columns; ++n) word |= static_cast<uint64_t>(bits[n]) << 8 * n;
  return word & ((uint64_t{1} << columns) - 1);
}

inline uint32_t word_or_last(const uint8_t* bits, int columns) {
  return columns < kColumnStep ? static_cast<uint32_t>(last_bits(bits, columns)) : word_at(bits);
}

template <class V>
struct FloatLanes {
  using Vec = V;
  using Input = float;
  using Weight = typename V::Reg;
  using Codes = typename V::Codes;
  using Levels = typename V::Levels;
  static constexpr int kLanes = V::kWidth;
  static constexpr int kLevelRows = V::kWidth > 8 ? 4 : 2;  // as many as registers hold levels and codes of

  // Numbers from p on in the lanes whose bits are set; 0 in the others.
  template <ValueType kType>
  static Weight expand(const char* p, uint32_t bits) {
    if constexpr (kType == ValueType::kInt8)
      return V::expand_int8(p, bits);
    else if constexpr (kType == ValueType::kBFloat16)
      return V::template expand<DType::kBFloat16>(p, bits);
    else if constexpr (kType == ValueType::kFloat16)
      return V::template expand<DType::kFloat16>(p, bits);
    else
      return V::template expand<DType::kFloat32>(p, bits);
  }
  static Levels load_levels(const uint16_t* p, bool rounded) { return V::load_levels(p, rounded); }
  static Codes load_lane_codes(const uint8_t* p) { return V::load_lane_codes(p); }
  static Codes salient_lanes(uint32_t bits) { return V::salient_lanes(bits); }
  template <int kShift>
  static Weight level(const Levels& levels, Codes codes, Codes salient) {
    return V::template level<kShift>(levels, codes, salient);
  }
  static typename V::Reg add_product(Weight w, const Input* x, typename V::Reg sum) {
    return V::fma(w, V::load(x), sum);
  }
};

// Where an instruction set multiplies nothing but floats.
struct NoPairs {
  static constexpr bool kThere = false;
  static bool split(const void*, DType, int, int16_t*, int64_t, float*) { return false; }
};

template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

// Calls a function with a number of inputs that is known where it is compiled, from the largest that fits on.
template <class F>
inline void in_steps(int count, const F& function) {
  int n = 0;
  for (; n + 8 <= count; n += 8) function(n, Number<8>{});
  for (; n + 4 <= count; n += 4) function(n, Number<4>{});
  for (; n + 2 <= count; n += 2) function(n, Number<2>{});
  for (; n < count; ++n) function(n, Number<1>{});
}

}  // namespace
}  // namespace gossamer
