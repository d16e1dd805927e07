// Attention mass of blocks by the antidiagonals of cells: a cell pairs `stride` queries with `stride` keys, and its
// logit is the sum of `stride` products, one for each piece of the packed queries and keys.
#include <algorithm>
#include <cmath>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kRowsAJob = 256;  // rows of cells against which a tile of keys is packed once
constexpr int64_t kQueryBytesAJob = 4 << 20;

// Key cells in tiles of at most 64. A tile holds whole blocks, or a part of one.
struct Tiling {
  Tiling(int64_t blocks, int64_t cells)
      : cells(cells),
        whole(std::max<int64_t>(1, kChunk / cells)),
        parts(ceil_div(cells, kChunk)),
        run(static_cast<int>(std::min<int64_t>(cells, kChunk))),
        count(parts > 1 ? blocks * parts : ceil_div(blocks, whole)) {}

  int64_t of_cell(int64_t cell) const {
    return parts > 1 ? cell / cells * parts + cell % cells / kChunk : cell / cells / whole;
  }
  int64_t first_block(int64_t tile) const { return parts > 1 ? tile / parts : tile * whole; }
  int64_t first_cell(int64_t tile) const {
    return first_block(tile) * cells + (parts > 1 ? tile % parts * kChunk : 0);
  }
  int64_t past_cell(int64_t tile) const {
    return parts > 1 ? std::min(first_cell(tile) + kChunk, (first_block(tile) + 1) * cells)
                     : first_cell(tile) + whole * cells;
  }

  const int64_t cells;  // in a block
  const int64_t whole;  // blocks in a tile
  const int64_t parts;  // tiles that a block takes
  const int run;        // a block's cells in a tile
  const int64_t count;
};

class Antidiagonals {
 public:
  Antidiagonals(const Kernels& kernels, const ScoreCall& call, const Antidiagonal& sizes)
      : call_(call),
        sizes_(sizes),
        kernels_(*kernels.planning),
        padded_(padded(kernels, call.dim)),
        share_(call.heads / call.groups),
        row_cells_(sizes.block_q / sizes.stride),
        key_blocks_(ceil_div(call.key_len, sizes.block_k)),
        tiling_(key_blocks_, sizes.block_k / sizes.stride),
        piece_floats_(kChunk * padded_ / (kernels.bf16_tiles ? 2 : 1)),
        blocks_a_job_(blocks_a_job()),
        panels_(ceil_div(blocks_a_job_ * share_ * row_cells_, kScoreRows)) {
    scratch_.reserve(call.threads);
    for (int t = 0; t < call.threads; ++t) scratch_.emplace_back(*this);
  }

  void run(float* out) {
    const int64_t groups = call_.batch * call_.groups, parts = ceil_div(sizes_.stop - sizes_.at, blocks_a_job_);
    run_parallel(call_.threads, groups * parts, [&](int thread, int64_t n) {
      const int64_t first = sizes_.at + (parts - 1 - n / groups) * blocks_a_job_;  // the longest rows first
      Job{*this, scratch_[thread], n % groups, first, std::min(sizes_.stop, first + blocks_a_job_)}.score(out);
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const Antidiagonals& all)
        : keys(all.sizes_.stride * all.piece_floats_),
          queries(all.panels_ * all.sizes_.stride * all.piece_floats_),
          logits(kLanes + kScoreRows * kScorePitch),
          sums(all.panels_ * all.tiling_.count * kScoreRows * all.tiling_.whole),
          references(all.panels_ * all.tiling_.count * kScoreRows) {}
    Aligned keys, queries, logits;
    // Of each panel, tile and row: a sum for each block of the tile, and their common reference.
    std::vector<float> sums, references;
  };

  int64_t blocks_a_job() const {
    const int64_t block_bytes = share_ * row_cells_ * sizes_.stride * piece_floats_ / kChunk * 4;
    return std::max<int64_t>(1, std::min(kRowsAJob / (share_ * row_cells_), kQueryBytesAJob / block_bytes));
  }

  // Query blocks [first, stop) in the heads that share a key/value head: rows of cells by block, head and cell.
  class Job {
   public:
    Job(const Antidiagonals& all, Scratch& scratch, int64_t group, int64_t first, int64_t stop)
        : all_(all),
          call_(all.call_),
          scratch_(scratch),
          b_(group / all.call_.groups),
          g_(group % all.call_.groups),
          first_(first),
          rows_((stop - first) * all.share_ * all.row_cells_),
          panels_(ceil_div(rows_, kScoreRows)),
          start_(call_.positions.key_start[b_]),
          end_(start_ + call_.positions.key_count[b_]),
          past_cell_(panels_ * kScoreRows, 0),
          maximum_(panels_ * kScoreRows, kNothing) {}

    void score(float* out) {
      for (int64_t r = 0; r < rows_; r += all_.row_cells_) {
        float* block = out_row(out, r);
        std::fill(block, block + all_.key_blocks_, 0.0f);
      }
      for (int64_t r = 0; r < rows_; ++r) past_cell_[r] = past_cell_of(r);
      const int64_t past = *std::max_element(past_cell_.begin(), past_cell_.end());
      if (past <= first_cell()) return;
      for (int64_t panel = 0; panel < panels_; ++panel) pack_queries(panel);
      for (int64_t tile = first_tile(); tile <= all_.tiling_.of_cell(past - 1); ++tile) {
        pack_keys(tile);
        for (int64_t panel = 0; panel < panels_; ++panel)
          if (past_of_panel(panel) > all_.tiling_.first_cell(tile)) add_tile(panel, tile);
      }
      for (int64_t panel = 0; panel < panels_; ++panel) write(panel, out);
    }

   private:
    int64_t head(int64_t r) const { return g_ * all_.share_ + r / all_.row_cells_ % all_.share_; }
    int64_t block(int64_t r) const { return first_ + r / all_.row_cells_ / all_.share_; }
    int64_t query(int64_t r) const {
      return block(r) * all_.sizes_.block_q + r % all_.row_cells_ * all_.sizes_.stride;
    }
    float* out_row(float* out, int64_t r) const {
      const int64_t blocks = all_.sizes_.stop - all_.sizes_.at;
      return out + ((b_ * call_.heads + head(r)) * blocks + block(r) - all_.sizes_.at) * all_.key_blocks_;
    }
    int64_t first_cell() const { return start_ / all_.sizes_.stride; }
    int64_t first_tile() const { return all_.tiling_.of_cell(first_cell()); }

    // A row of cells sees those whose first live key is at or before the position of its last query.
    int64_t past_cell_of(int64_t r) const {
      if (query(r) >= call_.query_len || start_ == end_) return 0;
      const int64_t last =
          std::min(query(r) + all_.sizes_.stride, call_.query_len) - 1 + call_.positions.query_start[b_];
      return last < 0 ? 0 : std::min(ceil_div(end_, all_.sizes_.stride), (last + start_) / all_.sizes_.stride + 1);
    }
    int64_t past_of_panel(int64_t panel) const {
      const auto begin = past_cell_.begin() + panel * kScoreRows;
      return *std::max_element(begin, begin + kScoreRows);
    }
    int64_t rows_of(int64_t panel) const { return std::min<int64_t>(kScoreRows, rows_ - panel * kScoreRows); }
    int64_t slot_of(int64_t panel, int64_t tile) const { return panel * all_.tiling_.count + tile; }
    float* queries(int64_t panel) const {
      return scratch_.queries.data() + panel * all_.sizes_.stride * all_.piece_floats_;
    }

    // Piece s holds the queries that meet the cells' keys s: the last query meets the first key.
    void pack_queries(int64_t panel) {
      const void* rows[kScoreRows];
      const int64_t live = -call_.positions.query_start[b_];
      for (int64_t s = 0; s < all_.sizes_.stride; ++s) {
        for (int64_t n = 0; n < rows_of(panel); ++n) {
          const int64_t r = panel * kScoreRows + n, row = query(r) + all_.sizes_.stride - 1 - s;
          rows[n] = row >= live && row < call_.query_len
                        ? call_.q.row(b_, head(r), row, element_size(call_.dtype))
                        : nullptr;
        }
        all_.kernels_.pack_queries({rows, static_cast<int>(rows_of(panel)), call_.dim, all_.padded_, call_.dtype},
                                   queries(panel) + s * all_.piece_floats_);
      }
    }

    void pack_keys(int64_t tile) {
      const void* rows[kChunk];
      const int64_t first = all_.tiling_.first_cell(tile), past = all_.tiling_.past_cell(tile);
      for (int64_t s = 0; s < all_.sizes_.stride; ++s) {
        for (int64_t t = 0; t < kChunk; ++t) {
          const int64_t slot = (first + t) * all_.sizes_.stride + s;
          rows[t] = first + t < past && slot >= start_ && slot < end_
                        ? call_.k.row(b_, g_, slot, element_size(call_.dtype))
                        : nullptr;
        }
        all_.kernels_.pack_keys({rows, kChunk, call_.dim, all_.padded_, call_.dtype},
                                scratch_.keys.data() + s * all_.piece_floats_);
      }
    }

    void add_tile(int64_t panel, int64_t tile) {
      const int64_t first = all_.tiling_.first_cell(tile), past = all_.tiling_.past_cell(tile);
      uint64_t masks[kScoreRows];
      for (int64_t n = 0; n < rows_of(panel); ++n)
        masks[n] = bit_range(first_cell() - first, std::min(past, past_cell_[panel * kScoreRows + n]) - first);
      const float factor = call_.scale / static_cast<float>(all_.sizes_.stride) * kLog2E;
      const int64_t slot = slot_of(panel, tile) * kScoreRows;
      all_.kernels_.run_mass({queries(panel), scratch_.keys.data(), static_cast<int>(rows_of(panel)), all_.padded_,
                              factor, masks, scratch_.logits.data() + kLanes, static_cast<int>(all_.sizes_.stride)},
                             all_.tiling_.run, maximum_.data() + panel * kScoreRows, scratch_.references.data() + slot,
                             scratch_.sums.data() + slot * all_.tiling_.whole);
    }

    // visit(row, weight of its sums against its maximum, its sums, first block) for every tile and row of a panel.
    template <class Visit>
    void for_each_sum(int64_t panel, const Visit& visit) {
      for (int64_t tile = first_tile(); all_.tiling_.first_cell(tile) < past_of_panel(panel); ++tile) {
        const int64_t slot = slot_of(panel, tile) * kScoreRows;
        for (int64_t n = 0; n < rows_of(panel); ++n) {
          const float reference = scratch_.references[slot + n], top = maximum_[panel * kScoreRows + n];
          visit(n, reference == top ? 1.0f : std::exp2(reference - top),
                scratch_.sums.data() + (slot + n) * all_.tiling_.whole, all_.tiling_.first_block(tile));
        }
      }
    }

    void write(int64_t panel, float* out) {
      double totals[kScoreRows] = {};
      for_each_sum(panel, [&](int64_t n, float weight, const float* sums, int64_t) {
        float sum = 0.0f;
        for (int64_t t = 0; t < all_.tiling_.whole; ++t) sum += sums[t];
        totals[n] += double{weight} * sum;
      });
      for_each_sum(panel, [&](int64_t n, float weight, const float* sums, int64_t first) {
        if (totals[n] == 0.0) return;  // it sees nothing
        const float share = static_cast<float>(weight / totals[n]);
        float* row = out_row(out, panel * kScoreRows + n);
        const int64_t blocks = std::min(all_.tiling_.whole, all_.key_blocks_ - first);
        for (int64_t t = 0; t < blocks; ++t) row[first + t] += share * sums[t];
      });
    }

    const Antidiagonals& all_;
    const ScoreCall& call_;
    Scratch& scratch_;
    const int64_t b_, g_, first_, rows_, panels_, start_, end_;
    std::vector<int64_t> past_cell_;  // of each row
    std::vector<float> maximum_;
  };

  const ScoreCall& call_;
  const Antidiagonal& sizes_;
  const PlanningKernels& kernels_;
  const int padded_;
  const int64_t share_, row_cells_, key_blocks_;
  const Tiling tiling_;
  const int64_t piece_floats_, blocks_a_job_, panels_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void antidiagonal(const Kernels& kernels, const ScoreCall& call, const Antidiagonal& sizes, float* out) {
  if (call.query_len > 0 && call.key_len > 0) Antidiagonals(kernels, call, sizes).run(out);
}

}  // namespace gossamer
