// Matrix work of the FMA paths: rows of 32-bit elements, broadcast, times tiles of 32-bit lanes, accumulated in fp32.
// An element is a float and a step is an FMA, or it is a pair of bf16 and a step is a pairwise dot product.
#pragma once

#include <cstdint>

namespace gossamer {
namespace {

// out[r][c] (+)= sum over d of a[r][d] * b[d][c], for R rows and C vectors of columns. The sum is taken by itself and
// then added: over many tiles that rounds less than one long chain.
template <class Isa, int R, int C>
inline void micro_kernel(int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* out,
                         int64_t ldo, bool accumulate) {
  using V = typename Isa::Vec;
  // Every loop over acc is unrolled, or the compiler keeps acc in memory and stores all of it in each step.
  typename V::Reg acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = V::zero();
  for (int d = 0; d < depth; ++d) {
    typename Isa::Operand columns[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) columns[c] = Isa::load(b + d * ldb + c * V::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto element = Isa::broadcast(a + r * lda + d);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = Isa::mac(element, columns[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* sum = out + r * ldo + c * V::kWidth;
      V::store(sum, accumulate ? V::add(V::load(sum), acc[r][c]) : acc[r][c]);
    }
}

template <class Isa, int R>
inline void row_strip(int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                      float* out, int64_t ldo, bool accumulate) {
  using V = typename Isa::Vec;
  constexpr int kStep = V::kGemmCols * V::kWidth;
  int c = 0;
  for (; c + kStep <= columns; c += kStep)
    micro_kernel<Isa, R, V::kGemmCols>(depth, a, lda, b + c, ldb, out + c, ldo, accumulate);
  for (; c + 2 * V::kWidth <= columns; c += 2 * V::kWidth)
    micro_kernel<Isa, R, 2>(depth, a, lda, b + c, ldb, out + c, ldo, accumulate);
  for (; c < columns; c += V::kWidth) micro_kernel<Isa, R, 1>(depth, a, lda, b + c, ldb, out + c, ldo, accumulate);
}

template <class Isa>
inline void gemm(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                 float* out, int64_t ldo, bool accumulate) {
  constexpr int kRows = Isa::Vec::kGemmRows;
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    row_strip<Isa, kRows>(columns, depth, a + r * lda, lda, b, ldb, out + r * ldo, ldo, accumulate);
  for (; r + 4 <= rows; r += 4)
    row_strip<Isa, 4>(columns, depth, a + r * lda, lda, b, ldb, out + r * ldo, ldo, accumulate);
  for (; r + 2 <= rows; r += 2)
    row_strip<Isa, 2>(columns, depth, a + r * lda, lda, b, ldb, out + r * ldo, ldo, accumulate);
  for (; r < rows; ++r) row_strip<Isa, 1>(columns, depth, a + r * lda, lda, b, ldb, out + r * ldo, ldo, accumulate);
}

}  // namespace
}  // namespace gossamer
