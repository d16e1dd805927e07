// Energies: every query against the means of key blocks, summed over a query block and the heads of a group.
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
  Energies(const Kernels& kernels, const ScoreCall& call, const Part& part)
      : call_(call),
        part_(part),
        kernels_(*kernels.scores),
        padded_(padded(kernels, call.q.dim)),
        share_(call.q.heads / call.k.heads),
        width_(call.k.tokens),
        tiles_(ceil_div(width_, kChunk)),
        scratch_(scratch_for(call.threads, padded_)),
        keys_(call.q.batch * call.k.heads * tiles_ * kChunk * padded_) {}

  void run(float* out) {
    run_parallel(call_.threads, call_.q.batch * call_.k.heads * tiles_, [&](int, int64_t n) {
      const int64_t tile = n % tiles_, g = n / tiles_ % call_.k.heads, b = n / tiles_ / call_.k.heads;
      const void* rows[kChunk];
      kernels_.pack_keys(list_rows(call_.k, b, g, tile * kChunk, kChunk, 0, width_, padded_, rows),
                         keys_.data() + n * kChunk * padded_);
    });
    const int64_t groups = call_.q.batch * call_.k.heads;
    run_parallel(call_.threads, groups * part_.size(), [&](int thread, int64_t n) {
      const int64_t block = part_.stop - 1 - n / groups;  // the longest rows first
      score(scratch_[thread], n % groups, block, out + (n % groups * part_.size() + block - part_.first) * width_);
    });
  }

 private:
  void score(PanelScratch& scratch, int64_t group, int64_t block, float* out) {
    const int64_t b = group / call_.k.heads, g = group % call_.k.heads;
    const int64_t first = block * part_.block_q, rows = std::min(part_.block_q, call_.q.tokens - first);
    const int64_t start = call_.extent.key_start[b], end = start + call_.extent.key_count[b];
    const int64_t to_slot = call_.extent.query_start[b] + start;  // of a query's own key
    std::fill(out, out + width_, 0.0f);
    // Blocks that hold live keys and end at or before the last row's own slot.
    const int64_t low = start / part_.block_k;
    const int64_t past = to_slot + first + rows;
    const int64_t high = std::min(ceil_div(end, part_.block_k), past < 0 ? 0 : past / part_.block_k);
    if (high <= low || end == start) return;

    const int64_t pieces = ceil_div(rows, kScoreRows), first_tile = low / kChunk, tiles = ceil_div(high, kChunk);
    std::vector<float> sums, largest;
    std::vector<int64_t> of_tile;
    for (int64_t h = g * share_; h < (g + 1) * share_; ++h)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t row = first + piece * kScoreRows;
        const int count = static_cast<int>(std::min<int64_t>(kScoreRows, first + rows - row));
        const void* pointers[kScoreRows];
        kernels_.pack_queries(list_rows(call_.q, b, h, row, count, 0, call_.q.tokens, padded_, pointers),
                              scratch.queries);
        for (int64_t tile = first_tile; tile < tiles; ++tile) {
          uint64_t any = 0;
          for (int r = 0; r < count; ++r) {
            const int64_t slot = to_slot + row + r;  // it sees blocks whose first live slot is at or before
            const int64_t sees = slot < start ? 0 : slot / part_.block_k + 1;
            any |= scratch.masks[r] = bit_range(low - tile * kChunk, std::min(high, sees) - tile * kChunk);
          }
          if (any == 0) continue;
          sums.resize(sums.size() + kChunk);
          largest.push_back(kernels_.energy(
              {scratch.queries, keys_.data() + ((b * call_.k.heads + g) * tiles_ + tile) * kChunk * padded_, count,
               padded_, call_.scale * kLog2E, scratch.masks, scratch.logits},
              sums.data() + sums.size() - kChunk));
          of_tile.push_back(tile);
        }
      }

    float top = kNothing;
    for (const float x : largest) top = std::max(top, x);
    for (size_t n = 0; n < largest.size(); ++n) {
      const float down = std::exp2(largest[n] - top);
      const int64_t from = of_tile[n] * kChunk, to = std::min(high, from + kChunk);
      for (int64_t j = std::max(low, from); j < to; ++j) out[j] += sums[n * kChunk + j - from] * down;
    }
  }

  const ScoreCall& call_;
  const Part& part_;
  const ScoreKernels& kernels_;
  const int padded_;
  const int64_t share_, width_, tiles_;
  std::vector<PanelScratch> scratch_;
  Aligned keys_;
};

}  // namespace

void block_energy(const Kernels& kernels, const ScoreCall& call, const Part& part, float* out) {
  Energies(kernels, call, part).run(out);
}

}  // namespace gossamer
