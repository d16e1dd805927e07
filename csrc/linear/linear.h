// Products of a few rows of inputs with weights that are stored packed, and such weights made whole.
#pragma once

#include <cstdint>

#include "kernels/linear_job.h"

namespace gossamer {

// A weight [rows, columns] with zeros. What it points at is as long as it says; the bits and starts inside may be
// anything: no value behind the last is read, whatever they say.
struct SparseWeight {
  int64_t rows, columns;
  const uint8_t* bitmap;  // ceil(columns / 8) bytes a row
  const char* values;
  ValueType type;
  int64_t count;          // of values
  const int64_t* starts;  // rows + 1
  const float* scale;     // a row; null: 1
};

// A weight [rows, columns] of a few levels, by blocks of columns. Each block takes whole groups of 128 slots.
struct LevelWeight {
  int64_t rows, columns;
  int64_t block;  // columns of a block, but for the last one
  const uint8_t* codes;
  const uint16_t* levels;
  const uint8_t* salient;  // a bit a slot
  bool rounded;            // to bf16, as they are for inputs in bf16 too

  int64_t blocks() const { return (columns + block - 1) / block; }
  int64_t groups() const { return (block + kSlots - 1) / kSlots; }
  int64_t slots() const { return blocks() * groups() * kSlots; }
};

// A matrix whose rows are contiguous.
struct Matrix {
  char* data;
  int64_t rows, columns;
  int64_t stride;  // bytes from row to row
  DType dtype;
};

// out = inputs weight^T + bias. The bias is of out's dtype; null: none.
void multiply(const Kernels& kernels, const SparseWeight& weight, const Matrix& inputs, const void* bias,
              const Matrix& out, int threads);
void multiply(const Kernels& kernels, const LevelWeight& weight, const Matrix& inputs, const void* bias,
              const Matrix& out, int threads);

// Rows first .. first + out.rows - 1 of the weight, in fp32 or bf16.
void make_whole(const Kernels& kernels, const SparseWeight& weight, int64_t first, const Matrix& out, int threads);
void make_whole(const Kernels& kernels, const LevelWeight& weight, int64_t first, const Matrix& out, int threads);

}  // namespace gossamer
