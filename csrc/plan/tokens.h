// Keys or values of a call, wherever they lie: rows of a tensor, or one sequence in the pages of a cache.
#pragma once

#include <cstdint>

#include "kernels/page_job.h"
#include "kernels/score_job.h"
#include "plan/tensor.h"

namespace gossamer {

// A sequence's tokens: token t in page table[t / page]. Strides in bytes.
struct Pages {
  const char* data;
  int64_t page_stride, head_stride;
  int64_t page;  // tokens in each
  PageForm form;
  const int32_t* table;
};

// Up to 64 rows as pointers, and room for those that had to be copied.
struct PointedRows {
  const void* rows[kChunk];
  alignas(64) char copies[kChunk * kMaxHeadDim * sizeof(float)];
};

// Consecutive rows, so many bytes from each to the next.
struct EvenRows {
  const char* first;
  int64_t stride;
};

// [batch, heads, tokens, dim]. Nothing is read but the rows that are asked for, so that dead slots and pages of other
// sequences may hold anything.
class Tokens {
 public:
  Tokens(const TensorView& rows);  // NOLINT: a tensor serves wherever tokens do
  // A batch of one.
  Tokens(const Pages& pages, int64_t heads, int64_t tokens, int dim, DType dtype);

  int64_t batch, heads, tokens;
  int dim;
  DType dtype;

  int64_t row_bytes() const { return int64_t{dim} * element_size(dtype); }
  bool paged() const { return pages_.table != nullptr; }
  // Whether a row's numbers lie side by side, so that a single one costs no more than its length.
  bool in_rows() const { return !paged() || pages_.form == PageForm::kRows; }
  // Where the rows of one head lie as they do in a tensor, else null.
  const TensorView* tensor() const { return paged() ? nullptr : &tensor_; }

  // The rows at 64 slots; null at a slot below 0.
  void point_at(const ScoreKernels& kernels, int64_t b, int64_t head, const int64_t* slots, PointedRows& to) const;
  // `count` rows from a slot on, in `room` for as many where they do not lie evenly.
  EvenRows consecutive(const ScoreKernels& kernels, int64_t b, int64_t head, int64_t slot, int64_t count,
                       char* room) const;
  // The same where they lie evenly as they are; else first is null.
  EvenRows in_place(int64_t b, int64_t head, int64_t slot, int64_t count) const;

 private:
  const char* page_of(int64_t head, int64_t slot) const {
    return pages_.data + pages_.table[slot / pages_.page] * pages_.page_stride + head * pages_.head_stride;
  }
  PageJob job(int64_t head, int64_t slot, int64_t count, char* rows) const;

  TensorView tensor_;
  Pages pages_;
};

}  // namespace gossamer
