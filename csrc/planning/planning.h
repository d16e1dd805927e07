// Planning in plain pointers: scores of columns, diagonals and blocks; chosen blocks; pairs in a plan.
#pragma once

#include <cstdint>

#include "kernels/job.h"
#include "plan/plan.h"
#include "plan/tensor.h"
#include "plan/tokens.h"

namespace gossamer {

struct ScoreCall {
  TensorView q;
  Tokens k;
  Extent extent;
  float scale;
  int threads;
};

// Rows [first, stop) of the plan: query blocks, counted from each batch row's first. Rows that a batch row lacks are
// empty, and their scores 0.
struct Part {
  int64_t first, stop;

  int64_t size() const { return stop - first; }
};

// Mass by column, and by distance |query - key| below width, of the last queries: [batch, heads, width] each, zero on
// entry.
void probe(const Kernels& kernels, const ScoreCall& call, int64_t last, int64_t width, float* columns,
           float* diagonals);

// Means of the live tokens of each block; 0 where there is none. Of keys [batch, groups, blocks, dim], of queries
// [batch, heads, blocks, dim].
void pool_keys(const Kernels& kernels, const Tokens& k, const Grid& grid, int64_t blocks, float* out, int threads);
void pool_queries(const Kernels& kernels, const TensorView& q, const Grid& grid, int64_t blocks, float* out,
                  int threads);

// Each token's pairs of channels d and pairs + d, turned by its own cosines and sines, [batch, tokens, pairs] each.
struct Turn {
  int64_t pairs;
  const float *cos, *sin;
};

// The same means of turned tokens, and of keys the smallest and the largest entry by channel, each as the means.
struct Pools {
  float *mean, *low, *high;
};

void pool_turned(const Kernels& kernels, const Tokens& x, const Turn& turn, const Grid& grid, bool keys,
                 int64_t blocks, const Pools& out, int threads);

// Products of pooled queries and pooled keys, contiguous fp32: out [batch, heads, part, key blocks].
void pooled_products(const Kernels& kernels, const TensorView& queries, const TensorView& keys, const Grid& grid,
                     const Part& part, float* out, int threads);

// The same as shares of each row's softmax over what it sees, of scale * product; 0 elsewhere.
void pooled_shares(const Kernels& kernels, const TensorView& queries, const TensorView& keys, const Grid& grid,
                   const Part& part, float scale, float* out, int threads);

// Sums over the pairs of each block of 2^(log2(e) * (logit - lse)), with lse [batch, heads, queries] in natural units; a
// row whose LSE is infinite counts nothing: out [batch, heads, part, key_blocks].
void block_mass(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part, int64_t key_blocks,
                const float* lse, float* out);

struct EnergyTiles {
  bool per_head;  // of the query block in one head; else in all heads of a group
  bool ended;     // in causal attention a row takes part for blocks that end at or before it; else for all that begin
};

// Energies of the queries of a part against pooled keys, call.k [batch, groups, key blocks, dim], a tensor: out [batch, groups or
// heads, part, key blocks].
void block_energy(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part, EnergyTiles of,
                  float* out);

// Mass of a part by the antidiagonals of cells of stride x stride, where the stride divides both blocks: out
// [batch, heads, part, key_blocks].
void antidiagonal(const Kernels& kernels, const ScoreCall& call, const Grid& grid, int64_t stride, const Part& part,
                  int64_t key_blocks, float* out);

// The largest cell of each block beside the largest of its row of cells, 2^(logit - largest), summed over the rows of a
// query block; and whether it is at least `near` in one of them: both [batch, heads, part, key_blocks].
struct PeakScores {
  float near;
  float* sums;
  uint8_t* attained;
};

void antidiagonal_peaks(const Kernels& kernels, const ScoreCall& call, const Grid& grid, int64_t stride,
                        const Part& part, int64_t key_blocks, const PeakScores& out);

// The largest share of each key in the attention of a mean query, means [batch, heads, blocks, dim], of each of a part of
// the groups of `group` query blocks: out [batch, heads, part, width], where width is the most keys of a batch row.
void group_shares(const Kernels& kernels, const ScoreCall& call, const TensorView& means, const Grid& grid,
                  int64_t group, const Part& part, int64_t width, float* out);

// How far each key's logit, in natural units, rises above the anchor, anchors [batch, heads, blocks] or null for the
// largest logit, of the mean query of a group's block where it rises most: out as that of group_shares, -inf where no
// block sees a key.
void group_differences(const Kernels& kernels, const ScoreCall& call, const TensorView& means, const Grid& grid,
                       const float* anchors, int64_t group, const Part& part, int64_t width, float* out);

// Mean over a query block's rows of the largest logit among the keys of regions [batch, part, region_count], half-open
// and anywhere; rows without any do not count: out [batch, heads, part], -inf where no row does.
void row_maxima(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part,
                const Range* regions, int64_t region_count, float* out);

// What one query reads of a cache, by pages of its tokens.
struct PageChoice {
  int64_t batch, heads, pages;  // heads: those that choose
  int64_t size;                 // tokens of a page
  const int64_t* keys;          // [batch]: live tokens of each row
  int64_t sinks, recent;        // first and last tokens whose pages are read in any case; the last page always is
  int64_t count;                // pages to read, at most, unless more are read in any case
};

// Products of queries [batch, heads, 1, dim] with what is known of each page, [batch, groups, pages, dim]: out [batch,
// heads, pages], -inf for pages that a row does not have.
void page_scores(const Kernels& kernels, const TensorView& queries, const Tokens& pages, const PageChoice& choice,
                 float* out, int threads);

// Bounds of the keys of a paged cache, for each `size` tokens of its pages: [cache pages, heads, page / size, 2 * dim], the
// largest of each channel, then the smallest, contiguous.
struct KeptBounds {
  char* data;
  DType dtype;    // bf16 or fp16; of wider keys rounded outward
  int64_t size;
  int32_t* held;  // of each page of the cache: its first tokens that the bounds are of
};

// Brings up to date what is kept of the first `counts` [batch] tokens of each sequence.
void keep_bounds(const Kernels& kernels, const Tokens& keys, const int64_t* counts, const KeptBounds& kept, int threads);
// Tokens at slots (page * number + place) of a cache were written; those below 0 are none.
void forget_slots(const int64_t* slots, int64_t count, int64_t page, int64_t pages, int32_t* held);

// The tokens of the pages that each head of a choice reads, ascending: `room` for each in tokens, and how many. Scores
// [batch, query heads, pages]; of several query heads that choose together the shares of their softmax are added.
// A page whose score is NaN takes the place of one and is not read.
void page_tokens(const Kernels& kernels, const float* scores, int64_t query_heads, const PageChoice& choice,
                 int64_t room, int32_t* tokens, int64_t* counts, int threads);

// The rules of rules.py. Forced candidates take part in kTopPForced; else they are united with what a rule chooses.
enum class Rule : int {
  kNone = 0,
  kRelativeToMax = 1,
  kTopK = 2,
  kTopP = 3,
  kTopPForced = 4,
  kTopPReaching = 5,
  kTopPBelow = 6,
  kTopPOfAllRows = 7,
  kAtLeast = 8,
  kAbove = 9,
  kTopPInTiers = 10,
};

// What rows [batch, heads, rows] of a plan's lists may take and must take among `width` candidates; see Candidates in
// rules.py.
struct Choice {
  int64_t batch, heads, rows, width;
  Rule rule;
  float alpha;                // kRelativeToMax
  const float* scores;        // a row's candidates, contiguous
  const int64_t* counts;      // kTopK: one a head
  const double* shares;       // kTopP and its kin: one a head; kAtLeast: bars; kAbove: thresholds
  const Range* seen;          // [batch, rows]: nothing outside is chosen
  const Range* forced;        // [batch, rows]
  int64_t first;              // candidates that are forced in every row
  const uint8_t* forced_heads;     // [batch, heads]: heads that force any; null: all
  const uint8_t* diagonals;   // null, or [batch, heads, diagonal_count]: chosen ones
  int64_t diagonal_count;
  const int64_t* origin;      // [batch, rows]: the candidate on diagonal 0
  bool mirrored;              // diagonals lie on both sides of it
  const uint8_t* everywhere;  // null, or [batch, heads, width]: candidates that every row takes
  const uint8_t* ruled_heads;  // [batch, heads]: heads for which the rule chooses; null: all
  const uint8_t* early;       // kTopPInTiers: as the scores, candidates of the second tier
  const uint8_t* taken;       // null, or as the scores: candidates that are taken beside what the rule chooses
  bool unite;                 // with the bits that are there
};

inline int64_t words_of(int64_t width) { return ceil_div(width, 64); }

// Bits of candidates, words_of(width) a row, and how many are set.
struct ChosenBits {
  uint64_t* bits;
  int64_t* counts;
};

void choose(const Choice& choice, const ChosenBits& chosen, int threads);
// How many of the best of each row's `width` scores hold at most a share of their sum; a share and a count a row.
void count_top_p(const float* scores, int64_t rows, int64_t width, const double* shares, int64_t* counts, int threads);
// The numbers of the bits that are set, ascending, from indices + starts[row] on.
void list_bits(const uint64_t* bits, int64_t rows, int64_t width, const int64_t* starts, int32_t* indices,
               int threads);

// Keys whose difference, as that of group_differences, is at least the bar of its head, and not in ranges [batch, part,
// ranges] that are left out: [batch, heads, part] rows of words_of(width).
struct NearKeys {
  const float* bars;
  const Range* left_out;
  int64_t ranges;
};

void near_keys(const Kernels& kernels, const ScoreCall& call, const TensorView& means, const Grid& grid,
               const float* anchors, int64_t group, const Part& part, int64_t width, const NearKeys& which,
               const ChosenBits& chosen);

// Copies lists that lie one behind the other to their places: each row's from indices + starts[row] on.
void place_lists(const int32_t* lists, const int64_t* counts, int64_t rows, const int64_t* starts, int32_t* indices,
                 int threads);

// Token-exact slashes of blocks of 64 queries, as whole blocks of 64 keys and single columns.
struct Slashes {
  Extent extent;
  int64_t heads, width;      // width: positions
  Part part;
  const uint8_t* columns;    // [batch, heads, width]: chosen columns
  const uint8_t* distances;  // the same of distances
};

// Of [batch, heads, part] rows: words_of(width) columns, words_of(words_of(width)) blocks.
void slashes(const Slashes& call, const ChosenBits& blocks, const ChosenBits& columns, int threads);

// Pairs that each head of a plan without permutation computes: [batch, heads], zero on entry.
void count_pairs(const Plan& plan, int64_t* counts, int threads);

}  // namespace gossamer
