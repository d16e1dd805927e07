// Scores: the last queries against all keys, means of blocks, all queries against means.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attend/worklist.h"
#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kProbeTiles = 32;  // tiles of 64 keys that are summed before partial sums are combined
constexpr int64_t kProbeKeys = kProbeTiles * kChunk;

// What one thread needs for a panel: packed keys, packed queries and logits.
class Scratch {
 public:
  explicit Scratch(int padded_dim)
      : floats_(int64_t{2} * kChunk * padded_dim + kLanes + kScoreRows * kScorePitch + kDiagonalSlack),
        keys(floats_.data()),
        queries(keys + kChunk * padded_dim),
        logits(queries + kChunk * padded_dim + kLanes) {}
  Scratch(Scratch&&) = default;

 private:
  Aligned floats_;

 public:
  float *keys, *queries, *logits;
  uint64_t masks[kScoreRows];
};

std::vector<Scratch> scratch_for(int threads, int padded_dim) {
  std::vector<Scratch> all;
  all.reserve(threads);
  for (int t = 0; t < threads; ++t) all.emplace_back(padded_dim);
  return all;
}

class Probe {
 public:
  Probe(const Kernels& kernels, const ScoreCall& call, int64_t last)
      : call_(call),
        kernels_(*kernels.planning),
        padded_(padded(kernels, call.dim)),
        share_(call.heads / call.groups),
        rows_(std::min(last, call.query_len)),
        pieces_(ceil_div(rows_, kScoreRows)),
        chunks_(ceil_div(call.key_len, kProbeKeys)),
        scratch_(scratch_for(call.threads, padded_)),
        queries_(call.batch * call.heads * pieces_ * kScoreRows * padded_) {}

  void run(float* columns, float* diagonals) {
    pack_queries();
    const int64_t jobs = call_.batch * call_.groups * chunks_;
    const int64_t panels = call_.batch * call_.heads * pieces_;
    maxima_.assign(panels * chunks_ * kScoreRows, kNothing);
    sums_.assign(panels * chunks_ * kScoreRows, 0.0f);
    run_parallel(call_.threads, jobs, [&](int thread, int64_t n) { sum_chunk(scratch_[thread], n); });
    shifts_.assign(panels * kScoreRows, 0.0f);
    run_parallel(call_.threads, panels, [&](int, int64_t panel) { combine_sums(panel); });
    partial_.assign(panels * chunks_ * kPartial, 0.0f);
    run_parallel(call_.threads, jobs, [&](int thread, int64_t n) { mass_of_chunk(scratch_[thread], n, columns); });
    run_parallel(call_.threads, call_.batch * call_.heads, [&](int, int64_t h) { combine_diagonals(h, diagonals); });
  }

 private:
  static constexpr int64_t kPartial = kProbeKeys + kScoreRows + kDiagonalSlack;

  // The probing rows end at the last query whose own slot is live.
  int64_t first_row(int64_t b) const {
    const int64_t end = call_.positions.key_count[b] - call_.positions.query_start[b];
    return std::clamp(end, rows_, call_.query_len) - rows_;
  }
  int64_t piece_rows(int64_t piece) const { return std::min<int64_t>(kScoreRows, rows_ - piece * kScoreRows); }
  int64_t piece_position(int64_t b, int64_t piece) const {
    return first_row(b) + piece * kScoreRows + call_.positions.query_start[b];
  }
  int64_t live_begin(int64_t b) const { return call_.positions.key_start[b]; }
  int64_t live_end(int64_t b) const { return call_.positions.key_start[b] + call_.positions.key_count[b]; }
  const float* queries(int64_t panel) const { return queries_.data() + panel * kScoreRows * padded_; }

  void pack_queries() {
    run_parallel(call_.threads, call_.batch * call_.heads * pieces_, [&](int, int64_t panel) {
      const int64_t piece = panel % pieces_, h = panel / pieces_ % call_.heads, b = panel / pieces_ / call_.heads;
      const void* rows[kScoreRows];
      const int64_t begin = first_row(b) + piece * kScoreRows;
      kernels_.pack_queries(
          list_rows(call_.q, b, h, begin, piece_rows(piece), 0, call_.query_len, call_, padded_, rows),
          queries_.data() + panel * kScoreRows * padded_);
    });
  }

  // Calls visit(panel number, score panel, tile) for each tile of a chunk and each panel that sees any of it.
  template <class Visit>
  void for_each_panel(Scratch& scratch, int64_t n, const Visit& visit) {
    const int64_t chunk = n % chunks_, g = n / chunks_ % call_.groups, b = n / chunks_ / call_.groups;
    for (int64_t tile = 0; tile < kProbeTiles; ++tile) {
      const int64_t slot = chunk * kProbeKeys + tile * kChunk;
      if (slot >= live_end(b) || slot + kChunk <= live_begin(b)) continue;
      const void* rows[kChunk];
      kernels_.pack_keys(
          list_rows(call_.k, b, g, slot, kChunk, live_begin(b), live_end(b), call_, padded_, rows), scratch.keys);
      for (int64_t h = g * share_; h < (g + 1) * share_; ++h)
        for (int64_t piece = 0; piece < pieces_; ++piece) {
          const int64_t panel = (b * call_.heads + h) * pieces_ + piece;
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

  void sum_chunk(Scratch& scratch, int64_t n) {
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
      const auto at = [&](int64_t chunk) { return (panel * chunks_ + chunk) * kScoreRows + r; };
      float top = kNothing;
      for (int64_t c = 0; c < chunks_; ++c) top = std::max(top, maxima_[at(c)]);
      if (top == kNothing) continue;
      double total = 0;
      for (int64_t c = 0; c < chunks_; ++c) total += sums_[at(c)] * std::exp2(double{maxima_[at(c)]} - top);
      shifts_[panel * kScoreRows + r] = static_cast<float>(-(top + std::log2(total)));
    }
  }

  void mass_of_chunk(Scratch& scratch, int64_t n, float* columns) {
    const int64_t chunk = n % chunks_;
    for_each_panel(scratch, n, [&](int64_t panel, const ScorePanel& job, int64_t tile) {
      float sums[kChunk] = {};
      kernels_.add_mass(job, shifts_.data() + panel * kScoreRows, sums,
                        partial_.data() + (panel * chunks_ + chunk) * kPartial + tile * kChunk);
      const int64_t slot = chunk * kProbeKeys + tile * kChunk;
      float* out = columns + panel / pieces_ * call_.key_len + slot;
      const int64_t keys = std::min<int64_t>(kChunk, call_.key_len - slot);
      for (int64_t t = 0; t < keys; ++t) out[t] += sums[t];
    });
  }

  void combine_diagonals(int64_t head, float* diagonals) {
    const int64_t b = head / call_.heads;
    float* out = diagonals + head * call_.key_len;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk)
      for (int64_t piece = 0; piece < pieces_; ++piece) {
        const float* sums = partial_.data() + ((head * pieces_ + piece) * chunks_ + chunk) * kPartial;
        // Index v holds distance first - v.
        const int64_t first =
            piece_position(b, piece) + piece_rows(piece) - 1 - (chunk * kProbeKeys - live_begin(b));
        const int64_t low = std::max<int64_t>(0, first - call_.key_len + 1);
        const int64_t high = std::min<int64_t>(kPartial, first + 1);
        for (int64_t v = low; v < high; ++v) out[first - v] += sums[v];
      }
  }

  const ScoreCall& call_;
  const PlanningKernels& kernels_;
  const int padded_;
  const int64_t share_, rows_, pieces_, chunks_;
  std::vector<Scratch> scratch_;
  Aligned queries_;
  std::vector<float> maxima_, sums_, shifts_, partial_;
};

class Energies {
 public:
  Energies(const Kernels& kernels, const ScoreCall& call, int64_t block_q, int64_t block_k, int64_t at, int64_t stop)
      : call_(call),
        kernels_(*kernels.planning),
        block_q_(block_q),
        block_k_(block_k),
        at_(at),
        stop_(stop),
        padded_(padded(kernels, call.dim)),
        share_(call.heads / call.groups),
        width_(ceil_div(call.key_len, block_k)),
        tiles_(ceil_div(width_, kChunk)),
        scratch_(scratch_for(call.threads, padded_)),
        keys_(call.batch * call.groups * tiles_ * kChunk * padded_) {}

  void run(float* out) {
    run_parallel(call_.threads, call_.batch * call_.groups * tiles_, [&](int, int64_t n) {
      const int64_t tile = n % tiles_, g = n / tiles_ % call_.groups, b = n / tiles_ / call_.groups;
      const void* rows[kChunk];
      kernels_.pack_keys(list_rows(call_.k, b, g, tile * kChunk, kChunk, 0, width_, call_, padded_, rows),
                         keys_.data() + n * kChunk * padded_);
    });
    const int64_t groups = call_.batch * call_.groups;
    run_parallel(call_.threads, groups * (stop_ - at_), [&](int thread, int64_t n) {
      const int64_t block = stop_ - 1 - n / groups;  // the longest rows first
      score(scratch_[thread], n % groups, block, out + (n % groups * (stop_ - at_) + block - at_) * width_);
    });
  }

 private:
  void score(Scratch& scratch, int64_t group, int64_t block, float* out) {
    const int64_t b = group / call_.groups, g = group % call_.groups;
    const int64_t first = block * block_q_, rows = std::min(block_q_, call_.query_len - first);
    const int64_t start = call_.positions.key_start[b], end = start + call_.positions.key_count[b];
    const int64_t to_slot = call_.positions.query_start[b] + start;  // of a query's own key
    std::fill(out, out + width_, 0.0f);
    // Blocks that hold live keys and end at or before the last row's own slot.
    const int64_t low = start / block_k_;
    const int64_t past = to_slot + first + rows;
    const int64_t high = std::min(ceil_div(end, block_k_), past < 0 ? 0 : past / block_k_);
    if (high <= low || end == start) return;

    const int64_t pieces = ceil_div(rows, kScoreRows), first_tile = low / kChunk, tiles = ceil_div(high, kChunk);
    std::vector<float> sums, largest;
    std::vector<int64_t> of_tile;
    for (int64_t h = g * share_; h < (g + 1) * share_; ++h)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t row = first + piece * kScoreRows;
        const int count = static_cast<int>(std::min<int64_t>(kScoreRows, first + rows - row));
        const void* pointers[kScoreRows];
        kernels_.pack_queries(list_rows(call_.q, b, h, row, count, 0, call_.query_len, call_, padded_, pointers),
                              scratch.queries);
        for (int64_t tile = first_tile; tile < tiles; ++tile) {
          uint64_t any = 0;
          for (int r = 0; r < count; ++r) {
            const int64_t slot = to_slot + row + r;  // it sees blocks whose first live slot is at or before
            const int64_t sees = slot < start ? 0 : slot / block_k_ + 1;
            any |= scratch.masks[r] = bit_range(low - tile * kChunk, std::min(high, sees) - tile * kChunk);
          }
          if (any == 0) continue;
          sums.resize(sums.size() + kChunk);
          largest.push_back(kernels_.energy(
              {scratch.queries, keys_.data() + ((b * call_.groups + g) * tiles_ + tile) * kChunk * padded_, count,
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
  const PlanningKernels& kernels_;
  const int64_t block_q_, block_k_, at_, stop_;
  const int padded_;
  const int64_t share_, width_, tiles_;
  std::vector<Scratch> scratch_;
  Aligned keys_;
};

}  // namespace

void probe(const Kernels& kernels, const ScoreCall& call, int64_t last, float* columns, float* diagonals) {
  if (call.query_len == 0 || call.key_len == 0 || call.batch == 0) return;
  Probe(kernels, call, last).run(columns, diagonals);
}

void block_energy(const Kernels& kernels, const ScoreCall& call, int64_t block_q, int64_t block_k, int64_t at,
                  int64_t stop, float* out) {
  Energies(kernels, call, block_q, block_k, at, stop).run(out);
}

void pool(const Kernels& kernels, const TensorView& x, int64_t batch, int64_t heads, int64_t tokens, int dim,
          DType dtype, int64_t block, const int64_t* live, float* out, int threads) {
  const int64_t blocks = ceil_div(tokens, block), element = element_size(dtype);
  run_parallel(threads, batch * heads * blocks, [&](int, int64_t n) {
    const int64_t at = n % blocks, h = n / blocks % heads, b = n / blocks / heads;
    const int64_t low = std::max(at * block, live[2 * b]);
    const int64_t high = std::min({(at + 1) * block, tokens, live[2 * b + 1]});
    if (low < high)
      kernels.planning->mean(x.row(b, h, low, element), x.stride[2] * element, high - low, dim, dtype,
                             out + n * dim);
  });
}

}  // namespace gossamer
