// Attention mass of blocks by the antidiagonals of cells: a cell pairs `stride` queries with `stride` keys, and its
// logit is the sum of `stride` products, one for each piece of the packed queries and keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"

namespace gossamer {

// Key cells in tiles of at most 64. A tile holds whole blocks, or a part of one.
struct CellTiling {
  CellTiling(int64_t blocks, int64_t cells)
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

struct AntidiagonalScratch;

// What all jobs of a call share.
struct AntidiagonalSetting {
  AntidiagonalSetting(const Kernels& kernels, const ScoreCall& call, const Grid& grid, int64_t stride,
                      const Part& part, int64_t key_blocks);

  int64_t tile_floats() const { return stride * piece_floats; }
  // Tiles that hold key cells; and those that some query block of the part sees.
  Range tiles_of(Range cells) const;
  Range tiles_seen(int64_t b) const;
  void pack_keys(int64_t b, int64_t group, int64_t tile, AntidiagonalScratch& scratch, float* to) const;

  const ScoreCall& call;
  const Grid& grid;
  const Grid cells;
  const Part& part;
  const int64_t stride;
  const ScoreKernels& kernels;
  const int padded_dim;
  const int64_t share;  // query heads that share a key/value head
  const int64_t row_cells, key_blocks;
  const CellTiling tiling;
  const int64_t piece_floats, blocks_a_job, panels;
};

// What a thread keeps from job to job.
struct AntidiagonalScratch {
  explicit AntidiagonalScratch(const AntidiagonalSetting& all);

  Aligned keys;  // of a tile, where a job packs them for itself
  std::vector<char> rows;  // of a tile, where they have to be copied
  Aligned queries, logits;
  // Of each panel, tile and row: a sum, or a maximum, for each block of the tile, and the sums' common reference.
  std::vector<float> sums, references;
  std::vector<float> peaks;  // of a row: its blocks' largest logits
};

// Plan rows [first, stop) in the heads that share a key/value head: rows of cells by query block, head and cell.
class AntidiagonalJob {
 public:
  // `keys` are all tiles of the key/value head, packed; null: the job packs them one by one.
  AntidiagonalJob(const AntidiagonalSetting& all, AntidiagonalScratch& scratch, int64_t group, int64_t first,
                  int64_t stop, const float* keys);

  void score(float* out);
  void score_peaks(const PeakScores& out);

 private:
  int64_t head(int64_t r) const { return group_ * all_.share + r / all_.row_cells % all_.share; }
  int64_t block(int64_t r) const { return first_ + r / all_.row_cells / all_.share; }
  // Position of the first query of a cell, alive or not.
  int64_t query(int64_t r) const {
    return (all_.grid.first_block(b_) + block(r)) * all_.grid.block_q + r % all_.row_cells * all_.stride;
  }
  int64_t rows_of(int64_t panel) const { return std::min<int64_t>(kScoreRows, rows_ - panel * kScoreRows); }
  // Key cells that some row of a panel sees; and the tiles that hold them.
  Range cells_of(int64_t panel) const;
  int64_t place_of(int64_t panel, int64_t tile) const { return (panel * all_.tiling.count + tile) * kScoreRows; }
  float* queries(int64_t panel) const { return scratch_.queries.data() + panel * all_.stride * all_.piece_floats; }
  int64_t out_row(int64_t r) const;
  Range seen_by(int64_t r) const;

  void pack_queries(int64_t panel);
  // visit(panel, tile, its logits' panel) for each tile that a panel sees.
  template <class Visit>
  void for_each_tile(const Visit& visit);
  template <class Visit>
  void for_each_sum(int64_t panel, const Visit& visit);
  void write(int64_t panel, float* out);
  void write_peaks(int64_t panel, const PeakScores& out);

  const AntidiagonalSetting& all_;
  const ScoreCall& call_;
  AntidiagonalScratch& scratch_;
  const int64_t b_, group_, first_, rows_, panels_;
  const Range live_;                // positions of queries
  const float* keys_;
  std::vector<Range> seen_;         // of each row: key cells
  std::vector<Range> panel_tiles_;  // of each panel
  std::vector<float> maximum_;
};

}  // namespace gossamer
