#include "planning/antidiagonal_job.h"

#include <cmath>

#include "runtime/budgets.h"

namespace gossamer {
namespace {

int64_t blocks_that_fit(int64_t rows_a_block, int64_t row_bytes) {
  return std::max<int64_t>(1, std::min(kCellRows / rows_a_block, kCellBytes / (rows_a_block * row_bytes)));
}

}  // namespace

AntidiagonalSetting::AntidiagonalSetting(const Kernels& kernels, const ScoreCall& call, const Grid& grid,
                                         int64_t stride, const Part& part, int64_t key_blocks)
    : call(call),
      grid(grid),
      cells{grid.extent, stride, stride},
      part(part),
      stride(stride),
      kernels(*kernels.scores),
      padded_dim(padded(kernels, call.q.dim)),
      share(call.q.heads / call.k.heads),
      row_cells(grid.block_q / stride),
      key_blocks(key_blocks),
      tiling(key_blocks, grid.block_k / stride),
      piece_floats(kChunk * padded_dim / (kernels.bf16_tiles ? 2 : 1)),
      blocks_a_job(blocks_that_fit(share * row_cells, stride * piece_floats / kChunk * 4)),
      panels(ceil_div(blocks_a_job * share * row_cells, kScoreRows)) {}

AntidiagonalScratch::AntidiagonalScratch(const AntidiagonalSetting& all)
    : keys(all.stride * all.piece_floats),
      queries(all.panels * all.stride * all.piece_floats),
      logits(kLanes + kScoreRows * kScorePitch),
      sums(all.panels * all.tiling.count * kScoreRows * all.tiling.whole),
      references(all.panels * all.tiling.count * kScoreRows) {}

AntidiagonalJob::AntidiagonalJob(const AntidiagonalSetting& all, AntidiagonalScratch& scratch, int64_t group,
                                 int64_t first, int64_t stop)
    : all_(all),
      call_(all.call),
      scratch_(scratch),
      b_(group / all.call.k.heads),
      group_(group % all.call.k.heads),
      first_(first),
      rows_((stop - first) * all.share * all.row_cells),
      panels_(ceil_div(rows_, kScoreRows)),
      live_{call_.extent.first_position(b_), call_.extent.first_position(b_) + call_.extent.query_count[b_]},
      maximum_(panels_ * kScoreRows, kNothing) {
  for (int64_t r = 0; r < rows_; ++r) seen_.push_back(seen_by(r));
  for (int64_t panel = 0; panel < panels_; ++panel) panel_tiles_.push_back(tiles_of(cells_of(panel)));
}

void AntidiagonalJob::score(float* out) {
  for (int64_t r = 0; r < rows_; r += all_.row_cells) {
    float* block = out_row(out, r);
    std::fill(block, block + all_.key_blocks, 0.0f);
  }
  Range tiles{all_.tiling.count, 0};
  for (int64_t panel = 0; panel < panels_; ++panel) {
    if (panel_tiles_[panel].empty()) continue;
    pack_queries(panel);
    tiles = {std::min(tiles.begin, panel_tiles_[panel].begin), std::max(tiles.end, panel_tiles_[panel].end)};
  }
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    pack_keys(tile);
    for (int64_t panel = 0; panel < panels_; ++panel)
      if (tile >= panel_tiles_[panel].begin && tile < panel_tiles_[panel].end) add_tile(panel, tile);
  }
  for (int64_t panel = 0; panel < panels_; ++panel) write(panel, out);
}

float* AntidiagonalJob::out_row(float* out, int64_t r) const {
  return out + ((b_ * call_.q.heads + head(r)) * all_.part.size() + block(r) - all_.part.first) * all_.key_blocks;
}

// A row of cells sees the cells of which some query of it may attend any key.
Range AntidiagonalJob::seen_by(int64_t r) const {
  const Range queries{std::max(query(r), live_.begin), std::min(query(r) + all_.stride, live_.end)};
  return all_.cells.blocks_of(call_.extent.keys_of(b_, queries));
}

Range AntidiagonalJob::cells_of(int64_t panel) const {
  Range cells{0, 0};
  for (int64_t r = panel * kScoreRows; r < panel * kScoreRows + rows_of(panel); ++r) {
    if (seen_[r].empty()) continue;
    cells = cells.empty() ? seen_[r]
                          : Range{std::min(cells.begin, seen_[r].begin), std::max(cells.end, seen_[r].end)};
  }
  return cells;
}

Range AntidiagonalJob::tiles_of(Range cells) const {
  if (cells.empty()) return {0, 0};
  return {all_.tiling.of_cell(cells.begin), all_.tiling.of_cell(cells.end - 1) + 1};
}

// Piece s holds the queries that meet the cells' keys s: the last query meets the first key. Dead ones count as zeros.
void AntidiagonalJob::pack_queries(int64_t panel) {
  const void* rows[kScoreRows];
  const int count = static_cast<int>(rows_of(panel));
  for (int64_t s = 0; s < all_.stride; ++s) {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t r = panel * kScoreRows + n, position = query(r) + all_.stride - 1 - s;
      const bool live = position >= live_.begin && position < live_.end;
      rows[n] = live ? call_.q.row(b_, head(r), call_.extent.query_row(b_, position)) : nullptr;
    }
    all_.kernels.pack_queries({rows, count, call_.q.dim, all_.padded_dim, call_.q.dtype},
                              queries(panel) + s * all_.piece_floats);
  }
}

void AntidiagonalJob::pack_keys(int64_t tile) {
  const void* rows[kChunk];
  const int64_t first = all_.tiling.first_cell(tile), past = all_.tiling.past_cell(tile);
  for (int64_t s = 0; s < all_.stride; ++s) {
    for (int64_t t = 0; t < kChunk; ++t) {
      const int64_t position = (first + t) * all_.stride + s;
      const bool live = first + t < past && position < call_.extent.key_count[b_];
      rows[t] = live ? call_.k.row(b_, group_, call_.extent.key_slot(b_, position)) : nullptr;
    }
    all_.kernels.pack_keys({rows, kChunk, call_.q.dim, all_.padded_dim, call_.q.dtype},
                           scratch_.keys.data() + s * all_.piece_floats);
  }
}

void AntidiagonalJob::add_tile(int64_t panel, int64_t tile) {
  const int64_t first = all_.tiling.first_cell(tile), past = all_.tiling.past_cell(tile);
  const int count = static_cast<int>(rows_of(panel));
  uint64_t masks[kScoreRows];
  for (int64_t n = 0; n < count; ++n) {
    const Range& seen = seen_[panel * kScoreRows + n];
    masks[n] = bit_range(seen.begin - first, std::min(past, seen.end) - first);
  }
  const float factor = call_.scale / static_cast<float>(all_.stride) * kLog2E;
  const int64_t place = place_of(panel, tile);
  all_.kernels.run_mass({queries(panel), scratch_.keys.data(), count, all_.padded_dim, factor, masks,
                         scratch_.logits.data() + kLanes, static_cast<int>(all_.stride)},
                        all_.tiling.run, maximum_.data() + panel * kScoreRows, scratch_.references.data() + place,
                        scratch_.sums.data() + place * all_.tiling.whole);
}

// visit(row, weight of its sums against its maximum, its sums, first block) for every tile and row of a panel.
template <class Visit>
void AntidiagonalJob::for_each_sum(int64_t panel, const Visit& visit) {
  for (int64_t tile = panel_tiles_[panel].begin; tile < panel_tiles_[panel].end; ++tile) {
    const int64_t place = place_of(panel, tile);
    for (int64_t n = 0; n < rows_of(panel); ++n) {
      const float reference = scratch_.references[place + n], top = maximum_[panel * kScoreRows + n];
      visit(n, reference == top ? 1.0f : std::exp2(reference - top),
            scratch_.sums.data() + (place + n) * all_.tiling.whole, all_.tiling.first_block(tile));
    }
  }
}

void AntidiagonalJob::write(int64_t panel, float* out) {
  double totals[kScoreRows] = {};
  for_each_sum(panel, [&](int64_t n, float weight, const float* sums, int64_t) {
    float sum = 0.0f;
    for (int64_t t = 0; t < all_.tiling.whole; ++t) sum += sums[t];
    totals[n] += double{weight} * sum;
  });
  for_each_sum(panel, [&](int64_t n, float weight, const float* sums, int64_t first) {
    if (totals[n] == 0.0) return;  // it sees nothing
    const float share = static_cast<float>(weight / totals[n]);
    float* row = out_row(out, panel * kScoreRows + n);
    const int64_t blocks = std::min(all_.tiling.whole, all_.key_blocks - first);
    for (int64_t t = 0; t < blocks; ++t) row[first + t] += share * sums[t];
  });
}

}  // namespace gossamer
