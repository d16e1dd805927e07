// Instruction sets by function here, not by file: these loops share no code with the kernels.
#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu_features.h"
#include "parallel.h"

#ifdef GOSSAMER_X86
#include <immintrin.h>
#endif

namespace gossamer {
namespace {

// Each runs `rounds` rounds of multiply-adds and returns a number that depends on all of them. The accumulators are
// independent and more than latency times throughput of the instruction; the factors are known at run time only.
using Loop = float (*)(int64_t rounds, float a, float b);

// A statement for each accumulator, by name: some compilers keep arrays of them in memory.
#define GOSSAMER_TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define GOSSAMER_TWENTY(DO) GOSSAMER_TWELVE(DO) DO(12) DO(13) DO(14) DO(15) DO(16) DO(17) DO(18) DO(19)

typedef float Four __attribute__((vector_size(16)));

float portable_loop(int64_t rounds, float a, float b) {
  const Four x = {a, a, a, a}, y = {b, b, b, b};
#define START(i) Four s##i = x + static_cast<float>(i);
#define STEP(i) s##i = s##i * x + y;
#define ADD(i) total += s##i;
  GOSSAMER_TWELVE(START)
  for (int64_t n = 0; n < rounds; ++n) {
    GOSSAMER_TWELVE(STEP)
  }
  Four total = y;
  GOSSAMER_TWELVE(ADD)
#undef START
#undef STEP
#undef ADD
  return total[0];
}
constexpr double kPortableFlops = 12 * 4 * 2;

#ifdef GOSSAMER_HAS_AVX2
__attribute__((target("avx2,fma"))) float avx2_loop(int64_t rounds, float a, float b) {
  const __m256 x = _mm256_set1_ps(a), y = _mm256_set1_ps(b);
#define START(i) __m256 s##i = _mm256_set1_ps(a + static_cast<float>(i));
#define STEP(i) s##i = _mm256_fmadd_ps(s##i, x, y);
#define ADD(i) total = _mm256_add_ps(total, s##i);
  GOSSAMER_TWELVE(START)
  for (int64_t n = 0; n < rounds; ++n) {
    GOSSAMER_TWELVE(STEP)
  }
  __m256 total = y;
  GOSSAMER_TWELVE(ADD)
#undef START
#undef STEP
#undef ADD
  return _mm256_cvtss_f32(total);
}
constexpr double kAvx2Flops = 12 * 8 * 2;
#endif

#ifdef GOSSAMER_HAS_AVX512
__attribute__((target("avx512f"))) float avx512_loop(int64_t rounds, float a, float b) {
  const __m512 x = _mm512_set1_ps(a), y = _mm512_set1_ps(b);
#define START(i) __m512 s##i = _mm512_set1_ps(a + static_cast<float>(i));
#define STEP(i) s##i = _mm512_fmadd_ps(s##i, x, y);
#define ADD(i) total = _mm512_add_ps(total, s##i);
  GOSSAMER_TWENTY(START)
  for (int64_t n = 0; n < rounds; ++n) {
    GOSSAMER_TWENTY(STEP)
  }
  __m512 total = y;
  GOSSAMER_TWENTY(ADD)
#undef START
#undef STEP
#undef ADD
  return _mm512_cvtss_f32(total);
}
constexpr double kAvx512Flops = 20 * 16 * 2;
#endif

#ifdef GOSSAMER_HAS_AVX512_BF16
__attribute__((target("avx512f,avx512bf16"))) float avx512_bf16_loop(int64_t rounds, float a, float b) {
  const __m512 x = _mm512_set1_ps(a), y = _mm512_set1_ps(b);
  const __m512bh p = (__m512bh)_mm512_castps_si512(x), q = (__m512bh)_mm512_castps_si512(y);
#define START(i) __m512 s##i = _mm512_set1_ps(a + static_cast<float>(i));
#define STEP(i) s##i = _mm512_dpbf16_ps(s##i, p, q);
#define ADD(i) total = _mm512_add_ps(total, s##i);
  GOSSAMER_TWENTY(START)
  for (int64_t n = 0; n < rounds; ++n) {
    GOSSAMER_TWENTY(STEP)
  }
  __m512 total = y;
  GOSSAMER_TWENTY(ADD)
#undef START
#undef STEP
#undef ADD
  return _mm512_cvtss_f32(total);
}
constexpr double kAvx512Bf16Flops = 20 * 32 * 2;
#endif

#ifdef GOSSAMER_HAS_AMX
// Six accumulators, two factors, as many tiles as there are. Like isa_amx.cpp, never run so far.
float amx_loop(int64_t rounds, float, float) {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int n = 0; n < 8; ++n) {
    config.row_bytes[n] = 64;
    config.rows[n] = 16;
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  __asm__ volatile(
      "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
      "tilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\ttilezero %%tmm7" ::);
  for (int64_t n = 0; n < rounds; ++n)
    __asm__ volatile(
        "tdpbf16ps %%tmm7, %%tmm6, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm1\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm2\n\t"
        "tdpbf16ps %%tmm7, %%tmm6, %%tmm3\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm4\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm5" ::);
  __asm__ volatile("tilerelease" : : : "memory");
  return 0;
}
constexpr double kAmxFlops = 6 * 16 * 16 * 32 * 2;
#endif

struct Peak {
  Loop loop;
  double flops;  // of a round
};

Peak peak_of(const std::string& isa) {
  if (kernels_of(isa) != nullptr) {
    if (isa == "portable") return {portable_loop, kPortableFlops};
#ifdef GOSSAMER_HAS_AVX2
    if (isa == "avx2") return {avx2_loop, kAvx2Flops};
#endif
#ifdef GOSSAMER_HAS_AVX512
    if (isa == "avx512") return {avx512_loop, kAvx512Flops};
#endif
#ifdef GOSSAMER_HAS_AVX512_BF16
    if (isa == "avx512_bf16") return {avx512_bf16_loop, kAvx512Bf16Flops};
#endif
#ifdef GOSSAMER_HAS_AMX
    if (isa == "amx") return {amx_loop, kAmxFlops};
#endif
  }
  throw std::invalid_argument("no peak of " + isa + " here");
}

}  // namespace

double peak_flops(const std::string& isa, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 1 << 14;
  const Peak peak = peak_of(isa);
  volatile float factor = 0.999f, term = 1e-3f;
  threads = std::max(1, threads);
  std::vector<double> begun(threads), ended(threads), done(threads);
  std::atomic<float> kept{0};
  const auto start = Clock::now();
  const auto now = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  run_parallel(threads, threads, [&](int, int64_t job) {
    peak.loop(kRounds, factor, term);
    begun[job] = now();
    do {
      kept = peak.loop(kRounds, factor, term);
      done[job] += kRounds * peak.flops;
    } while ((ended[job] = now()) - begun[job] < seconds);
  });
  double flops = 0;
  for (double part : done) flops += part;
  return flops / (*std::max_element(ended.begin(), ended.end()) - *std::min_element(begun.begin(), begun.end()));
}

}  // namespace gossamer
