// 2^f on [0, 1], fitted for the smallest largest relative error (Lawson's algorithm).
#pragma once

namespace gossamer {
namespace {

// Relative error 7.5e-5, 2.6e-6, 9.4e-8, 1.9e-9 for degrees 3 to 6, before rounding. A P that is rounded to bf16 needs
// 3. From 5 on, which serve fp32, 2^0 is 1 exactly: a row that rests on one key then returns its value.
template <class V, int kDegree>
inline typename V::Reg exp2_polynomial(typename V::Reg f) {
  static_assert(kDegree >= 3 && kDegree <= 6, "only these are fitted");
  constexpr float kCoefficients[4][7] = {
      {0x1.fff632p-1f, 0x1.64444cp-1f, 0x1.cefc4cp-3f, 0x1.3f96a4p-4f, 0, 0, 0},
      {0x1.00002cp+0f, 0x1.62d166p-1f, 0x1.ee798ap-3f, 0x1.aa13f0p-5f, 0x1.bb7cd4p-7f, 0, 0},
      {0x1p+0f, 0x1.62e4bap-1f, 0x1.ebdb56p-3f, 0x1.c91ce6p-5f, 0x1.277854p-7f, 0x1.e974fcp-10f, 0},
      {0x1p+0f, 0x1.62e42ap-1f, 0x1.ebfd9ep-3f, 0x1.c685p-5f, 0x1.3d28p-7f, 0x1.461956p-10f, 0x1.c72118p-13f},
  };
  const float* c = kCoefficients[kDegree - 3];
  typename V::Reg y = V::set1(c[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) y = V::fma(y, f, V::set1(c[i]));
  return y;
}

}  // namespace
}  // namespace gossamer
