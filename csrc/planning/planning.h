// Planning in plain pointers: scores of columns, diagonals and blocks; chosen blocks; pairs in a plan.
#pragma once

#include <cstdint>

#include "kernels/job.h"
#include "plan/plan.h"
#include "plan/tensor.h"

namespace gossamer {

struct ScoreCall {
  TensorView q, k;
  Extent extent;
  float scale;
  int threads;
};

// Query blocks [first, stop) of a grid.
struct Part {
  int64_t block_q, block_k;
  int64_t first, stop;

  int64_t size() const { return stop - first; }
};

// Mass by column and by diagonal of the last queries, [batch, heads, keys] each, zero on entry.
void probe(const Kernels& kernels, const ScoreCall& call, int64_t last, float* columns, float* diagonals);

// Means of the live tokens of each block: out [batch, heads, blocks, dim], zero on entry. Live are tokens
// [live[2 b], live[2 b + 1]).
void pool(const Kernels& kernels, const TensorView& x, int64_t block, const int64_t* live, float* out, int threads);

// Energies of the queries of a part against pooled keys, call.k [batch, groups, key blocks, dim]: out [batch, groups,
// part, key blocks].
void block_energy(const Kernels& kernels, const ScoreCall& call, const Part& part, float* out);

// Mass of a part by the antidiagonals of cells of stride x stride, where the stride divides both blocks: out
// [batch, heads, part, key blocks].
void antidiagonal(const Kernels& kernels, const ScoreCall& call, const Part& part, int64_t stride, float* out);

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

// Rows of choices, [batch, heads, blocks] of them, among `width` candidates. Ranges are half open.
struct Choice {
  int64_t batch, heads, blocks, width;
  Rule rule;
  float alpha;                     // kRelative
  const float* scores;             // a row's candidates, contiguous
  const int64_t* budgets;          // kTopK: one a head
  const double* shares;            // kTopP and its kin: one a head
  const uint8_t* diagonals;        // null, or [batch, heads, diagonal_count]: chosen block diagonals
  int64_t diagonal_count;
  const int64_t* main_diagonal;    // [batch, blocks]: the candidate on block diagonal 0
  const uint8_t* heads_that_force; // [batch, heads]
  const int64_t* forced;           // [batch, blocks, 2]: a range
  const int64_t* forced_everywhere;  // [batch, 2]: a range, forced in all rows
  const int64_t* seen;             // [batch, blocks, 2]: nothing outside this range is chosen
};

inline int64_t words_of(int64_t width) { return ceil_div(width, 64); }

// Bits of the chosen candidates, words_of(width) a row, and their number.
void choose(const Choice& choice, uint64_t* bits, int64_t* counts, int threads);
// Their indices, ascending, from indptr[row] on.
void list_bits(const uint64_t* bits, int64_t rows, int64_t width, const int64_t* indptr, int32_t* indices,
               int threads);

// Token-exact slashes of query blocks [first, stop) of 64, as whole blocks of 64 keys and single columns.
struct Slashes {
  Extent extent;
  int64_t heads, key_len, first, stop;
  Lists distances;          // by (batch row, head): chosen ones, descending
  const uint64_t* columns;  // [batch, heads, words_of(key_len)]: chosen columns
};

// Bits of blocks or columns, and their number: [batch, heads, stop - first, words_of(width)], [batch, heads, stop - first].
struct ChosenBits {
  uint64_t* bits;
  int64_t* counts;
};

void slashes(const Slashes& call, const ChosenBits& blocks, const ChosenBits& columns, int threads);

// Pairs that each head of a plan without permutation computes: [batch, heads], zero on entry.
void count_pairs(const Plan& plan, int64_t* counts, int threads);

}  // namespace gossamer
