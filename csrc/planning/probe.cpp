// Attention mass of columns and distances under the last queries: one pass over the keys for the rows' sums of
// exponentials, one for the mass.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/budgets.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kProbeKeys = kProbeTiles * kChunk;
// Sums by diagonal of a chunk of keys under a panel of rows.
constexpr int64_t kDiagonals = kProbeKeys + kScoreRows + kDiagonalSlack;

// The probing rows of one batch row: its last live queries, in pieces of 64, against its keys in chunks.
struct ProbeRows {
  int64_t rows, first_position;
  int64_t pieces, chunks;
  int64_t first_panel;  // a panel: a piece of a head
  int64_t first_span;   // a span: a chunk under a panel

  int64_t piece_rows(int64_t piece) const { return std::min<int64_t>(kScoreRows, rows - piece * kScoreRows); }
  int64_t piece_position(int64_t piece) const { return first_position + piece * kScoreRows; }
};

// The part of a batch row's work that one thread does at once: a chunk of the keys of a key/value head.
struct ProbeJob {
  int64_t b, group, chunk;
};

class Probe {
 public:
  Probe(const Kernels& kernels, const ScoreCall& call, int64_t last, int64_t width)
      : call_(call),
        kernels_(*kernels.scores),
        padded_(padded(kernels, call.q.dim)),
        share_(call.q.heads / call.k.heads),
        width_(width),
        scratch_(scratch_for(call.threads, padded_)) {
    for (int64_t b = 0; b < call.q.batch; ++b) add_rows(b, last);
    queries_ = Aligned(panels_ * kScoreRows * padded_);
    maxima_.assign(spans_ * kScoreRows, kNothing);
    sums_.assign(spans_ * kScoreRows, 0.0f);
    shifts_.assign(panels_ * kScoreRows, 0.0f);
    diagonals_.assign(spans_ * kDiagonals, 0.0f);
  }

  void run(float* columns, float* diagonals) {
    const int64_t heads = call_.q.batch * call_.q.heads;
    run_parallel(call_.threads, heads, [&](int, int64_t head) { pack_queries(head); });
    run_parallel(call_.threads, jobs_, [&](int thread, int64_t n) { sum_chunk(scratch_[thread], job(n)); });
    run_parallel(call_.threads, heads, [&](int, int64_t head) { combine_sums(head); });
    run_parallel(call_.threads, jobs_,
                 [&](int thread, int64_t n) { mass_of_chunk(scratch_[thread], job(n), columns); });
    run_parallel(call_.threads, heads, [&](int, int64_t head) { combine_diagonals(head, diagonals); });
  }

 private:
  void add_rows(int64_t b, int64_t last) {
    const Extent& extent = call_.extent;
    const int64_t rows = std::min(last, extent.query_count[b]);
    const int64_t end = extent.first_position(b) + extent.query_count[b];
    const int64_t pieces = ceil_div(rows, kScoreRows), chunks = ceil_div(extent.key_count[b], kProbeKeys);
    rows_.push_back({rows, end - rows, pieces, chunks, panels_, spans_});
    first_jobs_.push_back(jobs_);
    panels_ += call_.q.heads * pieces;
    spans_ += call_.q.heads * pieces * chunks;
    jobs_ += pieces > 0 ? call_.k.heads * chunks : 0;
  }

  ProbeJob job(int64_t n) const {
    const int64_t b = row_of_job(first_jobs_, n), in_row = n - first_jobs_[b];
    return {b, in_row / rows_[b].chunks, in_row % rows_[b].chunks};
  }
  int64_t panel(int64_t b, int64_t head, int64_t piece) const {
    return rows_[b].first_panel + head * rows_[b].pieces + piece;
  }
  int64_t span(int64_t b, int64_t head, int64_t piece, int64_t chunk) const {
    return rows_[b].first_span + (head * rows_[b].pieces + piece) * rows_[b].chunks + chunk;
  }
  float* queries(int64_t panel) { return queries_.data() + panel * kScoreRows * padded_; }

  void pack_queries(int64_t n) {
    const int64_t b = n / call_.q.heads, head = n % call_.q.heads;
    const ProbeRows& own = rows_[b];
    for (int64_t piece = 0; piece < own.pieces; ++piece) {
      const void* rows[kScoreRows];
      kernels_.pack_queries(list_queries(call_.q, call_.extent, b, head, own.piece_position(piece),
                                         own.piece_rows(piece), padded_, rows),
                            queries(panel(b, head, piece)));
    }
  }

  // Calls visit(head, piece, score panel, position of its first key) for each tile of a chunk and each panel that sees
  // any of it.
  template <class Visit>
  void for_each_panel(PanelScratch& scratch, const ProbeJob& job, const Visit& visit) {
    const ProbeRows& own = rows_[job.b];
    const int64_t keys = call_.extent.key_count[job.b];
    for (int64_t tile = 0; tile < kProbeTiles; ++tile) {
      const int64_t first = job.chunk * kProbeKeys + tile * kChunk;
      if (first >= keys) return;
      PointedRows rows;
      kernels_.pack_keys(list_keys(kernels_, call_.k, call_.extent, job.b, job.group, first, padded_, rows),
                         scratch.keys);
      for (int64_t h = job.group * share_; h < (job.group + 1) * share_; ++h)
        for (int64_t piece = 0; piece < own.pieces; ++piece) {
          const int count = static_cast<int>(own.piece_rows(piece));
          uint64_t any = 0;
          for (int r = 0; r < count; ++r) {
            const int64_t query = own.piece_position(piece) + r;
            const Range seen = call_.extent.keys_of(job.b, {query, query + 1});
            any |= scratch.masks[r] = bit_range(seen.begin - first, seen.end - first);
          }
          if (any == 0) continue;
          visit(h, piece, ScorePanel{queries(panel(job.b, h, piece)), scratch.keys, count, padded_,
                                     call_.scale * kLog2E, scratch.masks, scratch.logits},
                first);
        }
    }
  }

  void sum_chunk(PanelScratch& scratch, const ProbeJob& job) {
    const int64_t pieces = rows_[job.b].pieces, first_head = job.group * share_;
    std::vector<float> lanes(static_cast<size_t>(share_ * pieces * kScoreRows * kLanes), 0.0f);
    for_each_panel(scratch, job, [&](int64_t head, int64_t piece, const ScorePanel& panel, int64_t) {
      kernels_.add_exponentials(panel, maxima_.data() + span(job.b, head, piece, job.chunk) * kScoreRows,
                                lanes.data() + ((head - first_head) * pieces + piece) * kScoreRows * kLanes);
    });
    for (int64_t p = 0; p < share_ * pieces; ++p)
      for (int r = 0; r < kScoreRows; ++r) {
        float& sum = sums_[span(job.b, first_head + p / pieces, p % pieces, job.chunk) * kScoreRows + r];
        for (int t = 0; t < kLanes; ++t) sum += lanes[(p * kScoreRows + r) * kLanes + t];
      }
  }

  // shift = -log2 of the row's sum over all chunks.
  void combine_sums(int64_t n) {
    const int64_t b = n / call_.q.heads, head = n % call_.q.heads, chunks = rows_[b].chunks;
    for (int64_t r = 0; r < rows_[b].pieces * kScoreRows; ++r) {
      const int64_t piece = r / kScoreRows;
      const auto sum_of = [&](int64_t chunk) { return span(b, head, piece, chunk) * kScoreRows + r % kScoreRows; };
      float top = kNothing;
      for (int64_t c = 0; c < chunks; ++c) top = std::max(top, maxima_[sum_of(c)]);
      if (top == kNothing) continue;
      double total = 0;
      for (int64_t c = 0; c < chunks; ++c) total += sums_[sum_of(c)] * std::exp2(double{maxima_[sum_of(c)]} - top);
      shifts_[panel(b, head, 0) * kScoreRows + r] = static_cast<float>(-(top + std::log2(total)));
    }
  }

  void mass_of_chunk(PanelScratch& scratch, const ProbeJob& job, float* columns) {
    for_each_panel(scratch, job, [&](int64_t head, int64_t piece, const ScorePanel& score_panel, int64_t first) {
      float sums[kChunk] = {};
      kernels_.add_mass(score_panel, shifts_.data() + panel(job.b, head, piece) * kScoreRows, sums,
                        diagonals_.data() + span(job.b, head, piece, job.chunk) * kDiagonals + first % kProbeKeys);
      float* out = columns + (job.b * call_.q.heads + head) * width_ + first;
      const int64_t keys = std::min<int64_t>(kChunk, width_ - first);
      for (int64_t t = 0; t < keys; ++t) out[t] += sums[t];
    });
  }

  void combine_diagonals(int64_t n, float* diagonals) {
    const int64_t b = n / call_.q.heads, head = n % call_.q.heads;
    const ProbeRows& own = rows_[b];
    float* out = diagonals + n * width_;
    for (int64_t chunk = 0; chunk < own.chunks; ++chunk)
      for (int64_t piece = 0; piece < own.pieces; ++piece) {
        const float* sums = diagonals_.data() + span(b, head, piece, chunk) * kDiagonals;
        // Index v holds query - key = last - v.
        const int64_t last = own.piece_position(piece) + own.piece_rows(piece) - 1 - chunk * kProbeKeys;
        const int64_t low = std::max<int64_t>(0, last - width_ + 1);
        const int64_t high = std::min(kDiagonals, call_.extent.causal ? last + 1 : last + width_);
        for (int64_t v = low; v < high; ++v) out[std::abs(last - v)] += sums[v];
      }
  }

  const ScoreCall& call_;
  const ScoreKernels& kernels_;
  const int padded_;
  const int64_t share_, width_;
  std::vector<PanelScratch> scratch_;
  std::vector<ProbeRows> rows_;        // by batch row
  std::vector<int64_t> first_jobs_;    // by batch row
  int64_t panels_ = 0, spans_ = 0, jobs_ = 0;
  Aligned queries_{0};
  std::vector<float> maxima_, sums_;   // by span and row
  std::vector<float> shifts_;          // by panel and row
  std::vector<float> diagonals_;       // by span
};

}  // namespace

void probe(const Kernels& kernels, const ScoreCall& call, int64_t last, int64_t width, float* columns,
           float* diagonals) {
  Probe(kernels, call, last, width).run(columns, diagonals);
}

}  // namespace gossamer
