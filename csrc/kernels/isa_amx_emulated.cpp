// The AMX kernel's code over an emulation of its tile operations, for tests on machines without AMX. Slow.
#include "kernels/amx_tiles.h"
#include "kernels/flash.h"
#include "kernels/gradient.h"
#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/quantise.h"
#include "kernels/score_kernels.h"
#include "kernels/vec_portable.h"

namespace gossamer {
namespace {

// tdpbf16ps as documented: for each pair of bf16 one multiply-add, even element first, denormals flushed to zero.
struct EmulatedTileRegisters {
  static uint32_t& element(int tile, int row, int column) {
    static thread_local uint32_t state[8][16][16];
    return state[tile][row][column];
  }
  template <int N>
  static void load(const void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 16; ++c) element(N, r, c) = static_cast<const uint32_t*>(p)[r * stride + c];
  }
  template <int N>
  static void store(void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 16; ++c) static_cast<uint32_t*>(p)[r * stride + c] = element(N, r, c);
  }
  template <int N>
  static void zero() {
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 16; ++c) element(N, r, c) = 0;
  }
  static float flushed(uint32_t bits) { return bits_to_float(bits & 0x7f800000 ? bits : bits & 0x80000000); }
  template <int C, int A, int B>
  static void dot() {
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 16; ++c) {
        float sum = flushed(element(C, r, c));
        for (int d = 0; d < 16; ++d) {
          const uint32_t x = element(A, r, d), y = element(B, d, c);
          sum += flushed(x << 16) * flushed(y << 16);
          sum += flushed(x & 0xffff0000) * flushed(y & 0xffff0000);
        }
        element(C, r, c) = float_to_bits(sum);
      }
  }
};

struct AmxEmulated {
  using Vec = VecPortable;
  static constexpr bool kPairs = true;
  static constexpr int kRowStep = 16;
  static constexpr int kExpDegree = 3;
  static void begin() {}
  static void end() {}
  static void multiply(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b,
                       int64_t ldb, float* out, int64_t ldo, bool accumulate, const Pieces& pieces = {}) {
    tile_gemm<EmulatedTileRegisters>(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate, pieces);
  }
};

}  // namespace

const Kernels* amx_emulated_kernels() {
  static const Kernels kernels{true, 32, pack_tile<AmxEmulated>, attend_panel<AmxEmulated>,
                               score_kernels<AmxEmulated>(), gradient_kernels<AmxEmulated>(),
                               quantise_kernels<AmxEmulated::Vec>(),
                               linear_kernels<VecPortable>()};
  return &kernels;
}

}  // namespace gossamer
