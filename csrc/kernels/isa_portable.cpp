// Baseline flags: runs everywhere.
#include "kernels/flash.h"
#include "kernels/gradient.h"
#include "kernels/isa.h"
#include "kernels/linear.h"
#include "kernels/quantise.h"
#include "kernels/score_kernels.h"
#include "kernels/vec_portable.h"

namespace gossamer {
namespace {

struct Portable {
  using Vec = VecPortable;
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
    gemm<Portable>(rows, columns, depth, a, lda, b, ldb, out, ldo, accumulate);
  }
};

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels{false, 16, pack_tile<Portable>, attend_panel<Portable>, score_kernels<Portable>(),
                               gradient_kernels<Portable>(), quantise_kernels<Portable::Vec>(),
                               linear_kernels<VecPortable>()};
  return &kernels;
}

}  // namespace gossamer
