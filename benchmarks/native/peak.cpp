// The arithmetic that a machine can do: flops a second of independent multiply-adds on registers, of the kind that an
// instruction set's kernels are made of. bf16 dot products for avx512_bf16 and amx, fp32 otherwise.
//
//   peak THREADS SECONDS    on that many threads for about that long; prints the number
//
// benchmarks/peak.py compiles it once for each instruction set, with its flags and one of GOSSAMER_PEAK_PORTABLE, _AVX2,
// _AVX512, _AVX512_BF16 and _AMX.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(GOSSAMER_PEAK_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#elif !defined(GOSSAMER_PEAK_PORTABLE)
#include <immintrin.h>
#endif

namespace {

// `run` runs that many rounds of multiply-adds and returns a number that depends on all of them; kFlops are those of a
// round. The accumulators are independent and more than latency times throughput of the instruction; the factors are
// known at run time only. A statement for each accumulator, by name: some compilers keep arrays of them in memory.
#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define TWENTY(DO) TWELVE(DO) DO(12) DO(13) DO(14) DO(15) DO(16) DO(17) DO(18) DO(19)

#if defined(GOSSAMER_PEAK_AMX)

constexpr double kFlops = 6 * 16 * 16 * 32 * 2;

bool prepare() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Six accumulators, two factors, as many tiles as there are.
float run(int64_t rounds, float, float) {
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

#else

#if defined(GOSSAMER_PEAK_PORTABLE)
typedef float Reg __attribute__((vector_size(16)));
constexpr double kFlops = 12 * 4 * 2;
#define ACCUMULATORS TWELVE
Reg set1(float x) { return Reg{x, x, x, x}; }
Reg multiply_add(Reg sum, Reg x, Reg y) { return sum * x + y; }
#elif defined(GOSSAMER_PEAK_AVX2)
using Reg = __m256;
constexpr double kFlops = 12 * 8 * 2;
#define ACCUMULATORS TWELVE
Reg set1(float x) { return _mm256_set1_ps(x); }
Reg multiply_add(Reg sum, Reg x, Reg y) { return _mm256_fmadd_ps(sum, x, y); }
#elif defined(GOSSAMER_PEAK_AVX512)
using Reg = __m512;
constexpr double kFlops = 20 * 16 * 2;
#define ACCUMULATORS TWENTY
Reg set1(float x) { return _mm512_set1_ps(x); }
Reg multiply_add(Reg sum, Reg x, Reg y) { return _mm512_fmadd_ps(sum, x, y); }
#elif defined(GOSSAMER_PEAK_AVX512_BF16)
using Reg = __m512;
constexpr double kFlops = 20 * 32 * 2;
#define ACCUMULATORS TWENTY
Reg set1(float x) { return _mm512_set1_ps(x); }
Reg multiply_add(Reg sum, Reg x, Reg y) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(x), (__m512bh)_mm512_castps_si512(y));
}
#endif

bool prepare() { return true; }

float run(int64_t rounds, float a, float b) {
  const Reg x = set1(a), y = set1(b);
#define START(i) Reg sum##i = set1(a + static_cast<float>(i));
#define STEP(i) sum##i = multiply_add(sum##i, x, y);
#define ADD(i) total += sum##i;
  ACCUMULATORS(START)
  for (int64_t n = 0; n < rounds; ++n) {
    ACCUMULATORS(STEP)
  }
  Reg total = y;
  ACCUMULATORS(ADD)
  return total[0];
}

#endif

double flops_a_second(int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 1 << 14;
  volatile float factor = 0.999f, term = 1e-3f;
  std::vector<double> begun(threads), ended(threads), done(threads);
  std::atomic<float> kept{0};
  const auto start = Clock::now();
  const auto now = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  std::vector<std::thread> workers;
  for (int n = 0; n < threads; ++n)
    workers.emplace_back([&, n] {
      run(kRounds, factor, term);
      begun[n] = now();
      do {
        kept = run(kRounds, factor, term);
        done[n] += kRounds * kFlops;
      } while ((ended[n] = now()) - begun[n] < seconds);
    });
  for (std::thread& worker : workers) worker.join();
  double flops = 0;
  for (double part : done) flops += part;
  return flops / (*std::max_element(ended.begin(), ended.end()) - *std::min_element(begun.begin(), begun.end()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !prepare()) return 1;
  std::printf("%.6g\n", flops_a_second(std::max(1, std::atoi(argv[1])), std::atof(argv[2])));
  return 0;
}
