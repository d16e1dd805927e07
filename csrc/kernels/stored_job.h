// Rows of keys or values as a cache stores them, which few queries read where they lie. No std:: here; job.h says why.
#pragma once

#include "kernels/job.h"

namespace gossamer {

// What stands for the numbers of a row.
enum class Coding : int {
  kPlain,   // themselves
  kCodes,   // codes of some bits: a number is zero + scale * code
  kBitmap,  // a bitmap says which are not 0, and these follow one another
};

constexpr int kStoredRows = 8;  // rows that are read together

// Rows of one head; strides in bytes. `dim` is a multiple of 16.
struct StoredRows {
  Coding coding;
  DType dtype;  // of numbers, of packed ones, and of scales and zeros
  int dim;
  const char* rows;  // numbers, packed numbers, or codes: the first of a byte in its lowest bits
  int64_t row_stride;
  // Of codes: `group` channels of a row have one scale and zero, and `sharers` rows have the same ones.
  int bits;
  int group;
  int64_t sharers;
  const char* scales;
  int64_t scale_stride;
  const char* zeros;
  int64_t zero_stride;
  // Of bitmaps: bit d % 8 of byte d / 8 says that number d is there.
  const uint8_t* bitmaps;
  int64_t bitmap_stride;
  int packed;       // numbers in each row
  int64_t guarded;  // from this row on, what lies behind a row may not be there

  // Which rows these are: number t is row `first + t`, or `first + positions[t]`; of a position outside [0, most) and of
  // a number that is not below `count`, zeros.
  int count;
  int64_t first;
  const int32_t* positions;  // null: consecutive
  int64_t most;

  // -1: zeros.
  int64_t row(int t) const {
    if (t >= count) return -1;
    if (positions == nullptr) return first + t;
    return positions[t] >= 0 && positions[t] < most ? first + positions[t] : -1;
  }
};

}  // namespace gossamer
