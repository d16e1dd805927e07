// Weights in bf16, 32 columns at once, for AVX-512 BF16. Include where it is compiled for alone.
#pragma once

#include <immintrin.h>

#include "kernels/linear_lanes.h"
#include "kernels/vec_avx512.h"

namespace gossamer {
namespace {

inline __m512i expand_bytes(__m512i x, __mmask64 bits) {
  __asm__("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(x) : "Yk"(bits));
  return x;
}

// sum += a b, of int16 in pairs: vpdpwssd of VNNI.
inline __m512i add_words(__m512i sum, __m512i a, __m512i b) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

inline bool split_row(const void* row, DType dtype, int columns, int16_t* to, int64_t pitch, float* scale) {
  // The rest of a vector is read from a copy, with zeros behind it.
  const auto each = [&](const auto& use) {
    int c = 0;
    for (; c + 16 <= columns; c += 16) use(c, load_as_float<VecAvx512>(row, c, dtype));
    if (c == columns) return;
    float last[16] = {};
    for (int n = c; n < columns; ++n) last[n - c] = scalar_as_float(row, n, dtype);
    use(c, VecAvx512::load(last));
  };
  __m512 most = _mm512_setzero_ps();
  __mmask16 lost = 0;
  each([&](int, __m512 x) {
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
    lost |= _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), x, _CMP_UNORD_Q);
  });
  if (lost != 0) return false;
  // Of the smallest numbers a scale would be denormal, and its inverse infinite.
  const float top = VecAvx512::reduce_max(most), smallest = 0x1p-100f;
  *scale = (top > smallest ? top : smallest) / kSplitTop;
  const __m512 inverse = _mm512_set1_ps(1.0f / *scale), step = _mm512_set1_ps(kSplitStep);
  each([&](int c, __m512 x) {
    const __m512 scaled = _mm512_mul_ps(x, inverse);
    const __m512 first = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i words[] = {_mm512_cvtps_epi32(first),
                             _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(scaled, first), step))};
    for (int n = 0; n < 2; ++n)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + n * pitch + c), _mm512_cvtsepi32_epi16(words[n]));
  });
  const int written = (columns + 15) / 16 * 16;
  for (int n = 0; n < 2; ++n) __builtin_memset(to + n * pitch + written, 0, 2 * (pitch - written));
  return true;
}

// kRows rows of int8 times kInputs inputs. Sums of 4,096 columns fit int32: 256 products of 128 and 32767 in a lane.
template <int kRows, int kInputs>
void split_rows(const SparseRows& rows, int row, const int16_t* x, int64_t pitch, const float* scales, float* sums,
                int64_t sums_pitch) {
  constexpr int kAhead = 4096;  // bytes
  constexpr int kStretch = 4096, kChains = kRows * kInputs > 2 ? 1 : 2;
  const uint8_t* bitmap[kRows];
  const char* p[kRows];
  __m512 total[kRows][kInputs];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    bitmap[r] = rows.bitmap + (row + r) * rows.bitmap_pitch;
    p[r] = static_cast<const char*>(rows.values[row + r]);
#pragma GCC unroll 4
    for (int n = 0; n < kInputs; ++n) total[r][n] = _mm512_setzero_ps();
  }
  for (int begin = 0; begin < rows.columns; begin += kStretch) {
    const int end = rows.columns - begin < kStretch ? rows.columns : begin + kStretch;
    __m512i sum[kRows][kInputs][2][kChains];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kInputs; ++n)
#pragma GCC unroll 2
        for (int chain = 0; chain < kChains; ++chain)
          sum[r][n][0][chain] = sum[r][n][1][chain] = _mm512_setzero_si512();
    const auto add = [&](int c, const uint64_t* bits) __attribute__((always_inline)) {
      __m512i words[kRows][2];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const __m512i bytes = expand_bytes(_mm512_loadu_si512(p[r]), bits[r]);
        p[r] += __builtin_popcountll(bits[r]);
        words[r][0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes));
        words[r][1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1));
      }
#pragma GCC unroll 4
      for (int n = 0; n < kInputs; ++n)
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const __m512i input = _mm512_loadu_si512(x + (2 * n + part) * pitch + c + 32 * half);
#pragma GCC unroll 2
            for (int r = 0; r < kRows; ++r) {
              auto& own = sum[r][n][part][half % kChains];
              own = add_words(own, words[r][half], input);
            }
          }
    };
    uint64_t bits[kRows];
    int c = begin;
    for (; c + 64 <= end; c += 64) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        std::memcpy(bits + r, bitmap[r] + c / 8, sizeof *bits);
        // Short rows side by side are no stream that the processor would follow by itself.
        __builtin_prefetch(p[r] + kAhead);
        if (c % 512 == 0) __builtin_prefetch(bitmap[r] + c / 8 + kAhead);
      }
      add(c, bits);
    }
    if (c < end) {
      for (int r = 0; r < kRows; ++r) bits[r] = last_bits(bitmap[r] + c / 8, end - c);
      add(c, bits);
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kInputs; ++n) {
        __m512 parts[2];
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
          const auto& own = sum[r][n][part];
          parts[part] = _mm512_cvtepi32_ps(kChains > 1 ? _mm512_add_epi32(own[0], own[kChains - 1]) : own[0]);
        }
        total[r][n] = _mm512_add_ps(
            total[r][n], _mm512_fmadd_ps(parts[1], _mm512_set1_ps(1.0f / kSplitStep), parts[0]));
      }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kInputs; ++n)
      sums[r * sums_pitch + n] = VecAvx512::reduce_add(total[r][n]) * scales[n];
}

inline void split_sums_of(const SparseRows& rows, const InputRows& inputs, float* sums) {
  const auto* x = static_cast<const int16_t*>(inputs.data);
  const auto some = [&](int row, auto count) {
    const auto times = [&](int n, auto number) {
      split_rows<decltype(count)::value, decltype(number)::value>(rows, row, x + 2 * n * inputs.pitch, inputs.pitch,
                                                                  inputs.scales + n,
                                                                  sums + int64_t{row} * inputs.count + n, inputs.count);
    };
    int n = 0;
    for (; n + 4 <= inputs.count; n += 4) times(n, Number<4>{});
    for (; n < inputs.count; ++n) times(n, Number<1>{});
  };
  int row = 0;
  for (; row + 2 <= rows.rows; row += 2) some(row, Number<2>{});
  if (row < rows.rows) some(row, Number<1>{});
}

// 32 columns at once: a product of bf16 is exact in the sum's fp32.
struct PairLanes {
  using Vec = VecAvx512;
  using Input = uint16_t;
  using Weight = __m512bh;
  using Codes = __m512i;
  using Levels = __m512i;
  static constexpr bool kThere = true;
  static constexpr int kLanes = 32;
  static constexpr int kLevelRows = 4;

  template <ValueType kType>
  static Weight expand(const char* p, uint32_t bits) {
    static_assert(kType == ValueType::kBFloat16);
    return (__m512bh)expand_words(_mm512_loadu_si512(p), bits);
  }
  // vpexpandw is of AVX-512 VBMI2: by hand, so that the compiler needs no flag. In place, as VecAvx512 has it.
  static __m512i expand_words(__m512i x, __mmask32 bits) {
    __asm__("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(x) : "Yk"(bits));
    return x;
  }
  static Levels load_levels(const uint16_t* p, bool) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi128_si512((__m128i)_mm256_cvtneps_pbh(wide));  // no index is above 7
  }
  static Codes load_lane_codes(const uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Codes salient_lanes(uint32_t bits) { return _mm512_maskz_set1_epi16(bits, 4); }
  template <int kShift>
  static Weight level(Levels levels, Codes codes, Codes salient) {
    const __m512i shifted = _mm512_srli_epi16(codes, kShift);
    const __m512i at = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi16(3), salient, 0xEA);
    return (__m512bh)_mm512_permutexvar_epi16(at, levels);
  }
  static bool split(const void* row, DType dtype, int columns, int16_t* to, int64_t pitch, float* scale) {
    return split_row(row, dtype, columns, to, pitch, scale);
  }
  static void split_sums(const SparseRows& rows, const InputRows& inputs, float* sums) {
    split_sums_of(rows, inputs, sums);
  }
  static __m512 add_product(Weight w, const Input* x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, w, (__m512bh)_mm512_loadu_si512(x));
  }
};

}  // namespace
}  // namespace gossamer
