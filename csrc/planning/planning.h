// Planning in plain pointers: scores of columns, diagonals and blocks; chosen blocks; pairs in a plan.
#pragma once

#include <cstdint>

#include "attend/executor.h"
#include "kernels/job.h"

namespace gossamer {

// Where the tokens of each batch row sit; see Extent in plan.py.
struct Positions {
  const int64_t* query_start;
  const int64_t* key_start;
  const int64_t* key_count;
};

struct ScoreCall {
  TensorView q, k;  // [batch, heads, query_len, dim], [batch, groups, key_len, dim]
  int64_t batch, heads, groups, query_len, key_len;
  int dim;
  DType dtype;
  float scale;
  Positions positions;
  int threads;
};

// Mass by column and by diagonal, [batch, heads, key_len] each, zero on entry.
void probe(const Kernels& kernels, const ScoreCall& call, int64_t last, float* columns, float* diagonals);

// Means of the live tokens of each block: out [batch, heads, blocks, dim], zero on entry. Live are slots
// [live[2 b], live[2 b + 1]).
void pool(const Kernels& kernels, const TensorView& x, int64_t batch, int64_t heads, int64_t tokens, int dim,
          DType dtype, int64_t block, const int64_t* live, float* out, int threads);

// Energies of query blocks [at, stop) against pooled keys, call.k [batch, groups, key blocks, dim]; key_len counts
// the keys before pooling. out [batch, groups, stop - at, key blocks].
void block_energy(const Kernels& kernels, const ScoreCall& call, int64_t block_q, int64_t block_k, int64_t at,
                  int64_t stop, float* out);

struct Antidiagonal {
  int64_t block_q, block_k, stride;  // the stride divides both
  int64_t at, stop;                  // query blocks
};

// Mass of query blocks [at, stop) by the antidiagonals of cells of stride x stride: out [batch, heads, stop - at,
// key blocks].
void antidiagonal(const Kernels& kernels, const ScoreCall& call, const Antidiagonal& sizes, float* out);

// The rules of selectors.py; forced candidates take part in kTopPForced, else they are united with what a rule chooses.
enum class Rule : int {
  kNone = 0,
  kRelative = 1,
  kTopK = 2,
  kTopP = 3,
  kTopPForced = 4,
  kTopPReaching = 5,
  kTopPBelow = 6,
  kTopPAllRows = 7,  // one list of all rows of a head
};

// Rows of choices, [batch, heads, blocks] of them, among `width` candidates.
struct Choice {
  int64_t batch, heads, blocks, width;
  Rule rule;
  float alpha;             // kRelative
  const float* scores;     // a row's candidates, contiguous
  const int64_t* budgets;  // kTopK: one a head
  const double* shares;    // kTopP and its kin: one a head
  const uint8_t* bands;    // null, or [batch, heads, band_count]: chosen block diagonals
  int64_t band_count;
  const int64_t* band_origin;  // [batch, blocks]: the candidate on block diagonal 0
  const uint8_t* forcing;      // [batch, heads]: heads whose forced candidates count
  const int64_t* forced;       // [batch, blocks, 2]: a range
  const int64_t* leading;      // [batch, 2]: a range, forced in all rows
  const int64_t* seen;         // [batch, blocks, 2]: nothing outside this range is chosen
};

inline int64_t words_of(int64_t width) { return (width + 63) / 64; }

// Bits of the chosen candidates, words_of(width) a row, and their number.
void choose(const Choice& choice, uint64_t* bits, int64_t* counts, int threads);
// Their indices, ascending, from indptr[row] on.
void list_bits(const uint64_t* bits, int64_t rows, int64_t width, const int64_t* indptr, int32_t* indices,
               int threads);

// Token-exact slashes of query blocks [at, stop) of 64, as whole blocks of 64 keys and single columns.
struct Slashes {
  int64_t batch, heads, key_len, at, stop;
  const int64_t* distance_indptr;  // [batch * heads + 1]
  const int32_t* distances;        // chosen ones, descending
  const uint64_t* columns;         // [batch, heads, words_of(key_len)]: chosen columns
  const int64_t* query_start;      // [batch]
  const int64_t* key_start;        // [batch]
};

// Bits and their number: block_bits [batch, heads, stop - at, words_of(words_of(key_len))], column_bits [batch, heads,
// stop - at, words_of(key_len)].
void slashes(const Slashes& call, uint64_t* block_bits, int64_t* block_counts, uint64_t* column_bits,
             int64_t* column_counts, int threads);

// Pairs that each head of a plan without permutation computes: [batch, heads], zero on entry.
void count_pairs(const PlanView& plan, int64_t* counts, int threads);

}  // namespace gossamer
