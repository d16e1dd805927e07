// What each key is to the mean queries of a group of query blocks. Its largest share in their attention takes one pass
// over the keys for the means' sums of exponentials, one for the shares; how far its logit rises above their anchors
// takes one pass, or one more where an anchor is the largest logit of all.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

// Panels of means against which a tile of keys is packed once.
constexpr int64_t kPanels = 4;
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kBelowZero = -std::numeric_limits<float>::min();

// Means of a head and a group of query blocks, or of 64 of them where a group has more: consecutive rows of a panel.
struct Run {
  int64_t head, group, first_block;
};

enum class Of { kShares, kDifferences };

class GroupKeys {
 public:
  // anchors: [batch, heads, blocks], for differences; null: the largest logits.
  GroupKeys(const Kernels& kernels, const ScoreCall& call, const TensorView& means, const Grid& grid, int64_t group,
            const Part& part, int64_t width, Of of, const float* anchors = nullptr)
      : call_(call),
        means_(means),
        grid_(grid),
        part_(part),
        kernels_(*kernels.scores),
        padded_(padded(kernels, call.q.dim)),
        group_(group),
        run_(std::min<int64_t>(group, kScoreRows)),
        share_(call.q.heads / call.k.heads),
        width_(width),
        of_(of),
        anchors_(anchors),
        runs_(share_ * part.size() * ceil_div(group_, run_)),
        at_once_(kPanels * (kScoreRows / run_)) {
    for (int thread = 0; thread < call.threads; ++thread) scratch_.emplace_back(padded_);
  }

  // Scores [batch, heads, part, width].
  void score(float* out) {
    const float nothing = of_ == Of::kShares ? 0.0f : kNothing;
    run_parallel(call_.threads, rows(), [&](int, int64_t n) { std::fill(out + n * width_, out + (n + 1) * width_, nothing); });
    const float unit = of_ == Of::kShares ? 1.0f : 1.0f / kLog2E;
    for_each_job([&](Scratch& scratch, int64_t b, int64_t g, int64_t first, int64_t count) {
      float largest[kScoreRows * kChunk];
      visit_tiles(scratch, b, g, first, count, [&](const ScorePanel& panel, const float* shifts, int64_t tile, int64_t from,
                                                   int64_t runs) {
        (of_ == Of::kShares ? kernels_.largest_mass : kernels_.largest_sum)(panel, shifts, static_cast<int>(run_), largest);
        for (int64_t n = 0; n < runs; ++n) {
          float* to = out + row_of(b, run_at(g, from + n)) * width_ + tile;
          for (int64_t t = 0; t < std::min<int64_t>(kChunk, width_ - tile); ++t)
            to[t] = std::max(to[t], unit * largest[n * kChunk + t]);
        }
      });
    });
  }

  // Bits [batch, heads, part, words_of(width)] of differences of at least the bar of their head; not of the keys in
  // `left_out` [batch, part, ranges].
  void choose(const float* bars, const Range* left_out, int64_t ranges, const ChosenBits& chosen) {
    const int64_t words = words_of(width_);
    bars_ = bars;
    run_parallel(call_.threads, rows(), [&](int, int64_t n) { std::fill_n(chosen.bits + n * words, words, uint64_t{0}); });
    for_each_job([&](Scratch& scratch, int64_t b, int64_t g, int64_t first, int64_t count) {
      uint64_t marks[kScoreRows];
      visit_tiles(scratch, b, g, first, count, [&](const ScorePanel& panel, const float* shifts, int64_t tile, int64_t from,
                                                   int64_t runs) {
        kernels_.mark_above(panel, shifts, static_cast<int>(run_), kBelowZero, marks);
        for (int64_t n = 0; n < runs; ++n) {
          if (marks[n] == 0) continue;
          const Run run = run_at(g, from + n);
          const Range* out = left_out + (b * part_.size() + run.group - part_.first) * ranges;
          for (int64_t r = 0; r < ranges; ++r) marks[n] &= ~bit_range(out[r].begin - tile, out[r].end - tile);
          // Runs of a group may be on several threads.
          if (marks[n] != 0)
            __atomic_fetch_or(chosen.bits + row_of(b, run) * words + tile / kChunk, marks[n], __ATOMIC_RELAXED);
        }
      });
    });
    run_parallel(call_.threads, rows(), [&](int, int64_t n) {
      int64_t count = 0;
      for (int64_t word = 0; word < words; ++word) count += __builtin_popcountll(chosen.bits[n * words + word]);
      chosen.counts[n] = count;
    });
  }

 private:
  struct Scratch {
    explicit Scratch(int padded_dim)
        : panel(padded_dim), queries(kPanels * kScoreRows * padded_dim), sums(kPanels * kScoreRows * kLanes) {}
    PanelScratch panel;
    Aligned queries, sums;
    Range seen[kPanels * kScoreRows];
    Range common[kPanels];  // what all rows of a panel see
    float maxima[kPanels * kScoreRows], shifts[kPanels * kScoreRows];
  };

  // Runs go by group, then head: those of a panel see about the same keys.
  Run run_at(int64_t group_head, int64_t n) const {
    const int64_t pieces = ceil_div(group_, run_), head = n / pieces % share_, group = n / pieces / share_;
    return {group_head * share_ + head, part_.first + group, (part_.first + group) * group_ + n % pieces * run_};
  }

  int rows_of(int64_t runs) const { return static_cast<int>(runs * run_); }

  int64_t rows() const { return call_.q.batch * call_.q.heads * part_.size(); }

  int64_t row_of(int64_t b, const Run& run) const {
    return (b * call_.q.heads + run.head) * part_.size() + run.group - part_.first;
  }

  // visit(scratch, b, g, first run, runs)
  template <class Visit>
  void for_each_job(const Visit& visit) {
    const int64_t heads = call_.k.batch * call_.k.heads, jobs = ceil_div(runs_, at_once_);
    run_parallel(call_.threads, heads * jobs, [&](int thread, int64_t n) {
      const int64_t first = (jobs - 1 - n / heads) * at_once_;  // the longest rows first
      visit(scratch_[thread], n % heads / call_.k.heads, n % call_.k.heads, first, std::min(at_once_, runs_ - first));
    });
  }

  // visit(panel, shifts of its rows, its tile, its first run, its runs)
  template <class Visit>
  void visit_tiles(Scratch& scratch, int64_t b, int64_t g, int64_t first, int64_t count, const Visit& visit) {
    const int64_t per_panel = kScoreRows / run_, panels = ceil_div(count, per_panel);
    const Range keys = pack(scratch, b, g, first, count);
    if (keys.empty()) return;
    const auto for_each_panel = [&](const auto& visit_panel) {
      for (int64_t tile = keys.begin / kChunk * kChunk; tile < keys.end; tile += kChunk) {
        PointedRows rows;
        kernels_.pack_keys(list_keys(kernels_, call_.k, call_.extent, b, g, tile, padded_, rows), scratch.panel.keys);
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t runs = std::min(per_panel, count - p * per_panel);
          if (!mark(scratch, p, rows_of(runs), tile)) continue;
          visit_panel(p, runs, tile,
                      ScorePanel{scratch.queries.data() + p * kScoreRows * padded_, scratch.panel.keys, rows_of(runs),
                                 padded_, call_.scale * kLog2E, scratch.panel.masks, scratch.panel.logits});
        }
      }
    };
    if (of_ == Of::kShares || anchors_ == nullptr)
      for_each_panel([&](int64_t p, int64_t, int64_t, const ScorePanel& panel) {
        float* maxima = scratch.maxima + p * kScoreRows;
        if (of_ == Of::kShares)
          kernels_.add_exponentials(panel, maxima, scratch.sums.data() + p * kScoreRows * kLanes);
        else
          kernels_.raise_maxima(panel, maxima);
      });
    for (int64_t r = 0; r < panels * kScoreRows; ++r) scratch.shifts[r] = shift(scratch, b, g, first, r);
    for_each_panel([&](int64_t p, int64_t runs, int64_t tile, const ScorePanel& panel) {
      visit(panel, scratch.shifts + p * kScoreRows, tile, first + p * per_panel, runs);
    });
  }

  // Of row r of the panels of the runs from `first` on: what is added to its logits.
  float shift(const Scratch& scratch, int64_t b, int64_t g, int64_t first, int64_t r) const {
    if (scratch.seen[r].empty()) return 0.0f;
    if (of_ == Of::kShares) {
      double total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += scratch.sums.data()[r * kLanes + lane];
      return total > 0 ? static_cast<float>(-(scratch.maxima[r] + std::log2(total))) : 0.0f;
    }
    const int64_t in_panel = r % kScoreRows;
    const Run run = run_at(g, first + r / kScoreRows * (kScoreRows / run_) + in_panel / run_);
    const int64_t row = (b * call_.q.heads + run.head) * means_.tokens + run.first_block + in_panel % run_;
    float anchor = anchors_ == nullptr ? scratch.maxima[r] : kLog2E * anchors_[row];
    if (bars_ != nullptr) anchor += kLog2E * bars_[run.head];
    return std::min(kLargest, -anchor);  // finite, so that what is masked stays -inf
  }

  // Packs the means of some runs, and returns the keys that any of them sees.
  Range pack(Scratch& scratch, int64_t b, int64_t g, int64_t first, int64_t count) {
    const int64_t per_panel = kScoreRows / run_;
    Range keys{call_.extent.key_count[b], 0};
    std::fill(scratch.seen, scratch.seen + kPanels * kScoreRows, Range{0, 0});
    for (int64_t start = 0; start < count; start += per_panel) {
      const void* rows[kScoreRows];
      const int64_t runs = std::min(per_panel, count - start), place = start / per_panel * kScoreRows;
      Range& common = scratch.common[start / per_panel];
      common = {0, call_.extent.key_count[b]};
      for (int64_t r = 0; r < runs * run_; ++r) {
        const Run run = run_at(g, first + start + r / run_);
        const int64_t m = run.first_block + r % run_;
        const bool inside = m < means_.tokens && m < (run.group + 1) * group_;
        Range& seen = scratch.seen[place + r];
        seen = inside ? call_.extent.keys_of(b, grid_.queries(b, m)) : Range{0, 0};
        rows[r] = seen.empty() ? nullptr : means_.row(b, run.head, m);
        common = {std::max(common.begin, seen.begin), std::min(common.end, seen.end)};
        if (seen.empty()) continue;
        keys = {std::min(keys.begin, seen.begin), std::max(keys.end, seen.end)};
      }
      kernels_.pack_queries({rows, rows_of(runs), means_.dim, padded_, means_.dtype},
                            scratch.queries.data() + place * padded_);
    }
    std::fill(scratch.maxima, scratch.maxima + kPanels * kScoreRows, kNothing);
    std::fill(scratch.sums.data(), scratch.sums.data() + kPanels * kScoreRows * kLanes, 0.0f);
    return keys;
  }

  // Whether some row of a panel sees any key of a tile.
  static bool mark(Scratch& scratch, int64_t panel, int rows, int64_t tile) {
    const Range common = scratch.common[panel];
    if (common.begin <= tile && tile + kChunk <= common.end) {
      std::fill_n(scratch.panel.masks, rows, ~uint64_t{0});
      return true;
    }
    uint64_t any = 0;
    for (int r = 0; r < rows; ++r) {
      const Range seen = scratch.seen[panel * kScoreRows + r];
      any |= scratch.panel.masks[r] = seen.empty() ? 0 : bit_range(seen.begin - tile, seen.end - tile);
    }
    return any != 0;
  }

  const ScoreCall& call_;
  const TensorView& means_;
  const Grid& grid_;
  const Part& part_;
  const ScoreKernels& kernels_;
  const int padded_;
  const int64_t group_, run_, share_, width_;
  const Of of_;
  const float* anchors_;
  const float* bars_ = nullptr;
  const int64_t runs_, at_once_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void group_shares(const Kernels& kernels, const ScoreCall& call, const TensorView& means, const Grid& grid,
                  int64_t group, const Part& part, int64_t width, float* out) {
  GroupKeys(kernels, call, means, grid, group, part, width, Of::kShares).score(out);
}

void group_differences(const Kernels& kernels, const ScoreCall& call, const TensorView& means, const Grid& grid,
                       const float* anchors, int64_t group, const Part& part, int64_t width, float* out) {
  GroupKeys(kernels, call, means, grid, group, part, width, Of::kDifferences, anchors).score(out);
}

void near_keys(const Kernels& kernels, const ScoreCall& call, const TensorView& means, const Grid& grid,
               const float* anchors, int64_t group, const Part& part, int64_t width, const NearKeys& which,
               const ChosenBits& chosen) {
  GroupKeys(kernels, call, means, grid, group, part, width, Of::kDifferences, anchors)
      .choose(which.bars, which.left_out, which.ranges, chosen);
}

}  // namespace gossamer
