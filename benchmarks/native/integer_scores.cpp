// What the product of queries and keys in integers would save the CPU kernel: its own panels (csrc/kernels/flash.h)
// with that product as it is, in int8, in int16, and left out.
//
//   integer_scores KEYS DIM TILES ROUNDS    one key/value head with four query heads; each block of 64 queries attends
//                                           TILES of the KEYS / 64 tiles, all rows all 64 keys. Prints JSON.
//
// Queries and keys have a step (scale) for each token. int8: keys less their mean, step = largest / 127. int16: the
// smallest step at which neither a number nor any int32 sum overflows. Packing, with the mean and the rounding, counts.
// benchmarks/quantised.py compiles it with the flags of an instruction set and one of GOSSAMER_AVX2, _AVX512 and _AMX.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#if defined(GOSSAMER_AMX)
#include "kernels/isa_amx.cpp"
#elif defined(GOSSAMER_AVX512)
#include "kernels/isa_avx512.cpp"
#else
#include "kernels/isa_avx2.cpp"
#endif

namespace gossamer {
namespace {

#if defined(GOSSAMER_AMX)
using Base = Amx;
#elif defined(GOSSAMER_AVX512)
using Base = Avx512;
#else
using Base = Avx2;
#endif
using V = Base::Vec;
constexpr bool kBf16 = Base::kPairs;

#if defined(GOSSAMER_AVX2)
using Ints = __m256i;
constexpr int kStrip = 2;
Ints zero_ints() { return _mm256_setzero_si256(); }
Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i_u*>(p)); }
Ints repeat(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
Ints dot_bytes(Ints sum, Ints a, Ints b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
Ints dot_words(Ints sum, Ints a, Ints b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
V::Reg to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
#else
using Ints = __m512i;
constexpr int kStrip = 4;
Ints zero_ints() { return _mm512_setzero_si512(); }
Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
Ints repeat(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
Ints dot_bytes(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }
Ints dot_words(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
V::Reg to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
#endif

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
  const auto inverse = V::set1(step > 0 ? 1 / step : 0.0f), shift = V::set1(0x1.8p23f);  // whose last bits are units
  alignas(64) float shifted[kMaxHeadDim];
  alignas(64) uint32_t bits[kMaxHeadDim];
  for (int d = 0; d < dim; d += V::kWidth) V::store(shifted + d, V::fma(V::load(x + d), inverse, shift));
  std::memcpy(bits, shifted, sizeof(float) * dim);
  for (int d = 0; d < dim; ++d) out[d] = static_cast<Integer>(bits[d]);
  return step;
}

// The panel kernel calls `multiply` for both products; the one with the queries is known by where the keys lie.
const char *keys_begin, *keys_end;
bool of_keys(const void* b) { return b >= keys_begin && b < keys_end; }

struct WithoutScores : Base {
  static void multiply(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                       float* out, int64_t ldo, bool accumulate) {
    if (!of_keys(b)) Base::multiply(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate);
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

template <class Integer>
struct WithIntegers : Base {
  static constexpr int kInElement = 4 / sizeof(Integer);
  static constexpr bool kUnsigned = sizeof(Integer) == 1 && !kBf16;  // queries, which vpdpbusd takes 128 too large

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
    const int dim = kBf16 ? 2 * depth : depth, elements = dim / kInElement;
    if (!ready) prepare(rows, dim, a, lda);
    const uint32_t* x = reinterpret_cast<const uint32_t*>(queries);
#if defined(GOSSAMER_AMX)
    const float* key_steps = reinterpret_cast<const float*>(b + elements * kChunk);
    for (int first = 0; first < rows; first += 32) {
      const int count = std::min(32, rows - first);
      float* sums = out + first * kChunk;
      tile_gemm<Int8Registers>(count, kChunk, elements, x + first * elements, elements, b, kChunk, sums, kChunk, false);
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < kChunk; c += V::kWidth) {
          const auto step = V::mul(V::load(key_steps + c), V::set1(steps[first + r]));
          V::store(sums + r * kChunk + c, V::mul(to_floats(load_ints(sums + r * kChunk + c)), step));
        }
    }
#else
    int r = 0;
    for (; r + V::kGemmRows <= rows; r += V::kGemmRows) strips<V::kGemmRows>(r, elements, x, b, out);
    for (; r < rows; ++r) strips<1>(r, elements, x, b, out);
#endif
  }

  template <int R>
  static void strips(int r, int elements, const uint32_t* x, const uint32_t* b, float* out) {
    const float* key_steps = reinterpret_cast<const float*>(b + elements * kChunk);
    for (int c = 0; c < kChunk; c += kStrip * V::kWidth) {
      Ints sums[R][kStrip];
      for (int n = 0; n < R; ++n)
        for (int s = 0; s < kStrip; ++s)
          sums[n][s] = kUnsigned ? load_ints(key_steps + kChunk + c + s * V::kWidth) : zero_ints();
      for (int d = 0; d < elements; ++d) {
        Ints keys[kStrip];
        for (int s = 0; s < kStrip; ++s) keys[s] = load_ints(b + d * kChunk + c + s * V::kWidth);
        for (int n = 0; n < R; ++n) {
          const Ints query = repeat(x[(r + n) * elements + d]);
          for (int s = 0; s < kStrip; ++s)
            sums[n][s] = sizeof(Integer) == 1 ? dot_bytes(sums[n][s], query, keys[s])
                                              : dot_words(sums[n][s], query, keys[s]);
        }
      }
      for (int n = 0; n < R; ++n)
        for (int s = 0; s < kStrip; ++s) {
          const auto step = V::mul(V::load(key_steps + c + s * V::kWidth), V::set1(steps[r + n]));
          V::store(out + (r + n) * kChunk + c + s * V::kWidth, V::mul(to_floats(sums[n][s]), step));
        }
    }
  }

  // As pack_tile, with keys [dim / kInElement][64] of integers, then 64 steps, then what 128 adds to each key's sums.
  static void pack(const PackJob& job, const float* mean) {
    const int dim = job.head_dim, elements = dim / kInElement;
    alignas(64) static Integer rounded[kChunk * kMaxHeadDim];
    alignas(64) float wide[kMaxHeadDim];
    const void* rows[kChunk];
    float* steps = static_cast<float*>(job.keys) + elements * kChunk;
    for (int t = 0; t < kChunk; ++t) {
      Integer* row = rounded + t * dim;
      widen_row<V>(job.key_rows[t], job.dtype, dim, dim, 1.0f, wide);
      if (sizeof(Integer) == 1)
        for (int d = 0; d < dim; d += V::kWidth)
          V::store(wide + d, V::fma(V::load(mean + d), V::set1(-1.0f), V::load(wide + d)));
      steps[t] = round_row(wide, dim, row);
      reinterpret_cast<int32_t*>(steps)[kChunk + t] = -128 * std::accumulate(row, row + dim, 0);
      rows[t] = row;
    }
    transpose_keys<V>(rows, elements, static_cast<uint32_t*>(job.keys));
    if constexpr (kBf16)
      for (int t = 0; t < kChunk / 2; ++t) merge_value_rows<V>(job, t);
    else
      for (int t = 0; t < kChunk; ++t)
        widen_row<V>(job.value_rows[t], job.dtype, dim, dim, 1.0f, static_cast<float*>(job.values) + t * dim);
  }
};

struct Problem {
  static constexpr int kHeads = 4, kQueries = 64, kRows = kHeads * kQueries;
  static constexpr int kUnit = kBf16 ? 2 : 4;
  int keys, dim;
  int64_t row_bytes = int64_t{dim} * kUnit, tile_bytes = kChunk * row_bytes;
  std::vector<char> q, k, v, out, packed_keys, packed_values;
  std::vector<float> lse, scratch, mean = std::vector<float>(dim);
  std::vector<std::vector<Tile>> lists;  // by query block

  Problem(int keys, int dim, int tiles) : keys(keys), dim(dim) {
    for (auto* x : {&q, &out}) x->resize(keys * kHeads * row_bytes);
    for (auto* x : {&k, &v, &packed_keys, &packed_values}) x->resize(keys * row_bytes + 64);
    lse.resize(keys * kHeads);
    scratch.resize(panel_scratch_bytes(dim, dim) / sizeof(float) + 16);
    std::mt19937 generator(0);
    std::vector<int> order(keys / kChunk);
    std::iota(order.begin(), order.end(), 0);
    for (int m = 0; m < keys / kQueries; ++m) {
      std::shuffle(order.begin(), order.end(), generator);
      std::sort(order.begin(), order.begin() + tiles);
      lists.emplace_back();
      for (int n = 0; n < tiles; ++n)
        lists.back().push_back({aligned(packed_keys) + order[n] * tile_bytes,
                                aligned(packed_values) + order[n] * tile_bytes, nullptr, int64_t{order[n]} * kChunk,
                                ~uint64_t{0}, kChunk, TileKind::kFull});
    }
    keys_begin = aligned(packed_keys);
    keys_end = keys_begin + keys * row_bytes;
  }

  template <class T>
  static T* aligned(std::vector<T>& x) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(x.data()) + 63) & ~uintptr_t{63});
  }

  void draw(unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &k, &v})
      for (size_t n = 0; n + kUnit <= x->size(); n += kUnit) {
        const float value = normal(generator);
        if (kBf16)
          *reinterpret_cast<uint16_t*>(x->data() + n) = float_to_bf16(value);
        else
          *reinterpret_cast<float*>(x->data() + n) = value;
      }
  }

  static constexpr DType dtype() { return kBf16 ? DType::kBFloat16 : DType::kFloat32; }

  void average() {
    alignas(64) float wide[kMaxHeadDim];
    std::fill(mean.begin(), mean.end(), 0.0f);
    for (int t = 0; t < keys; ++t) {
      widen_row<V>(k.data() + t * row_bytes, dtype(), dim, dim, 1.0f / static_cast<float>(keys), wide);
      for (int d = 0; d < dim; ++d) mean[d] += wide[d];
    }
  }

  template <class Pack>
  void pack(const Pack& pack_one) {
    for (int n = 0; n < keys / kChunk; ++n) {
      const void *key_rows[kChunk], *value_rows[kChunk];
      for (int t = 0; t < kChunk; ++t) {
        key_rows[t] = k.data() + (n * kChunk + t) * row_bytes;
        value_rows[t] = v.data() + (n * kChunk + t) * row_bytes;
      }
      pack_one(PackJob{dtype(), key_rows, value_rows, dim, dim, dim, dim, aligned(packed_keys) + n * tile_bytes,
                       aligned(packed_values) + n * tile_bytes});
    }
  }

  template <class Isa>
  void attend() {
    for (size_t m = 0; m < lists.size(); ++m) {
      const void* queries[kRows];
      void* outputs[kRows];
      float* lses[kRows];
      int64_t positions[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = (r / kQueries) * int64_t{keys} + m * kQueries + r % kQueries;
        queries[r] = q.data() + row * row_bytes;
        outputs[r] = out.data() + row * row_bytes;
        lses[r] = lse.data() + row;
        positions[r] = m * kQueries + r % kQueries;
      }
      Panel panel{kRows, dim, dim, dim, dim, dtype(), dtype(), queries, outputs, lses, positions, nullptr,
                  1.0f / std::sqrt(static_cast<float>(dim)), 0.0f, kInfinity, {keys, 0, 0, kUnlimited, false},
                  lists[m].data(), static_cast<int64_t>(lists[m].size()), aligned(scratch)};
      attend_panel<Isa>(panel);
    }
  }

  std::vector<float> outputs() const {
    std::vector<float> wide(out.size() / kUnit);
    for (size_t n = 0; n < wide.size(); ++n) wide[n] = scalar_as_float(out.data(), static_cast<int>(n), dtype());
    return wide;
  }
};

struct Contender {
  const char* name;
  std::function<void()> pack, attend;
  std::vector<double> pack_s, attend_s;
  double difference = 0;  // of the output from the first contender's, relative, in the L2 norm
};

double difference(const std::vector<float>& got, const std::vector<float>& expected) {
  double apart = 0, size = 0;
  for (size_t n = 0; n < got.size(); ++n) {
    apart += std::pow(got[n] - expected[n], 2.0);
    size += std::pow(expected[n], 2.0);
  }
  return std::sqrt(apart / size);
}

double seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void print(const char* name, const std::vector<double>& values) {
  std::printf("\"%s\": [", name);
  for (size_t n = 0; n < values.size(); ++n) std::printf("%s%.6f", n ? ", " : "", values[n]);
  std::printf("], ");
}

int run(int keys, int dim, int tiles, int rounds) {
  Problem p(keys, dim, tiles);
  const auto as_it_is = [&] { p.pack([](const PackJob& job) { pack_tile<Base>(job); }); };
  std::vector<Contender> all{{"as it is", as_it_is, [&] { p.attend<Base>(); }, {}, {}},
                             {"no product", as_it_is, [&] { p.attend<WithoutScores>(); }, {}, {}}};
  all.push_back({"int8", [&] {
                   p.average();
                   p.pack([&](const PackJob& job) { WithIntegers<int8_t>::pack(job, p.mean.data()); });
                 }, [&] { p.attend<WithIntegers<int8_t>>(); }, {}, {}});
  if (!kBf16)
    all.push_back({"int16", [&] { p.pack([](const PackJob& job) { WithIntegers<int16_t>::pack(job, nullptr); }); },
                   [&] { p.attend<WithIntegers<int16_t>>(); }, {}, {}});
  for (int n = 0; n <= rounds; ++n) {
    p.draw(static_cast<unsigned>(n));
    all[0].pack();
    all[0].attend();
    const std::vector<float> expected = p.outputs();
    for (size_t turn = 0; turn < all.size(); ++turn) {
      Contender& one = all[(n + turn) % all.size()];
      const double pack_s = seconds(one.pack), attend_s = seconds(one.attend);
      one.difference = difference(p.outputs(), expected);
      if (n == 0) continue;
      one.pack_s.push_back(pack_s);
      one.attend_s.push_back(attend_s);
    }
  }
  std::printf("[");
  for (const Contender& one : all) {
    std::printf("%s{\"scores\": \"%s\", ", &one == all.data() ? "" : ", ", one.name);
    print("pack_s", one.pack_s);
    print("attend_s", one.attend_s);
    std::printf("\"difference\": %.6f}", one.difference);
  }
  std::printf("]\n");
  return 0;
}

}  // namespace
}  // namespace gossamer

int main(int argc, char** argv) {
  if (argc != 5) return 1;
#if defined(GOSSAMER_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 1;
#endif
  return gossamer::run(std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]));
}
