// Attention mass of blocks under an LSE that is given: sums of e^(logit - lse) over the pairs of two blocks.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

// Query blocks for which a tile of keys is packed once.
constexpr int64_t kTogether = 4;

class BlockMass {
 public:
  BlockMass(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part, int64_t key_blocks,
            const float* lse)
      : call_(call),
        grid_(grid),
        part_(part),
        key_blocks_(key_blocks),
        lse_(lse),
        kernels_(*kernels.scores),
        padded_(padded(kernels, call.q.dim)),
        share_(call.q.heads / call.k.heads),
        pieces_(ceil_div(grid.block_q, kScoreRows)) {
    for (int t = 0; t < call.threads; ++t) scratch_.emplace_back(padded_, kTogether * share_ * pieces_);
  }

  void run(float* out) {
    std::fill(out, out + call_.q.batch * call_.q.heads * part_.size() * key_blocks_, 0.0f);
    const int64_t groups = call_.k.batch * call_.k.heads, runs = ceil_div(part_.size(), kTogether);
    run_parallel(call_.threads, groups * runs, [&](int thread, int64_t n) {
      const int64_t first = part_.first + (runs - 1 - n / groups) * kTogether;  // the longest rows first
      sum(scratch_[thread], n % groups, {first, std::min(part_.stop, first + kTogether)}, out);
    });
  }

 private:
  // Up to 64 query rows of a head.
  struct Panel {
    int64_t head, m, first;
    int count;
  };
  struct Scratch {
    Scratch(int padded_dim, int64_t most)
        : panel(padded_dim), queries(most * kScoreRows * padded_dim), shifts(most * kScoreRows) {}
    PanelScratch panel;
    Aligned queries;
    std::vector<float> shifts;
    std::vector<Panel> panels;
  };

  void sum(Scratch& scratch, int64_t group, const Part& rows, float* out) {
    const int64_t b = group / call_.k.heads, g = group % call_.k.heads;
    Range keys{std::numeric_limits<int64_t>::max(), 0};
    scratch.panels.clear();
    for (int64_t m = rows.first; m < rows.stop; ++m) {
      const Range queries = grid_.queries(b, m), seen = call_.extent.keys_of(b, queries);
      if (queries.empty() || seen.empty()) continue;
      keys = {std::min(keys.begin, seen.begin), std::max(keys.end, seen.end)};
      for (int64_t head = g * share_; head < (g + 1) * share_; ++head)
        for (int64_t first = queries.begin; first < queries.end; first += kScoreRows)
          pack(scratch, b, {head, m, first, static_cast<int>(std::min<int64_t>(kScoreRows, queries.end - first))});
    }
    // Tiles begin at multiples of 64, so that sums do not depend on which query blocks are taken together.
    for (int64_t first = keys.begin / kChunk * kChunk; first < keys.end; first += kChunk)
      add_tile(scratch, b, g, first, out);
  }

  void pack(Scratch& scratch, int64_t b, const Panel& panel) {
    const int64_t number = static_cast<int64_t>(scratch.panels.size());
    const void* rows[kScoreRows];
    kernels_.pack_queries(
        list_queries(call_.q, call_.extent, b, panel.head, panel.first, panel.count, padded_, rows),
        scratch.queries.data() + number * kScoreRows * padded_);
    const float* lse = lse_ + (b * call_.q.heads + panel.head) * call_.q.tokens;
    for (int r = 0; r < panel.count; ++r)
      scratch.shifts[number * kScoreRows + r] = -kLog2E * lse[call_.extent.query_row(b, panel.first + r)];
    scratch.panels.push_back(panel);
  }

  void add_tile(Scratch& scratch, int64_t b, int64_t g, int64_t first, float* out) {
    PointedRows pointed;
    PanelScratch& own = scratch.panel;
    kernels_.pack_keys(list_keys(kernels_, call_.k, call_.extent, b, g, first, padded_, pointed), own.keys);
    for (size_t number = 0; number < scratch.panels.size(); ++number) {
      const Panel& panel = scratch.panels[number];
      const float* shifts = scratch.shifts.data() + number * kScoreRows;
      uint64_t any = 0;
      for (int r = 0; r < panel.count; ++r) {
        const Range seen = call_.extent.keys_of(b, {panel.first + r, panel.first + r + 1});
        // A row whose LSE is -inf attends nothing.
        own.masks[r] = std::isinf(shifts[r]) ? 0 : bit_range(seen.begin - first, seen.end - first);
        any |= own.masks[r];
      }
      if (any == 0) continue;
      float sums[kChunk] = {};
      kernels_.column_mass({scratch.queries.data() + static_cast<int64_t>(number) * kScoreRows * padded_, own.keys,
                            panel.count, padded_, call_.scale * kLog2E, own.masks, own.logits},
                           shifts, sums);
      float* row = out + ((b * call_.q.heads + panel.head) * part_.size() + panel.m - part_.first) * key_blocks_;
      const int64_t stop = std::min<int64_t>(kChunk, call_.extent.key_count[b] - first);
      for (int64_t t = 0; t < stop; ++t) row[(first + t) / grid_.block_k] += sums[t];
    }
  }

  const ScoreCall& call_;
  const Grid& grid_;
  const Part& part_;
  const int64_t key_blocks_;
  const float* lse_;
  const ScoreKernels& kernels_;
  const int padded_;
  const int64_t share_, pieces_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void block_mass(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part, int64_t key_blocks,
                const float* lse, float* out) {
  BlockMass(kernels, call, grid, part, key_blocks, lse).run(out);
}

}  // namespace gossamer
