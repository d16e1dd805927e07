// Compiled for AVX-512 F, BW, VL and DQ: fp32 FMA.
#include "kernels/flash.h"
#include "kernels/gradient.h"
#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/quantise.h"
#include "kernels/score_kernels.h"
#include "kernels/vec_avx512.h"

namespace gossamer {
namespace {

struct Avx512 {
  using Vec = VecAvx512;
  using Operand = Vec::Reg;
  static constexpr bool kPairs = false;
  static constexpr int kRowStep = 1;
  static constexpr int kExpDegree = 5;
  static Operand load(const uint32_t* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
  static Operand broadcast(const uint32_t* p) { return Vec::set1(bits_to_float(*p)); }
  static Vec::Reg mac(Operand a, Operand b, Vec::Reg c) { return Vec::fma(a, b, c); }
  static void begin() {}
  static void end() {}
  static void multiply(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b,
                       int64_t ldb, float* out, int64_t ldo, bool accumulate) {
    gemm<Avx512>(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate);
  }
};

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels{false, 16, pack_tile<Avx512>, attend_panel<Avx512>, score_kernels<Avx512>(),
                               gradient_kernels<Avx512>(), quantise_kernels<Avx512::Vec>(),
                               linear_kernels<VecAvx512>()};
  return &kernels;
}

}  // namespace gossamer
