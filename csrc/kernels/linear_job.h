// What a linear layer asks of a weight that is stored packed. No std:: here; job.h says why.
#pragma once

#include <cstdint>

#include "kernels/job.h"

namespace gossamer {

// Numbers of a weight that are not 0. kInt8 has a scale a row, by which sums are multiplied later.
enum class ValueType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

constexpr int kColumnStep = 32;  // columns whose bits are read at once
constexpr int kInputStep = 64;   // inputs against sparse weights are padded with zeros to a multiple
constexpr int kValueSlack = 64;  // numbers behind the last of a row that may be read
constexpr int kSlots = 128;      // columns whose codes lie together: inputs are padded with zeros to a multiple
constexpr int kCodeBytes = kSlots / 4;
constexpr int kLevels = 8;  // of a row and block: of codes 0 to 3, then of the same in salient columns

// Rows of a weight with zeros. Bit c of a row of the bitmap says whether column c has a number.
struct SparseRows {
  int rows;
  int columns;
  const uint8_t* bitmap;
  int64_t bitmap_pitch;       // bytes from row to row
  const void* const* values;  // of each row: columns + kValueSlack of them may be read, whatever the bits say
  ValueType type;
};

// Rows of a weight of four levels a column. Byte j of 128 columns has the codes of columns j, 32 + j, 64 + j and
// 96 + j, from its lowest bits on; a code is 2 group + sign, or in salient columns 2 second sign + sign.
struct LevelRows {
  int rows;
  int blocks;               // that have levels of their own
  int groups;               // of 128 columns in a block
  const uint8_t* codes;
  int64_t codes_pitch;      // bytes
  const uint16_t* levels;   // fp16 [blocks][8] of each row
  int64_t levels_pitch;     // elements
  const uint8_t* salient;   // a bit a column
  bool rounded;             // levels are rounded to bf16
};

enum class InputForm : int {
  kFloats,
  kPairs,  // bf16, against numbers or levels in bf16
  kSplit,  // int16 in two rows of `pitch`, against int8: each number is scale (first + second / kSplitStep)
};

constexpr float kSplitTop = 32767.0f;  // of the first
constexpr float kSplitStep = 2 * kSplitTop;

// Inputs, of which sums over columns are taken times a weight. Rows are padded with zeros.
struct InputRows {
  const void* data;
  int64_t pitch;  // elements
  int count;
  InputForm form;
  const float* scales;  // of each row of kSplit
};

struct LinearKernels {
  bool pairs;  // takes the other forms of inputs besides floats
  // Inputs of 32-bit floats or bf16 in two rows of int16; false where some are not finite.
  bool (*split)(const void* row, DType dtype, int columns, int16_t* to, int64_t pitch, float* scale);
  // sums[row * inputs + input]
  void (*sparse_sums)(const SparseRows&, const InputRows&, float* sums);
  void (*level_sums)(const LevelRows&, const InputRows&, float* sums);
  // The weight itself, in fp32 or bf16; of int8 times each row's scale. `columns` of its inputs are live in each block
  // but the last one.
  void (*sparse_whole)(const SparseRows&, const float* scale, DType dtype, void* out, int64_t pitch);
  void (*level_whole)(const LevelRows&, int block, int columns, DType dtype, void* out, int64_t pitch);
};

}  // namespace gossamer
