// What a decode step asks of each token of a cache without reading its key.
#pragma once

#include "kernels/token_job.h"
#include "plan/tensor.h"
#include "planning/planning.h"

namespace gossamer {

// Codes [batch, heads, rows, tokens], tokens contiguous; strides in bytes.
struct LabelView {
  char* codes;
  int64_t batch, heads, rows, tokens;
  int64_t batch_stride, head_stride, row_stride;
  LabelType type;
};

// Products of queries [batch, query heads, 1, channels] with the labels of each token: out [batch, query heads,
// tokens], -inf for tokens that a row does not have (`keys` are its live ones). Steps of codes, and their lows: bf16
// [batch, heads, tokens, 1], one behind the other.
void label_scores(const Kernels& kernels, const TensorView& queries, const LabelView& labels, const TensorView* low,
                  const TensorView* step, const int64_t* keys, float* out, int threads);

// Codes [batch, heads, tiles, tables, 64] against those of queries [batch, query heads, tables], contiguous: out
// [batch, query heads, tiles * 64], how many are equal.
struct HashView {
  const int16_t* queries;
  int64_t batch, query_heads, tables;
  const int16_t* codes;
  int64_t heads, tiles;
  int64_t batch_stride, head_stride;  // elements
};

void collisions(const Kernels& kernels, const HashView& hashes, int16_t* out, int threads);

}  // namespace gossamer
