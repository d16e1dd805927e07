// Compiled for AVX2, FMA and F16C.
#include "kernels/flash.h"
#include "kernels/gradient.h"
#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/quantise.h"
#include "kernels/score_kernels.h"
#include "kernels/vec_avx2.h"

namespace gossamer {
namespace {

struct Avx2 {
  using Vec = VecAvx2;
  using Operand = Vec::Reg;
  static constexpr bool kPairs = false;
  static constexpr int kRowStep = 1;
  static constexpr int kExpDegree = 5;
  static Operand load(const uint32_t* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
  static Operand broadcast(const uint32_t* p) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(p)); }
  static Vec::Reg mac(Operand a, Operand b, Vec::Reg c) { return Vec::fma(a, b, c); }
  static void begin() {}
  static void end() {}
  static void multiply(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b,
                       int64_t ldb, float* out, int64_t ldo, bool accumulate) {
    gemm<Avx2>(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate);
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels{false, 16, pack_tile<Avx2>, attend_panel<Avx2>, score_kernels<Avx2>(),
                               gradient_kernels<Avx2>(), quantise_kernels<Avx2::Vec>(),
                               linear_kernels<VecAvx2>()};
  return &kernels;
}

}  // namespace gossamer
