// AVX2 + FMA + F16C vectors of 8 floats.
#pragma once

#include <immintrin.h>

#include "kernels/job.h"
#include "kernels/polynomials.h"

namespace gossamer {
namespace {

// For each byte of bits, where each of 8 lanes finds its element among those that are there; lanes without one have the
// top bit set. `wide` shuffles the bytes of 16-bit elements into the upper halves of 32-bit lanes.
struct LaneTables {
  alignas(64) uint8_t lanes[256][8];
  alignas(64) uint8_t narrow[256][16];
  alignas(64) uint8_t wide[256][32];

  constexpr LaneTables() : lanes{}, narrow{}, wide{} {
    for (int bits = 0; bits < 256; ++bits)
      for (int lane = 0, found = 0; lane < 8; ++lane) {
        const bool there = bits >> lane & 1;
        const uint8_t low = there ? 2 * found : 0x80, high = there ? 2 * found + 1 : 0x80;
        lanes[bits][lane] = there ? found : 0x80;
        narrow[bits][2 * lane] = low;
        narrow[bits][2 * lane + 1] = high;
        wide[bits][4 * lane] = wide[bits][4 * lane + 1] = 0x80;
        wide[bits][4 * lane + 2] = low;
        wide[bits][4 * lane + 3] = high;
        found += there;
      }
  }
};

struct VecAvx2 {
  static constexpr int kWidth = 8;
  static constexpr int kGemmRows = 6;  // 6 x 2 accumulators, 2 operands, 1 broadcast: 15 of 16 registers
  static constexpr int kGemmCols = 2;
  using Reg = __m256;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg abs(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    const Reg bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
  }
  static Reg select(uint64_t bits, Reg kept, Reg other) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i word = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xff)), lane);
    return _mm256_blendv_ps(other, kept, _mm256_castsi256_ps(_mm256_cmpeq_epi32(word, lane)));
  }
  static Reg select_less(Reg a, Reg b, Reg kept, Reg other) {
    return _mm256_blendv_ps(other, kept, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static bool any_greater(Reg a, Reg b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }
  static float reduce_max(Reg a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static float reduce_add(Reg a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  // In a register, where the compiler would load it again for each use.
  static Reg keep(Reg x) {
    __asm__("" : "+x"(x));
    return x;
  }

  // The sum of each of 8 vectors.
  static void reduce_each(const Reg* x, float* sums) {
    const Reg a = _mm256_hadd_ps(x[0], x[1]), b = _mm256_hadd_ps(x[2], x[3]);
    const Reg c = _mm256_hadd_ps(x[4], x[5]), d = _mm256_hadd_ps(x[6], x[7]);
    const Reg low = _mm256_hadd_ps(a, b), high = _mm256_hadd_ps(c, d);
    store(sums, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
  }

  // 8 codes of some bits, the first in the lowest.
  template <int kBits>
  static Reg load_codes(const uint8_t* p) {
    __m256i codes;
    if constexpr (kBits == 8) {
      codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    } else if constexpr (kBits == 4) {
      int word;
      __builtin_memcpy(&word, p, sizeof word);
      codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
      codes = _mm256_and_si256(codes, _mm256_set1_epi32(15));
    } else {
      short word;
      __builtin_memcpy(&word, p, sizeof word);
      codes = _mm256_srlv_epi32(_mm256_set1_epi16(word), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
      codes = _mm256_and_si256(codes, _mm256_set1_epi32(3));
    }
    return _mm256_cvtepi32_ps(codes);
  }

  // The elements from p on in the lanes whose bits are set, 0 in the others. Reads 8 elements.
  template <DType kDType>
  static Reg expand(const char* p, uint32_t bits) {
    static constexpr LaneTables kTables;
    if constexpr (kDType == DType::kFloat32) {
      const __m256i lanes =
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.lanes[bits])));
      const Reg x = _mm256_permutevar8x32_ps(load(reinterpret_cast<const float*>(p)), lanes);
      return _mm256_blendv_ps(x, zero(), _mm256_castsi256_ps(lanes));
    } else if constexpr (kDType == DType::kBFloat16) {
      const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm256_castsi256_ps(
          _mm256_shuffle_epi8(x, _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.wide[bits]))));
    } else {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      return _mm256_cvtph_ps(
          _mm_shuffle_epi8(x, _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.narrow[bits]))));
    }
  }

  // The same of int8, as numbers.
  static Reg expand_int8(const char* p, uint32_t bits) {
    static constexpr LaneTables kTables;
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.lanes[bits]));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(x, lanes)));
  }

  // A lane's level is one of 8: by two bits of its code, and by whether its column is salient.
  using Codes = __m256i;
  using Levels = __m256;
  static Levels load_levels(const uint16_t* p, bool rounded) {
    const Reg x = load_fp16(p);
    return rounded ? round_to_bf16(x) : x;
  }
  static Codes load_lane_codes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Codes salient_lanes(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i own = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_and_si256(_mm256_cmpeq_epi32(own, lane), _mm256_set1_epi32(4));
  }
  template <int kShift>
  static Reg level(Levels levels, Codes codes, Codes salient) {
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, kShift), _mm256_set1_epi32(3));
    return _mm256_permutevar8x32_ps(levels, _mm256_or_si256(code, salient));
  }

  // For x below 128. Below 2^-126 the result is 0, also of -inf, whose polynomial is NaN: the exponent is built by a
  // shift, which knows no denormals. NaN stays.
  template <int kDegree>
  static Reg exp2(Reg x) {
    const Reg whole = _mm256_floor_ps(x);
    const Reg power = exp2_polynomial<VecAvx2, kDegree>(_mm256_sub_ps(x, whole));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    const Reg scaled = _mm256_mul_ps(power, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
  }

  // Comparisons of 16-bit codes.
  typedef int16_t Words __attribute__((vector_size(32)));

  static Reg load_s8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // Rounded to even, and above a zero; then in 0 .. 255.
  static void store_u8(uint8_t* p, Reg x, int zero) {
    const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(zero));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static Reg load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // The lower and the upper halves of bytes.
  static void load_u4(const uint8_t* p, Reg& low, Reg& high) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), half = _mm_set1_epi8(15);
    low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(x, half)));
    high = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(x, 4), half)));
  }
  static Reg load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Reg load_fp16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_fp16(uint16_t* p, Reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bf16(uint16_t* p, Reg x) {
    const __m256i rounded = _mm256_srli_epi32(rounded_bits(x), 16);
    const __m128i narrow =
        _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
  }
  static Reg round_to_bf16(Reg x) {
    return _mm256_castsi256_ps(_mm256_and_si256(rounded_bits(x), _mm256_set1_epi32(-65536)));
  }
  // Of floats, rounded so that the upper halves are bf16.
  static __m256i rounded_bits(Reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  }

  // Pairs (even[n], odd[n]) for n < 16.
  static void merge_pairs(const uint16_t* even, const uint16_t* odd, uint32_t* to) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(even));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(odd));
    const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
    _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to + 8), _mm256_permute2x128_si256(low, high, 0x31));
  }

  // Elements [first, first + 8) of 8 rows; the stride in elements.
  static void transpose(const void* const* rows, int first, uint32_t* to, int64_t to_stride) {
    const auto row = [&](int r) { return _mm256_castsi256_ps(
          _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(static_cast<const char*>(rows[r]) + 4 * first))); };
    __m256 y[8];
    for (int r = 0; r < 8; r += 4) {
      const __m256 x0 = row(r), x1 = row(r + 1), x2 = row(r + 2), x3 = row(r + 3);
      const __m256 a = _mm256_unpacklo_ps(x0, x1), b = _mm256_unpackhi_ps(x0, x1);
      const __m256 c = _mm256_unpacklo_ps(x2, x3), d = _mm256_unpackhi_ps(x2, x3);
      y[r] = _mm256_shuffle_ps(a, c, 0x44);
      y[r + 1] = _mm256_shuffle_ps(a, c, 0xee);
      y[r + 2] = _mm256_shuffle_ps(b, d, 0x44);
      y[r + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int n = 0; n < 4; ++n) {
      store(reinterpret_cast<float*>(to + n * to_stride), _mm256_permute2f128_ps(y[n], y[n + 4], 0x20));
      store(reinterpret_cast<float*>(to + (n + 4) * to_stride), _mm256_permute2f128_ps(y[n], y[n + 4], 0x31));
    }
  }
};

}  // namespace
}  // namespace gossamer
