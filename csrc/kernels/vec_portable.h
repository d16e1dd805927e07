// Vectors of 4 floats by the compilers' vector extension: any machine that gcc or clang knows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/half.h"
#include "kernels/job.h"
#include "kernels/polynomials.h"

namespace gossamer {
namespace {

struct VecPortable {
  static constexpr int kWidth = 4;
  static constexpr int kGemmRows = 4;
  static constexpr int kGemmCols = 2;
  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Lanes __attribute__((vector_size(16)));

  static Reg zero() { return Reg{0, 0, 0, 0}; }
  static Reg set1(float x) { return Reg{x, x, x, x}; }
  static Reg load(const float* p) {
    Reg x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, Reg x) { std::memcpy(p, &x, sizeof x); }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg max(Reg a, Reg b) { return pick(a > b, a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg abs(Reg a) { return (Reg)((Lanes)a & 0x7fffffff); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return (Reg)(((Lanes)magnitude & 0x7fffffff) | ((Lanes)sign & INT32_MIN));
  }
  static Reg select(uint64_t bits, Reg kept, Reg other) {
    const int32_t word = static_cast<int32_t>(bits & 15);
    const Lanes lane = {1, 2, 4, 8};
    return pick((Lanes{word, word, word, word} & lane) == lane, kept, other);
  }
  static Reg select_less(Reg a, Reg b, Reg kept, Reg other) { return pick(a < b, kept, other); }
  static bool any_greater(Reg a, Reg b) {
    const Lanes c = a > b;
    return (c[0] | c[1] | c[2] | c[3]) != 0;
  }
  static float reduce_max(Reg a) {
    const float x = a[0] > a[1] ? a[0] : a[1];
    const float y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }
  static float reduce_add(Reg a) { return (a[0] + a[1]) + (a[2] + a[3]); }

  // In a register, where the compiler would load it again for each use.
  static Reg keep(Reg x) {
    return x;
  }

  // The sum of each of 8 vectors.
  static void reduce_each(const Reg* x, float* sums) {
    for (int n = 0; n < 8; ++n) sums[n] = reduce_add(x[n]);
  }

  // 4 codes of some bits, the first in the lowest.
  template <int kBits>
  static Reg load_codes(const uint8_t* p) {
    Reg x;
    for (int t = 0; t < 4; ++t)
      x[t] = static_cast<float>(p[t * kBits / 8] >> (t * kBits % 8) & ((1 << kBits) - 1));
    return x;
  }

  // The elements from p on in the lanes whose bits are set, 0 in the others.
  template <DType kDType>
  static Reg expand(const char* p, uint32_t bits) {
    Reg x = zero();
    for (int t = 0, found = 0; t < 4; ++t) {
      if ((bits >> t & 1) == 0) continue;
      if constexpr (kDType == DType::kFloat32)
        x[t] = reinterpret_cast<const float*>(p)[found];
      else if constexpr (kDType == DType::kBFloat16)
        x[t] = bf16_to_float(reinterpret_cast<const uint16_t*>(p)[found]);
      else
        x[t] = fp16_to_float(reinterpret_cast<const uint16_t*>(p)[found]);
      ++found;
    }
    return x;
  }

  // The same of int8, as numbers.
  static Reg expand_int8(const char* p, uint32_t bits) {
    Reg x = zero();
    for (int t = 0, found = 0; t < 4; ++t)
      if (bits >> t & 1) x[t] = static_cast<float>(reinterpret_cast<const int8_t*>(p)[found++]);
    return x;
  }

  // A lane's level is one of 8: by two bits of its code, and by whether its column is salient.
  using Codes = Lanes;
  struct Levels {
    float of[8];
  };
  static Levels load_levels(const uint16_t* p, bool rounded) {
    Levels levels;
    for (int n = 0; n < 8; ++n) {
      const float x = fp16_to_float(p[n]);
      levels.of[n] = rounded ? bf16_to_float(float_to_bf16(x)) : x;
    }
    return levels;
  }
  static Codes load_lane_codes(const uint8_t* p) { return Codes{p[0], p[1], p[2], p[3]}; }
  static Codes salient_lanes(uint32_t bits) {
    const Lanes lane = {1, 2, 4, 8};
    const int32_t word = static_cast<int32_t>(bits & 15);
    return ((Lanes{word, word, word, word} & lane) == lane) & 4;
  }
  template <int kShift>
  static Reg level(const Levels& levels, Codes codes, Codes salient) {
    const Lanes at = (codes >> kShift & 3) | salient;
    return Reg{levels.of[at[0]], levels.of[at[1]], levels.of[at[2]], levels.of[at[3]]};
  }

  // As in the AVX2 path: 0 below 2^-126, NaN kept.
  template <int kDegree>
  static Reg exp2(Reg x) {
    const Reg tiny = set1(-126.0f);
    const Reg huge = set1(127.0f);
    Reg clamped = pick(x > tiny, x, tiny);
    clamped = pick(clamped < huge, clamped, huge);
    Lanes whole = __builtin_convertvector(clamped, Lanes);  // towards zero ...
    whole += __builtin_convertvector(whole, Reg) > clamped;  // ... and down by the -1 of a true comparison
    const Reg power = exp2_polynomial<VecPortable, kDegree>(clamped - __builtin_convertvector(whole, Reg));
    const Reg scaled = (Reg)((Lanes)power + (whole << 23));
    const Reg kept = pick(x < tiny, zero(), scaled);
    return pick(x == x, kept, x);
  }

  // Comparisons of 16-bit codes.
  typedef int16_t Words __attribute__((vector_size(16)));

  static Reg load_s8(const int8_t* p) {
    return Reg{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
  }
  // Rounded to even, and above a zero; then in 0 .. 255.
  static void store_u8(uint8_t* p, Reg x, int zero) {
    for (int t = 0; t < 4; ++t) p[t] = static_cast<uint8_t>(static_cast<int>(__builtin_nearbyintf(x[t])) + zero);
  }
  static Reg load_u8(const uint8_t* p) {
    return Reg{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
  }
  // The lower and the upper halves of bytes.
  static void load_u4(const uint8_t* p, Reg& low, Reg& high) {
    for (int t = 0; t < 4; ++t) {
      low[t] = float(p[t] & 15);
      high[t] = float(p[t] >> 4);
    }
  }
  static Reg load_bf16(const uint16_t* p) {
    return Reg{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
  }
  static Reg load_fp16(const uint16_t* p) {
    return Reg{fp16_to_float(p[0]), fp16_to_float(p[1]), fp16_to_float(p[2]), fp16_to_float(p[3])};
  }
  static void store_bf16(uint16_t* p, Reg x) {
    for (int t = 0; t < 4; ++t) p[t] = float_to_bf16(x[t]);
  }
  static void store_fp16(uint16_t* p, Reg x) {
    for (int t = 0; t < 4; ++t) p[t] = float_to_fp16(x[t]);
  }

  // Pairs (even[n], odd[n]) for n < 8.
  static void merge_pairs(const uint16_t* even, const uint16_t* odd, uint32_t* to) {
    for (int n = 0; n < 8; ++n) to[n] = uint32_t{even[n]} | uint32_t{odd[n]} << 16;
  }

  // Elements [first, first + 4) of 4 rows; the stride in elements.
  static void transpose(const void* const* rows, int first, uint32_t* to, int64_t to_stride) {
    for (int n = 0; n < 4; ++n)
      for (int r = 0; r < 4; ++r)
        std::memcpy(to + n * to_stride + r, static_cast<const char*>(rows[r]) + 4 * (first + n), sizeof *to);
  }

 private:
  static Reg pick(Lanes mask, Reg kept, Reg other) {
    return (Reg)(((Lanes)kept & mask) | ((Lanes)other & ~mask));
  }
};

}  // namespace
}  // namespace gossamer
