// Energies: every query against the means of key blocks, summed over a query block and the heads of a group, or one.
#include <algorithm>
#include <cmath>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

class Energies {
 public:
  Energies(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part, EnergyTiles of)
      : call_(call),
        grid_(grid),
        part_(part),
        of_(of),
        kernels_(*kernels.scores),
        padded_(padded(kernels, call.q.dim)),
        share_(call.q.heads / call.k.heads),
        together_(of.per_head ? 1 : share_),
        width_(call.k.tokens),
        tiles_(ceil_div(width_, kChunk)),
        scratch_(scratch_for(call.threads, padded_)),
        keys_(call.k.batch * call.k.heads * tiles_ * kChunk * padded_) {}

  void run(float* out) {
    const int64_t groups = call_.k.batch * call_.k.heads;
    run_parallel(call_.threads, groups * tiles_, [&](int, int64_t n) {
      const int64_t group = n / tiles_, b = group / call_.k.heads;
      const void* rows[kChunk];
      kernels_.pack_keys(
          list_pooled(*call_.k.tensor(), b, group % call_.k.heads, n % tiles_ * kChunk, width_, padded_, rows), keys(n));
    });
    const int64_t lists = call_.q.batch * call_.q.heads / together_;
    run_parallel(call_.threads, lists * part_.size(), [&](int thread, int64_t n) {
      const int64_t m = part_.stop - 1 - n / lists;  // the longest rows first
      score(scratch_[thread], n % lists, m, out + (n % lists * part_.size() + m - part_.first) * width_);
    });
  }

 private:
  // A tile of key blocks under some rows of the query block.
  struct TileSums {
    int64_t tile;
    float largest;
    float sums[kChunk];
  };

  float* keys(int64_t tile) { return keys_.data() + tile * kChunk * padded_; }

  // Key blocks whose energies count: those that some query of the block sees, in causal attention only if they end at
  // or before the last of them.
  Range scored(int64_t b, int64_t m) const {
    Range blocks = grid_.seen(b, m);
    if (grid_.extent.causal) blocks.end = std::min(blocks.end, grid_.queries(b, m).end / grid_.block_k);
    return blocks;
  }

  // Key blocks that take part for the query at a position.
  Range seen_by(int64_t b, int64_t query) const {
    Range blocks = grid_.blocks_of(grid_.extent.keys_of(b, {query, query + 1}));
    if (of_.ended && grid_.extent.causal) blocks.end = std::min(blocks.end, (query + 1) / grid_.block_k);
    return blocks;
  }

  // A list is of a batch row, and of the heads that make a tile together.
  void score(PanelScratch& scratch, int64_t list, int64_t m, float* out) {
    const int64_t lists_a_row = call_.q.heads / together_, b = list / lists_a_row;
    const int64_t first_head = list % lists_a_row * together_, group = b * call_.k.heads + first_head / share_;
    std::fill(out, out + width_, 0.0f);
    const Range queries = grid_.queries(b, m), blocks = scored(b, m);
    if (blocks.empty()) return;
    std::vector<Range> seen;  // key blocks of which a query may attend any key
    for (int64_t query = queries.begin; query < queries.end; ++query) seen.push_back(seen_by(b, query));
    std::vector<TileSums> found;
    for (int64_t h = first_head; h < first_head + together_; ++h)
      for (int64_t first = queries.begin; first < queries.end; first += kScoreRows) {
        const int64_t count = std::min<int64_t>(kScoreRows, queries.end - first);
        const void* rows[kScoreRows];
        kernels_.pack_queries(list_queries(call_.q, grid_.extent, b, h, first, count, padded_, rows), scratch.queries);
        for (int64_t tile = blocks.begin / kChunk; tile < ceil_div(blocks.end, kChunk); ++tile) {
          if (!mark(scratch.masks, seen.data() + (first - queries.begin), count, blocks, tile)) continue;
          found.emplace_back();
          found.back().tile = tile;
          found.back().largest = kernels_.energy({scratch.queries, keys(group * tiles_ + tile), static_cast<int>(count),
                                                  padded_, call_.scale * kLog2E, scratch.masks, scratch.logits},
                                                 found.back().sums);
        }
      }
    float top = kNothing;
    for (const TileSums& part : found) top = std::max(top, part.largest);
    for (const TileSums& part : found) {
      const float down = std::exp2(part.largest - top);
      const int64_t first = part.tile * kChunk;
      for (int64_t j = std::max(blocks.begin, first); j < std::min(blocks.end, first + kChunk); ++j)
        out[j] += part.sums[j - first] * down;
    }
  }

  // Whether some row sees any key block of the tile.
  static bool mark(uint64_t* masks, const Range* seen, int64_t count, Range blocks, int64_t tile) {
    uint64_t any = 0;
    for (int64_t r = 0; r < count; ++r)
      any |= masks[r] = bit_range(std::max(blocks.begin, seen[r].begin) - tile * kChunk,
                                  std::min(blocks.end, seen[r].end) - tile * kChunk);
    return any != 0;
  }

  const ScoreCall& call_;
  const Grid& grid_;
  const Part& part_;
  const EnergyTiles of_;
  const ScoreKernels& kernels_;
  const int padded_;
  const int64_t share_, together_, width_, tiles_;
  std::vector<PanelScratch> scratch_;
  Aligned keys_;
};

}  // namespace

void block_energy(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part, EnergyTiles of,
                  float* out) {
  Energies(kernels, call, grid, part, of).run(out);
}

}  // namespace gossamer
