// Plain structures that planning hands to the instruction-set-specific kernels. No std:: here; job.h says why.
#pragma once

#include "kernels/job.h"
#include "kernels/page_job.h"
#include "kernels/stored_job.h"
#include "kernels/token_job.h"

namespace gossamer {

constexpr int kScoreRows = 64;   // query rows scored together
constexpr int kScorePitch = 80;  // floats from one row of logits to the next: 64, and zeros for sums along diagonals
constexpr int kLanes = 16;       // partial sums a row; narrower vectors use the first of them

struct RowList {
  const void* const* rows;  // null: zeros
  int count;
  int dim;
  int padded_dim;
  DType dtype;
};

// Up to kScoreRows packed queries against 64 packed keys, each in one or more pieces whose products are added. Logits
// are in powers of two: factor is scale * log2(e).
struct ScorePanel {
  const void* queries;
  const void* keys;
  int rows;
  int padded_dim;
  float factor;
  const uint64_t* masks;  // one a row: the keys that it sees
  float* logits;          // scratch behind kLanes zeros: kScoreRows rows of kScorePitch, zero beyond the 64
  int pieces = 1;         // behind one another: kScoreRows packed queries, 64 packed keys
};

// Rows of a head's page bounds, one behind the other, against up to a few queries of as many floats.
struct PageScores {
  const float* queries;  // heads rows of dim
  int heads;
  int dim;
  const char* pages;
  int64_t stride_bytes;
  int64_t count;  // of pages
  DType dtype;
  float* scores;         // a row of `pitch` a head
  int64_t pitch;
};

struct ScoreKernels {
  void (*pack_keys)(const RowList&, void* out);     // count is 64
  void (*pack_queries)(const RowList&, void* out);  // count is at most kScoreRows
  // Raises each row's maximum and adds to its kLanes sums of 2^(logit - maximum).
  void (*add_exponentials)(const ScorePanel&, float* maximum, float* sums);
  // Raises each row's maximum.
  void (*raise_maxima)(const ScorePanel&, float* maximum);
  // Adds 2^(logit + shift[row]) to its column's sum and, at index column - row + rows - 1, to its diagonal's.
  void (*add_mass)(const ScorePanel&, const float* shift, float* columns, float* diagonals);
  // Adds 2^(logit + shift[row]) to its column's sum.
  void (*column_mass)(const ScorePanel&, const float* shift, float* columns);
  // Returns the largest logit; sums over the rows 2^(logit - largest) for each column.
  float (*energy)(const ScorePanel&, float* sums);
  // Sums 2^(logit - reference) over each `run` consecutive columns of a row: 64 / run sums a row, 0 where it sees none.
  // A row's reference is the largest logit of its calls so far, kept in maximum; -inf where it sees none here.
  void (*run_mass)(const ScorePanel&, int run, float* maximum, float* references, float* sums);
  // The largest logit of each `run` consecutive columns of a row: 64 / run a row, -inf where it sees none.
  void (*run_maxima)(const ScorePanel&, int run, float* maxima);
  // Adds e = 2^(peak - top) of each peak to the sums, and sets the flags where it is above a bar.
  void (*add_peaks)(const float* peaks, int64_t count, float top, float bar, float* sums, uint8_t* flags);
  // The largest 2^(logit + shift[row]) of each column over each `run` consecutive rows: 64 a run.
  void (*largest_mass)(const ScorePanel&, const float* shift, int run, float* largest);
  // The same without the exponential: the largest logit + shift[row].
  void (*largest_sum)(const ScorePanel&, const float* shift, int run, float* largest);
  // Of the same, a bit for each column where it is above the bar: a word for each run.
  void (*mark_above)(const ScorePanel&, const float* shift, int run, float bar, uint64_t* marks);
  // Products of queries and keys, as logits; masks and the factor take no part.
  void (*products)(const ScorePanel&);
  // Replaces x by 2^(factor x - m) over their sum, where m is the largest factor x.
  void (*softmax)(float* x, int64_t count, float factor);
  // Turns each of the first `pairs` channels x with the one that lies `pairs` further, y: x cos - y sin, y cos + x sin.
  void (*turn)(const char* row, int dim, int pairs, DType dtype, const float* cos, const float* sin, char* out);
  // Mean of consecutive rows.
  void (*mean)(const char* rows, int64_t stride_bytes, int64_t count, int dim, DType dtype, float* out);
  // Smallest and largest of consecutive rows, by channel.
  void (*bounds)(const char* rows, int64_t stride_bytes, int64_t count, int dim, DType dtype, float* low, float* high);
  // Products of each query with each page, in one order of sums whatever else there is.
  void (*page_scores)(const PageScores&);
  // Products of each query with each token's label, in one order of sums whatever else there is.
  void (*label_scores)(const LabelScores&);
  void (*collisions)(const Collisions&);
  // Copies tokens out of a page of a cache.
  void (*read_page)(const PageJob&);
  // Copies rows out of how they are stored, in their dtype, one behind the other.
  void (*read_stored)(const StoredRows&, char* rows);
};

// What add_mass writes to diagonals may reach this far beyond the last one.
constexpr int kDiagonalSlack = kLanes;

}  // namespace gossamer
