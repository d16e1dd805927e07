// Largest logits of rows among the keys of some regions, as means over a query block.
#include <algorithm>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

class Maxima {
 public:
  Maxima(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part, const Range* regions,
         int64_t region_count)
      : call_(call),
        grid_(grid),
        part_(part),
        regions_(regions),
        region_count_(region_count),
        kernels_(*kernels.scores),
        padded_(padded(kernels, call.q.dim)),
        share_(call.q.heads / call.k.heads),
        pieces_(ceil_div(grid.block_q, kScoreRows)) {
    for (int t = 0; t < call.threads; ++t) scratch_.emplace_back(padded_, share_ * pieces_);
  }

  void run(float* out) {
    const int64_t groups = call_.k.batch * call_.k.heads;
    run_parallel(call_.threads, groups * part_.size(), [&](int thread, int64_t n) {
      find(scratch_[thread], n % groups, part_.first + n / groups, out);
    });
  }

 private:
  // The panels of a query block: pieces of 64 rows of each head of a group.
  struct Scratch {
    Scratch(int padded_dim, int64_t panels)
        : panel(padded_dim),
          queries(panels * kScoreRows * padded_dim),
          maxima(panels * kScoreRows) {}
    PanelScratch panel;
    Aligned queries;
    std::vector<float> maxima;
  };

  void find(Scratch& scratch, int64_t group, int64_t m, float* out) {
    const int64_t b = group / call_.k.heads, g = group % call_.k.heads;
    const Range queries = grid_.queries(b, m), seen = call_.extent.keys_of(b, queries);
    std::fill(scratch.maxima.begin(), scratch.maxima.end(), kNothing);
    for_each_panel(queries, [&](int64_t head, int64_t panel, int64_t first, int64_t count) {
      const void* rows[kScoreRows];
      kernels_.pack_queries(
          list_queries(call_.q, call_.extent, b, g * share_ + head, first, count, padded_, rows),
          scratch.queries.data() + panel * kScoreRows * padded_);
    });
    const Range* regions = regions_ + (b * part_.size() + m - part_.first) * region_count_;
    for (int64_t n = 0; n < region_count_; ++n) {
      const Range keys{std::max(regions[n].begin, seen.begin), std::min(regions[n].end, seen.end)};
      for (int64_t first = keys.begin; first < keys.end; first += kChunk)
        raise(scratch, b, g, queries, first, std::min(keys.end, first + kChunk));
    }
    for (int64_t head = 0; head < share_; ++head)
      out[(b * call_.q.heads + g * share_ + head) * part_.size() + m - part_.first] =
          mean(scratch.maxima.data() + head * pieces_ * kScoreRows);
  }

  template <class Visit>
  void for_each_panel(Range queries, const Visit& visit) const {
    for (int64_t head = 0; head < share_; ++head)
      for (int64_t first = queries.begin; first < queries.end; first += kScoreRows)
        visit(head, head * pieces_ + (first - queries.begin) / kScoreRows, first,
              std::min<int64_t>(kScoreRows, queries.end - first));
  }

  // By a tile of at most 64 keys.
  void raise(Scratch& scratch, int64_t b, int64_t g, Range queries, int64_t begin, int64_t end) {
    PointedRows rows;
    PanelScratch& panel = scratch.panel;
    kernels_.pack_keys(list_keys(kernels_, call_.k, call_.extent, b, g, begin, padded_, rows), panel.keys);
    for_each_panel(queries, [&](int64_t, int64_t number, int64_t first, int64_t count) {
      uint64_t any = 0;
      for (int64_t r = 0; r < count; ++r) {
        const Range seen = call_.extent.keys_of(b, {first + r, first + r + 1});
        any |= panel.masks[r] = bit_range(seen.begin - begin, std::min(seen.end, end) - begin);
      }
      if (any == 0) return;
      kernels_.raise_maxima({scratch.queries.data() + number * kScoreRows * padded_, panel.keys,
                             static_cast<int>(count), padded_, call_.scale * kLog2E, panel.masks, panel.logits},
                            scratch.maxima.data() + number * kScoreRows);
    });
  }

  // Of a head's rows that saw any key, in natural units.
  float mean(const float* maxima) const {
    double total = 0;
    int64_t count = 0;
    for (int64_t r = 0; r < pieces_ * kScoreRows; ++r)
      if (maxima[r] > kNothing) {
        total += maxima[r];
        ++count;
      }
    return count == 0 ? kNothing : static_cast<float>(total / (static_cast<double>(count) * kLog2E));
  }

  const ScoreCall& call_;
  const Grid& grid_;
  const Part& part_;
  const Range* regions_;
  const int64_t region_count_;
  const ScoreKernels& kernels_;
  const int padded_;
  const int64_t share_, pieces_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void row_maxima(const Kernels& kernels, const ScoreCall& call, const Grid& grid, const Part& part,
                const Range* regions, int64_t region_count, float* out) {
  Maxima(kernels, call, grid, part, regions, region_count).run(out);
}

}  // namespace gossamer
