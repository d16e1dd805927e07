// AVX-512 vectors of 16 floats. Include inside an anonymous namespace's translation unit only.
#pragma once

#include <immintrin.h>

#include "kernels/job.h"
#include "kernels/polynomials.h"

namespace gossamer {
namespace {

struct VecAvx512 {
  static constexpr int kWidth = 16;
  static constexpr int kGemmRows = 6;  // 6 x 4 accumulators, 4 operands, 1 broadcast: 29 of 32 registers
  static constexpr int kGemmCols = 4;
  using Reg = __m512;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign),
                                                         _mm512_castps_si512(magnitude), 0xCA));
  }
  // Lane t is kept where bit t is set.
  static Reg select(uint64_t bits, Reg kept, Reg other) {
    return _mm512_mask_mov_ps(other, static_cast<__mmask16>(bits), kept);
  }
  static Reg select_less(Reg a, Reg b, Reg kept, Reg other) {
    return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), kept);
  }
  static bool any_greater(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static float reduce_max(Reg a) { return _mm512_reduce_max_ps(a); }
  static float reduce_add(Reg a) { return _mm512_reduce_add_ps(a); }

  // In a register, where the compiler would load it again for each use.
  static Reg keep(Reg x) {
    __asm__("" : "+v"(x));
    return x;
  }

  // The sum of each of 8 vectors.
  static void reduce_each(const Reg* x, float* sums) {
    __m256 half[8];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) half[n] = _mm256_add_ps(_mm512_castps512_ps256(x[n]), _mm512_extractf32x8_ps(x[n], 1));
    const __m256 a = _mm256_hadd_ps(half[0], half[1]), b = _mm256_hadd_ps(half[2], half[3]);
    const __m256 c = _mm256_hadd_ps(half[4], half[5]), d = _mm256_hadd_ps(half[6], half[7]);
    const __m256 low = _mm256_hadd_ps(a, b), high = _mm256_hadd_ps(c, d);
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
  }

  // 16 codes of some bits, the first in the lowest.
  template <int kBits>
  static Reg load_codes(const uint8_t* p) {
    __m512i codes;
    if constexpr (kBits == 8) {
      codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else if constexpr (kBits == 4) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
      const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
      codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
    } else {
      int word;
      __builtin_memcpy(&word, p, sizeof word);
      const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      codes = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(word), shifts), _mm512_set1_epi32(3));
    }
    return _mm512_cvtepi32_ps(codes);
  }

  // The elements from p on in the lanes whose bits are set, 0 in the others. Reads 16 elements.
  template <DType kDType>
  static Reg expand(const char* p, uint32_t bits) {
    Reg x;
    if constexpr (kDType == DType::kFloat32)
      x = load(reinterpret_cast<const float*>(p));
    else if constexpr (kDType == DType::kBFloat16)
      x = load_bf16(reinterpret_cast<const uint16_t*>(p));
    else
      x = load_fp16(reinterpret_cast<const uint16_t*>(p));
    return expand_lanes(x, bits);
  }
  // In place: of another register the processor (Zen 5) waits for what was in it, although all of it is overwritten.
  static Reg expand_lanes(Reg x, uint32_t bits) {
    __asm__("vexpandps %0, %0%{%1%}%{z%}" : "+v"(x) : "Yk"(static_cast<__mmask16>(bits)));
    return x;
  }

  // The same of int8, as numbers.
  static Reg expand_int8(const char* p, uint32_t bits) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return expand_lanes(_mm512_cvtepi32_ps(wide), bits);
  }

  // A lane's level is one of 8: by two bits of its code, and by whether its column is salient.
  using Codes = __m512i;
  using Levels = __m512;
  static Levels load_levels(const uint16_t* p, bool rounded) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const Reg x = _mm512_cvtph_ps(_mm256_broadcastsi128_si256(eight));
    return rounded ? round_to_bf16(x) : x;
  }
  static Codes load_lane_codes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Codes salient_lanes(uint32_t bits) {
    return _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits), 4);
  }
  template <int kShift>
  static Reg level(Levels levels, Codes codes, Codes salient) {
    const __m512i shifted = _mm512_srli_epi32(codes, kShift);
    return _mm512_permutexvar_ps(_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(3), salient, 0xEA), levels);
  }

  // vscalefps multiplies by 2^floor(x) and maps -inf to 0, so that no clamp is needed. Below 2^-126 the result is 0, as
  // of the other instruction sets: numbers of that size are computed many times slower, and attention has them by the
  // million where logits lie some 90 below the largest of their row. NaN stays.
  template <int kDegree>
  static Reg exp2(Reg x) {
    const Reg fraction = _mm512_reduce_ps(x, 1);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, exp2_polynomial<VecAvx512, kDegree>(fraction), x);
  }

  // Comparisons of 16-bit codes.
  typedef int16_t Words __attribute__((vector_size(64)));

  static Reg load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Reg load_s8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // Rounded to even, and above a zero; then in 0 .. 255.
  static void store_u8(uint8_t* p, Reg x, int zero) {
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(zero));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(whole));
  }
  // The lower and the upper halves of bytes.
  static void load_u4(const uint8_t* p, Reg& low, Reg& high) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), half = _mm_set1_epi8(15);
    low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(x, half)));
    high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(x, 4), half)));
  }
  static Reg load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Reg load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_fp16(uint16_t* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bf16(uint16_t* p, Reg x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(x), 16)));
#endif
  }
  static Reg round_to_bf16(Reg x) {
    return _mm512_castsi512_ps(_mm512_and_si512(rounded_bits(x), _mm512_set1_epi32(-65536)));
  }
  // Of floats, rounded so that the upper halves are bf16.
  static __m512i rounded_bits(Reg x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  }

  // Pairs (even[n], odd[n]) for n < 32.
  static void merge_pairs(const uint16_t* even, const uint16_t* odd, uint32_t* to) {
    alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
  }

  // Elements [first, first + 16) of 16 rows; the stride in elements.
  static void transpose(const void* const* rows, int first, uint32_t* to, int64_t to_stride) {
    __m512i x[16], y[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(static_cast<const char*>(rows[r]) + 4 * first);
    // In each 128-bit lane the 4 x 4 corners of four rows, then the lanes themselves.
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
      const __m512i a = _mm512_unpacklo_epi32(x[r], x[r + 1]), b = _mm512_unpackhi_epi32(x[r], x[r + 1]);
      const __m512i c = _mm512_unpacklo_epi32(x[r + 2], x[r + 3]), d = _mm512_unpackhi_epi32(x[r + 2], x[r + 3]);
      y[r] = _mm512_unpacklo_epi64(a, c);
      y[r + 1] = _mm512_unpackhi_epi64(a, c);
      y[r + 2] = _mm512_unpacklo_epi64(b, d);
      y[r + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      const __m512i a = _mm512_shuffle_i32x4(y[n], y[n + 4], 0x88), b = _mm512_shuffle_i32x4(y[n], y[n + 4], 0xdd);
      const __m512i c = _mm512_shuffle_i32x4(y[n + 8], y[n + 12], 0x88);
      const __m512i d = _mm512_shuffle_i32x4(y[n + 8], y[n + 12], 0xdd);
      _mm512_storeu_si512(to + n * to_stride, _mm512_shuffle_i32x4(a, c, 0x88));
      _mm512_storeu_si512(to + (n + 4) * to_stride, _mm512_shuffle_i32x4(b, d, 0x88));
      _mm512_storeu_si512(to + (n + 8) * to_stride, _mm512_shuffle_i32x4(a, c, 0xdd));
      _mm512_storeu_si512(to + (n + 12) * to_stride, _mm512_shuffle_i32x4(b, d, 0xdd));
    }
  }
};

}  // namespace
}  // namespace gossamer
