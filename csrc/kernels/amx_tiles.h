// Matrix work of the bf16 path on 16 x 16 tiles, over a small layer of tile operations: the hardware's (AMX) or an
// emulation of them, so that the same code is tested where no AMX is.
#pragma once

#include <cstdint>

namespace gossamer {
namespace {

// A depth that lies in pieces behind one another: elements from each to the next.
struct Pieces {
  int64_t count = 1, next_a = 0, next_b = 0;
};

// As `gemm` in gemm.h, in blocks of 32 x 32, whose sums stay in registers over all pieces of the depth. Rows are rounded up to 16 and depth and columns are multiples of 16: a
// panel's scratch has room for kMaxRows rows, and what is computed in the surplus rows is never read.
template <class TileRegisters>
inline void tile_gemm(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                      float* out, int64_t ldo, bool accumulate, const Pieces& pieces = {}) {
  for (int r = 0; r < rows; r += 32) {
    const bool two_rows = r + 16 < rows;
    for (int c = 0; c < columns; c += 32) {
      const bool two_columns = c + 16 < columns;
      float* o = out + r * ldo + c;
      if (accumulate) {
        TileRegisters::template load<0>(o, ldo);
        if (two_columns) TileRegisters::template load<1>(o + 16, ldo);
        if (two_rows) TileRegisters::template load<2>(o + 16 * ldo, ldo);
        if (two_rows && two_columns) TileRegisters::template load<3>(o + 16 * ldo + 16, ldo);
      } else {
        TileRegisters::template zero<0>();
        TileRegisters::template zero<1>();
        TileRegisters::template zero<2>();
        TileRegisters::template zero<3>();
      }
      const uint32_t *own_a = a, *own_b = b;
      for (int64_t n = 0; n < pieces.count; ++n, own_a += pieces.next_a, own_b += pieces.next_b)
        for (int d = 0; d < depth; d += 16) {
          TileRegisters::template load<4>(own_a + r * lda + d, lda);
          TileRegisters::template load<6>(own_b + d * ldb + c, ldb);
          TileRegisters::template dot<0, 4, 6>();
          if (two_columns) {
            TileRegisters::template load<7>(own_b + d * ldb + c + 16, ldb);
            TileRegisters::template dot<1, 4, 7>();
          }
          if (two_rows) {
            TileRegisters::template load<5>(own_a + (r + 16) * lda + d, lda);
            TileRegisters::template dot<2, 5, 6>();
            if (two_columns) TileRegisters::template dot<3, 5, 7>();
          }
        }
      TileRegisters::template store<0>(o, ldo);
      if (two_columns) TileRegisters::template store<1>(o + 16, ldo);
      if (two_rows) TileRegisters::template store<2>(o + 16 * ldo, ldo);
      if (two_rows && two_columns) TileRegisters::template store<3>(o + 16 * ldo + 16, ldo);
    }
  }
}

}  // namespace
}  // namespace gossamer
