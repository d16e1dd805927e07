// Attention mass of columns and diagonals under the last queries: one pass over the keys for the rows' sums of
// exponentials, one for the mass.
#include <algorithm>
#include <cmath>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kProbeTiles = 32;  // tiles of 64 keys that are summed before partial sums are combined
constexpr int64_t kProbeKeys = kProbeTiles * kChunk;

class Probe {
 public:
  Probe(const Kernels& kernels, const ScoreCall& call, int64_t last)
      : call_(call),
        kernels_(*kernels.scores),
        padded_(padded(kernels, call.q.dim)),
        share_(call.q.heads / call.k.heads),
        rows_(std::min(last, call.q.tokens)),
        pieces_(ceil_div(rows_, kScoreRows)),
        chunks_(ceil_div(call.k.tokens, kProbeKeys)),
        scratch_(scratch_for(call.threads, padded_)),
        queries_(call.q.batch * call.q.heads * pieces_ * kScoreRows * padded_) {}

  void run(float* columns, float* diagonals) {
    pack_queries();
    const int64_t jobs = call_.q.batch * call_.k.heads * chunks_;
    const int64_t panels = call_.q.batch * call_.q.heads * pieces_;
    maxima_.assign(panels * chunks_ * kScoreRows, kNothing);
    sums_.assign(panels * chunks_ * kScoreRows, 0.0f);
    run_parallel(call_.threads, jobs, [&](int thread, int64_t n) { sum_chunk(scratch_[thread], n); });
    shifts_.assign(panels * kScoreRows, 0.0f);
    run_parallel(call_.threads, panels, [&](int, int64_t panel) { combine_sums(panel); });
    partial_.assign(panels * chunks_ * kPartial, 0.0f);
    run_parallel(call_.threads, jobs, [&](int thread, int64_t n) { mass_of_chunk(scratch_[thread], n, columns); });
    run_parallel(call_.threads, call_.q.batch * call_.q.heads, [&](int, int64_t h) { combine_diagonals(h, diagonals); });
  }

 private:
  static constexpr int64_t kPartial = kProbeKeys + kScoreRows + kDiagonalSlack;

  // The probing rows end at the last query whose own slot is live.
  int64_t first_row(int64_t b) const {
    const int64_t end = call_.extent.key_count[b] - call_.extent.query_start[b];
    return std::clamp(end, rows_, call_.q.tokens) - rows_;
  }
  int64_t piece_rows(int64_t piece) const { return std::min<int64_t>(kScoreRows, rows_ - piece * kScoreRows); }
  int64_t piece_position(int64_t b, int64_t piece) const {
    return first_row(b) + piece * kScoreRows + call_.extent.query_start[b];
  }
  int64_t live_begin(int64_t b) const { return call_.extent.key_start[b]; }
  int64_t live_end(int64_t b) const { return call_.extent.key_start[b] + call_.extent.key_count[b]; }
  const float* queries(int64_t panel) const { return queries_.data() + panel * kScoreRows * padded_; }

  void pack_queries() {
    run_parallel(call_.threads, call_.q.batch * call_.q.heads * pieces_, [&](int, int64_t panel) {
      const int64_t piece = panel % pieces_, h = panel / pieces_ % call_.q.heads, b = panel / pieces_ / call_.q.heads;
      const void* rows[kScoreRows];
      const int64_t begin = first_row(b) + piece * kScoreRows;
      kernels_.pack_queries(
          list_rows(call_.q, b, h, begin, piece_rows(piece), 0, call_.q.tokens, padded_, rows),
          queries_.data() + panel * kScoreRows * padded_);
    });
  }

  // Calls visit(panel number, score panel, tile) for each tile of a chunk and each panel that sees any of it.
  template <class Visit>
  void for_each_panel(PanelScratch& scratch, int64_t n, const Visit& visit) {
    const int64_t chunk = n % chunks_, g = n / chunks_ % call_.k.heads, b = n / chunks_ / call_.k.heads;
    for (int64_t tile = 0; tile < kProbeTiles; ++tile) {
      const int64_t slot = chunk * kProbeKeys + tile * kChunk;
      if (slot >= live_end(b) || slot + kChunk <= live_begin(b)) continue;
      const void* rows[kChunk];
      kernels_.pack_keys(
          list_rows(call_.k, b, g, slot, kChunk, live_begin(b), live_end(b), padded_, rows), scratch.keys);
      for (int64_t h = g * share_; h < (g + 1) * share_; ++h)
        for (int64_t piece = 0; piece < pieces_; ++piece) {
          const int64_t panel = (b * call_.q.heads + h) * pieces_ + piece;
          const int count = static_cast<int>(piece_rows(piece));
          uint64_t any = 0;
          for (int r = 0; r < count; ++r) {
            const int64_t end = live_begin(b) + piece_position(b, piece) + r + 1;
            any |= scratch.masks[r] = bit_range(live_begin(b) - slot, std::min(live_end(b), end) - slot);
          }
          if (any == 0) continue;
          visit(panel, ScorePanel{queries(panel), scratch.keys, count, padded_, call_.scale * kLog2E,
                                  scratch.masks, scratch.logits},
                tile);
        }
    }
  }

  void sum_chunk(PanelScratch& scratch, int64_t n) {
    const int64_t chunk = n % chunks_, first = n / chunks_ * share_ * pieces_;  // of the group's panels
    std::vector<float> lanes(static_cast<size_t>(share_ * pieces_ * kScoreRows * kLanes), 0.0f);
    for_each_panel(scratch, n, [&](int64_t panel, const ScorePanel& job, int64_t) {
      kernels_.add_exponentials(job, maxima_.data() + (panel * chunks_ + chunk) * kScoreRows,
                                lanes.data() + (panel - first) * kScoreRows * kLanes);
    });
    for (int64_t p = 0; p < share_ * pieces_; ++p)
      for (int r = 0; r < kScoreRows; ++r) {
        float& sum = sums_[((first + p) * chunks_ + chunk) * kScoreRows + r];
        for (int t = 0; t < kLanes; ++t) sum += lanes[(p * kScoreRows + r) * kLanes + t];
      }
  }

  // shift = -log2 of the row's sum over all chunks.
  void combine_sums(int64_t panel) {
    for (int r = 0; r < kScoreRows; ++r) {
      const auto sum_of = [&](int64_t chunk) { return (panel * chunks_ + chunk) * kScoreRows + r; };
      float top = kNothing;
      for (int64_t c = 0; c < chunks_; ++c) top = std::max(top, maxima_[sum_of(c)]);
      if (top == kNothing) continue;
      double total = 0;
      for (int64_t c = 0; c < chunks_; ++c) total += sums_[sum_of(c)] * std::exp2(double{maxima_[sum_of(c)]} - top);
      shifts_[panel * kScoreRows + r] = static_cast<float>(-(top + std::log2(total)));
    }
  }

  void mass_of_chunk(PanelScratch& scratch, int64_t n, float* columns) {
    const int64_t chunk = n % chunks_;
    for_each_panel(scratch, n, [&](int64_t panel, const ScorePanel& job, int64_t tile) {
      float sums[kChunk] = {};
      kernels_.add_mass(job, shifts_.data() + panel * kScoreRows, sums,
                        partial_.data() + (panel * chunks_ + chunk) * kPartial + tile * kChunk);
      const int64_t slot = chunk * kProbeKeys + tile * kChunk;
      float* out = columns + panel / pieces_ * call_.k.tokens + slot;
      const int64_t keys = std::min<int64_t>(kChunk, call_.k.tokens - slot);
      for (int64_t t = 0; t < keys; ++t) out[t] += sums[t];
    });
  }

  void combine_diagonals(int64_t head, float* diagonals) {
    const int64_t b = head / call_.q.heads;
    float* out = diagonals + head * call_.k.tokens;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk)
      for (int64_t piece = 0; piece < pieces_; ++piece) {
        const float* sums = partial_.data() + ((head * pieces_ + piece) * chunks_ + chunk) * kPartial;
        // Index v holds distance first - v.
        const int64_t first =
            piece_position(b, piece) + piece_rows(piece) - 1 - (chunk * kProbeKeys - live_begin(b));
        const int64_t low = std::max<int64_t>(0, first - call_.k.tokens + 1);
        const int64_t high = std::min<int64_t>(kPartial, first + 1);
        for (int64_t v = low; v < high; ++v) out[first - v] += sums[v];
      }
  }

  const ScoreCall& call_;
  const ScoreKernels& kernels_;
  const int padded_;
  const int64_t share_, rows_, pieces_, chunks_;
  std::vector<PanelScratch> scratch_;
  Aligned queries_;
  std::vector<float> maxima_, sums_, shifts_, partial_;
};

}  // namespace

void probe(const Kernels& kernels, const ScoreCall& call, int64_t last, float* columns, float* diagonals) {
  if (call.q.tokens == 0 || call.k.tokens == 0 || call.q.batch == 0) return;
  Probe(kernels, call, last).run(columns, diagonals);
}

}  // namespace gossamer
