// Keys or values of a call, wherever they lie: rows of a tensor, sequences in the pages of a cache, or encoded.
#pragma once

#include <cstdint>

#include "kernels/page_job.h"
#include "kernels/score_job.h"
#include "kernels/stored_job.h"
#include "plan/tensor.h"

namespace gossamer {

// Sequences of a batch: token t of sequence b in page table[b * table_stride + t / page]. Strides in bytes.
struct Pages {
  const char* data;
  int64_t page_stride, head_stride;
  int64_t page;  // tokens in each
  PageForm form;
  const int32_t* table;
  int64_t table_stride;

  int64_t number(int64_t b, int64_t slot) const { return table[b * table_stride + slot / page]; }
};

// The first tokens encoded, and the others as they came.
struct Encoded {
  StoredRows rows;  // of the first head; which ones is not said
  int64_t count;    // of encoded tokens
  struct Strides {
    int64_t batch, head;
  };
  Strides numbers, scales, zeros, bitmaps;
  TensorView tail;
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
  Tokens(const Pages& pages, int64_t batch, int64_t heads, int64_t tokens, int dim, DType dtype);
  Tokens(const Encoded& encoded);  // NOLINT

  int64_t batch, heads, tokens;
  int dim;
  DType dtype;

  int64_t row_bytes() const { return int64_t{dim} * element_size(dtype); }
  bool paged() const { return pages_.table != nullptr; }
  const Pages& pages() const { return pages_; }
  bool encoded() const { return encoded_.count > 0; }
  // Whether a row's numbers lie side by side, so that a single one costs no more than its length.
  bool in_rows() const { return !encoded() && (!paged() || pages_.form == PageForm::kRows); }
  // Where the rows of one head lie as they do in a tensor, else null.
  const TensorView* tensor() const { return paged() || encoded() ? nullptr : &tensor_; }

  // The rows at 64 slots; null at a slot below 0.
  void point_at(const ScoreKernels& kernels, int64_t b, int64_t head, const int64_t* slots, PointedRows& to) const;
  // `count` rows from a slot on, in `room` for as many where they do not lie evenly.
  EvenRows consecutive(const ScoreKernels& kernels, int64_t b, int64_t head, int64_t slot, int64_t count,
                       char* room) const;
  // The same where they lie evenly as they are; else first is null.
  EvenRows in_place(int64_t b, int64_t head, int64_t slot, int64_t count) const;
  // How many of `count` rows from a slot on follow one another in memory, where rows lie evenly at all.
  int64_t evenly(int64_t slot, int64_t count) const {
    return paged() && pages_.page - slot % pages_.page < count ? pages_.page - slot % pages_.page : count;
  }
  // How the rows at slots [lowest, highest] are stored, slot s as row `first + s`; false where they are not stored alike.
  bool stored(int64_t b, int64_t head, int64_t lowest, int64_t highest, StoredRows& to) const;

 private:
  const char* page_of(int64_t b, int64_t head, int64_t slot) const {
    return pages_.data + pages_.number(b, slot) * pages_.page_stride + head * pages_.head_stride;
  }
  PageJob job(int64_t b, int64_t head, int64_t slot, int64_t count, char* rows) const;
  void read_page_rows(const ScoreKernels& kernels, int64_t b, int64_t head, const int64_t* slots, PointedRows& to) const;
  void read_encoded(const ScoreKernels& kernels, int64_t b, int64_t head, int64_t slot, int64_t count, char* to) const;

  TensorView tensor_;  // of the tail, where tokens are encoded
  Pages pages_;
  Encoded encoded_;
};

}  // namespace gossamer
