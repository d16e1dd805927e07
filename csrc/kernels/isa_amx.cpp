// Compiled for AVX-512 with BF16, plus AMX instructions by assembly: Intel from Sapphire Rapids on.
#include "kernels/amx_tiles.h"
#include "kernels/flash.h"
#include "kernels/gradient.h"
#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/linear_pairs.h"
#include "kernels/quantise.h"
#include "kernels/score_kernels.h"
#include "kernels/vec_avx512.h"

namespace gossamer {
namespace {

// Own assembly in place of the compiler's intrinsics: gcc 12 believes that ldtilecfg reads 8 bytes of the 64 and drops
// the stores to the others, and its tile loads do not say that they read memory.
struct AmxTileRegisters {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

  static void begin() {
    Config config = {};
    config.palette = 1;
    for (int n = 0; n < 8; ++n) {
      config.row_bytes[n] = 64;
      config.rows[n] = 16;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  static void end() { __asm__ volatile("tilerelease" : : : "memory"); }

  template <int N>
  static void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,4), %%tmm%c2" : : "r"(p), "r"(stride), "i"(N) : "memory");
  }
  template <int N>
  static void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,4)" : : "r"(p), "r"(stride), "i"(N) : "memory");
  }
  template <int N>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(N));
  }
  template <int C, int A, int B>
  static void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

struct Amx {
  using Vec = VecAvx512;
  using TileRegisters = AmxTileRegisters;
  static constexpr bool kPairs = true;
  static constexpr int kRowStep = 16;
  static constexpr int kExpDegree = 3;
  static void begin() { TileRegisters::begin(); }
  static void end() { TileRegisters::end(); }
  static void multiply(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b,
                       int64_t ldb, float* out, int64_t ldo, bool accumulate, const Pieces& pieces = {}) {
    tile_gemm<TileRegisters>(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate, pieces);
  }
};

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels{true, 32, pack_tile<Amx>, attend_panel<Amx>, score_kernels<Amx>(),
                               gradient_kernels<Amx>(), quantise_kernels<Amx::Vec>(),
                               linear_kernels<VecAvx512, PairLanes>()};
  return &kernels;
}

}  // namespace gossamer
