// Products in integers for the CPU kernel's own panels (csrc/kernels/flash.h): queries and keys in int8 or int16, and
// probabilities and values in int8. Instruction sets for attend_panel: what they do not change, they have of the kernel's.
//
// One of GOSSAMER_AVX2, _AVX512, _AVX512_BF16 and _AMX is defined, with that set's flags and those of its VNNI.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>

#if defined(GOSSAMER_AMX)
#include "kernels/isa_amx.cpp"
#elif defined(GOSSAMER_AVX512_BF16)
#include "kernels/isa_avx512_bf16.cpp"
#elif defined(GOSSAMER_AVX512)
#include "kernels/isa_avx512.cpp"
#else
#include "kernels/isa_avx2.cpp"
#endif

namespace gossamer {
namespace {

#if defined(GOSSAMER_AMX)
using Base = Amx;
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#if defined(GOSSAMER_AVX512_BF16)
using Base = Avx512Bf16;
#elif defined(GOSSAMER_AVX512)
using Base = Avx512;
#else
using Base = Avx2;
#endif
#endif
using V = Base::Vec;
constexpr bool kBf16 = Base::kPairs;

#if defined(GOSSAMER_AVX2)
using Ints = __m256i;
constexpr int kStrip = 2;
Ints zero_ints() { return _mm256_setzero_si256(); }
Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i_u*>(p)); }
Ints repeat(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
V::Reg to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
#else
using Ints = __m512i;
constexpr int kStrip = 4;
Ints zero_ints() { return _mm512_setzero_si512(); }
Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
Ints repeat(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
V::Reg to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
#endif

// Assembly, and not the intrinsics: GCC 12 takes those for calls that may read memory, and stores every sum before each.
#if defined(GOSSAMER_AVX2)
#define GOSSAMER_VEX "%{vex%} "
#else
#define GOSSAMER_VEX ""
#endif
Ints dot_bytes(Ints sum, Ints a, Ints b) {
  __asm__(GOSSAMER_VEX "vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
Ints dot_words(Ints sum, Ints a, Ints b) {
  __asm__(GOSSAMER_VEX "vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// The panel kernel calls `multiply` for both products; the one with the queries is known by where the keys lie.
const char *keys_begin, *keys_end;
bool of_keys(const void* b) { return b >= keys_begin && b < keys_end; }

// Left out: the product with the keys, and with the values as well.
template <bool kBoth>
struct Without : Base {
  static void multiply(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       float* out, int64_t ldo, bool accumulate) {
    if (!kBoth && !of_keys(b)) Base::multiply(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate);
  }
};

#if defined(GOSSAMER_AMX)
struct Int8Registers : AmxTileRegisters {
  template <int C, int A, int B>
  static void dot() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
#endif

// x / step as integers, where x are floats and dim a multiple of the vector width.
template <class Integer>
void round_by(const float* x, int dim, float step, Integer* out) {
  const auto inverse = V::set1(step > 0 ? 1 / step : 0.0f), shift = V::set1(0x1.8p23f);  // whose last bits are units
  alignas(64) float shifted[kMaxHeadDim];
  alignas(64) uint32_t bits[kMaxHeadDim];
  for (int d = 0; d < dim; d += V::kWidth) V::store(shifted + d, V::fma(V::load(x + d), inverse, shift));
  std::memcpy(bits, shifted, sizeof(float) * dim);
  for (int d = 0; d < dim; ++d) out[d] = static_cast<Integer>(bits[d]);
}

// A row as integers; returns the step.
template <class Integer>
float round_row(const float* x, int dim, Integer* out) {
  auto top = V::zero(), squares = V::zero();
  for (int d = 0; d < dim; d += V::kWidth) {
    top = V::max(top, V::abs(V::load(x + d)));
    squares = V::fma(V::load(x + d), V::load(x + d), squares);
  }
  const float largest = V::reduce_max(top), norm = std::sqrt(V::reduce_add(squares));
  // By Cauchy and Schwarz no sum of products of rows with norms of 46000 steps, before they are rounded, passes 2^31.
  const float step = sizeof(Integer) == 1 ? largest / 127 : std::max(largest / 32767, norm / 46000);
  round_by(x, dim, step, out);
  return step;
}

// As micro_kernel of gemm.h, of words of integers: R rows of a times as many columns of b as kStrip vectors have.
// `word_of` says where in a row a step's word lies, `start` what a vector of sums begins with, and `finish` takes it.
template <class Integer, int R, class WordOf, class Start, class Finish>
inline void integer_kernel(int words, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                           const WordOf& word_of, const Start& start, const Finish& finish) {
  Ints sums[R][kStrip];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < kStrip; ++s) sums[r][s] = start(s);
  for (int d = 0; d < words; ++d) {
    Ints columns[kStrip];
#pragma GCC unroll 4
    for (int s = 0; s < kStrip; ++s) columns[s] = load_ints(b + d * ldb + s * V::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Ints word = repeat(a[r * lda + word_of(d)]);
#pragma GCC unroll 4
      for (int s = 0; s < kStrip; ++s)
        sums[r][s] = sizeof(Integer) == 1 ? dot_bytes(sums[r][s], word, columns[s])
                                          : dot_words(sums[r][s], word, columns[s]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < kStrip; ++s) finish(r, s, to_floats(sums[r][s]));
}

template <class Integer>
struct WithIntegers : Base {
  static constexpr int kInElement = 4 / sizeof(Integer);
  static constexpr bool kUnsigned = sizeof(Integer) == 1 && !kTiles;  // queries, which vpdpbusd takes 128 too large

  // A panel's queries, made of those that the kernel has prepared, when its first tile comes.
  alignas(64) static inline Integer queries[kMaxRows * kMaxHeadDim];
  static inline float steps[kMaxRows];
  static inline bool ready;

  static void begin() {
    Base::begin();
    ready = false;
  }

  static void prepare(int rows, int dim, const uint32_t* a, int64_t lda) {
    alignas(64) float wide[kMaxHeadDim];
    for (int r = 0; r < rows; ++r) {
      const float* row = reinterpret_cast<const float*>(a + r * lda);
      if (kBf16) widen_row<V>(row, DType::kBFloat16, dim, dim, 1.0f, wide);
      steps[r] = round_row(kBf16 ? wide : row, dim, queries + r * dim);
      if (kUnsigned)
        for (int d = 0; d < dim; ++d) queries[r * dim + d] ^= static_cast<Integer>(0x80);
    }
    ready = true;
  }

  static void multiply(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       float* out, int64_t ldo, bool accumulate) {
    if (!of_keys(b)) return Base::multiply(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate);
    const int dim = kBf16 ? 2 * depth : depth, words = dim / kInElement;
    if (!ready) prepare(rows, dim, a, lda);
    const uint32_t* x = reinterpret_cast<const uint32_t*>(queries);
#if defined(GOSSAMER_AMX)
    const float* key_steps = reinterpret_cast<const float*>(b + words * kChunk);
    for (int first = 0; first < rows; first += 32) {
      const int count = std::min(32, rows - first);
      float* sums = out + first * kChunk;
      tile_gemm<Int8Registers>(count, kChunk, words, x + first * words, words, b, kChunk, sums, kChunk, false);
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < kChunk; c += V::kWidth) {
          const auto step = V::mul(V::load(key_steps + c), V::set1(steps[first + r]));
          V::store(sums + r * kChunk + c, V::mul(to_floats(load_ints(sums + r * kChunk + c)), step));
        }
    }
#else
    int r = 0;
    for (; r + V::kGemmRows <= rows; r += V::kGemmRows) score_rows<V::kGemmRows>(r, words, x, b, out);
    for (; r < rows; ++r) score_rows<1>(r, words, x, b, out);
#endif
  }

  template <int R>
  static void score_rows(int r, int words, const uint32_t* x, const uint32_t* b, float* out) {
    const float* key_steps = reinterpret_cast<const float*>(b + words * kChunk);
    for (int c = 0; c < kChunk; c += kStrip * V::kWidth)
      integer_kernel<Integer, R>(
          words, x + r * words, words, b + c, kChunk, [](int d) { return d; },
          [&](int s) { return kUnsigned ? load_ints(key_steps + kChunk + c + s * V::kWidth) : zero_ints(); },
          [&](int n, int s, V::Reg sum) {
            const auto step = V::mul(V::load(key_steps + c + s * V::kWidth), V::set1(steps[r + n]));
            V::store(out + (r + n) * kChunk + c + s * V::kWidth, V::mul(sum, step));
          });
  }

  // As pack_tile, with keys [dim / kInElement][64] of integers, then 64 steps, then what 128 adds to each key's sums.
  static void pack(const PackJob& job, const float* mean) {
    pack_keys(job, mean);
    const int dim = job.head_dim;
    if constexpr (kBf16)
      for (int t = 0; t < kChunk / 2; ++t)
        merge_rows<V>(job.value_rows[2 * t], job.value_rows[2 * t + 1], dim, dim,
                      static_cast<uint32_t*>(job.values) + t * dim);
    else
      for (int t = 0; t < kChunk; ++t)
        widen_row<V>(job.value_rows[t], job.dtype, dim, dim, 1.0f, static_cast<float*>(job.values) + t * dim);
  }

  static void pack_keys(const PackJob& job, const float* mean) {
    const int dim = job.head_dim, words = dim / kInElement;
    alignas(64) static Integer rounded[kChunk * kMaxHeadDim];
    alignas(64) float wide[kMaxHeadDim];
    const void* rows[kChunk];
    float* key_steps = static_cast<float*>(job.keys) + words * kChunk;
    for (int t = 0; t < kChunk; ++t) {
      Integer* row = rounded + t * dim;
      widen_row<V>(job.key_rows[t], job.dtype, dim, dim, 1.0f, wide);
      if (sizeof(Integer) == 1)
        for (int d = 0; d < dim; d += V::kWidth)
          V::store(wide + d, V::fma(V::load(mean + d), V::set1(-1.0f), V::load(wide + d)));
      key_steps[t] = round_row(wide, dim, row);
      reinterpret_cast<int32_t*>(key_steps)[kChunk + t] = -128 * std::accumulate(row, row + dim, 0);
      rows[t] = row;
    }
    transpose_keys<V>(rows, words, static_cast<uint32_t*>(job.keys));
  }
};

#if defined(GOSSAMER_AVX512_BF16)
// Where the kernel would write probabilities of bf16, bytes: 16, and a gap as wide. Outputs stay what they are.
const char *scratch_begin, *scratch_end;
struct VecBytes : VecAvx512 {
  static void store_bf16(uint16_t* p, Reg x) {
    if (reinterpret_cast<char*>(p) < scratch_begin || reinterpret_cast<char*>(p) >= scratch_end)
      return VecAvx512::store_bf16(p, x);
    const __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(255.0f)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(steps));
  }
};

// Both products: probabilities in 255 steps of what 1 is to the kernel, values in 127 with one step a tile.
struct WithBytes : WithIntegers<int8_t> {
  using Vec = VecBytes;

  static void multiply(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       float* out, int64_t ldo, bool accumulate) {
    if (of_keys(b)) return WithIntegers::multiply(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate);
    const float step = *reinterpret_cast<const float*>(b + kChunk / 4 * columns) / 255;
    int r = 0;
    for (; r + V::kGemmRows <= rows; r += V::kGemmRows)
      add_rows<V::kGemmRows>(columns, a + r * lda, lda, b, step, out + r * ldo, ldo, accumulate);
    for (; r < rows; ++r) add_rows<1>(columns, a + r * lda, lda, b, step, out + r * ldo, ldo, accumulate);
  }

  template <int R>
  static void add_rows(int columns, const uint32_t* a, int64_t lda, const uint32_t* b, float step, float* out,
                       int64_t ldo, bool accumulate) {
    for (int c = 0; c < columns; c += kStrip * V::kWidth)
      integer_kernel<int8_t, R>(
          kChunk / 4, a, lda, b + c, columns, [](int d) { return d / 4 * 8 + d % 4; },
          [](int) { return zero_ints(); },
          [&](int n, int s, V::Reg more) {
            float* sum = out + n * ldo + c + s * V::kWidth;
            V::store(sum, V::fma(more, V::set1(step), accumulate ? V::load(sum) : V::zero()));
          });
  }

  // Values [16][dim] of words, each of four tokens, and their step.
  static void pack(const PackJob& job, const float* mean) {
    pack_keys(job, mean);
    const int dim = job.head_dim;
    alignas(64) static float wide[kChunk * kMaxHeadDim];
    alignas(64) uint8_t rounded[4][kMaxHeadDim];
    uint32_t* values = static_cast<uint32_t*>(job.values);
    auto top = V::zero();
    for (int t = 0; t < kChunk; ++t) {
      widen_row<V>(job.value_rows[t], job.dtype, dim, dim, 1.0f, wide + t * dim);
      for (int d = 0; d < dim; d += V::kWidth) top = V::max(top, V::abs(V::load(wide + t * dim + d)));
    }
    const float step = V::reduce_max(top) / 127;
    for (int t = 0; t < kChunk; t += 4) {
      for (int n = 0; n < 4; ++n) round_by(wide + (t + n) * dim, dim, step, rounded[n]);
      for (int d = 0; d < dim; ++d)
        values[t / 4 * dim + d] = uint32_t{rounded[0][d]} | uint32_t{rounded[1][d]} << 8 |
                                  uint32_t{rounded[2][d]} << 16 | uint32_t{rounded[3][d]} << 24;
    }
    std::memcpy(values + kChunk / 4 * dim, &step, sizeof step);
  }
};
#endif

}  // namespace
}  // namespace gossamer
