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

Range AntidiagonalSetting::tiles_of(Range cells) const {
  if (cells.empty()) return {0, 0};
  return {tiling.of_cell(cells.begin), tiling.of_cell(cells.end - 1) + 1};
}

Range AntidiagonalSetting::tiles_seen(int64_t b) const {
  Range queries{0, 0};
  for (int64_t m = part.first; m < part.stop; ++m) {
    const Range own = grid.queries(b, m);
    if (!own.empty()) queries = queries.empty() ? own : Range{queries.begin, own.end};
  }
  return tiles_of(cells.blocks_of(grid.extent.keys_of(b, queries)));
}

void AntidiagonalSetting::pack_keys(int64_t b, int64_t group, int64_t tile, AntidiagonalScratch& scratch,
                                    float* to) const {
  const void* rows[kChunk];
  const int64_t first = tiling.first_cell(tile), past = tiling.past_cell(tile);
  const int64_t begin = first * stride, end = std::min(past * stride, call.extent.key_count[b]);
  EvenRows given{nullptr, 0};
  if (begin < end)
    given = call.k.consecutive(kernels, b, group, call.extent.key_slot(b, begin), end - begin, scratch.rows.data());
  for (int64_t s = 0; s < stride; ++s) {
    for (int64_t t = 0; t < kChunk; ++t) {
      const int64_t position = (first + t) * stride + s;
      rows[t] = position < end ? given.first + (position - begin) * given.stride : nullptr;
    }
    kernels.pack_keys({rows, kChunk, call.q.dim, padded_dim, call.q.dtype}, to + s * piece_floats);
  }
}

AntidiagonalScratch::AntidiagonalScratch(const AntidiagonalSetting& all)
    : keys(all.tile_floats()),
      rows(all.call.k.paged() ? kChunk * all.stride * all.call.k.row_bytes() : 0),
      queries(all.panels * all.stride * all.piece_floats),
      logits(kLanes + kScoreRows * kScorePitch),
      sums(all.panels * all.tiling.count * kScoreRows * all.tiling.whole),
      references(all.panels * all.tiling.count * kScoreRows),
      peaks(all.key_blocks) {}

AntidiagonalJob::AntidiagonalJob(const AntidiagonalSetting& all, AntidiagonalScratch& scratch, int64_t group,
                                 int64_t first, int64_t stop, const float* keys)
    : all_(all),
      call_(all.call),
      scratch_(scratch),
      b_(group / all.call.k.heads),
      group_(group % all.call.k.heads),
      first_(first),
      rows_((stop - first) * all.share * all.row_cells),
      panels_(ceil_div(rows_, kScoreRows)),
      live_{call_.extent.first_position(b_), call_.extent.first_position(b_) + call_.extent.query_count[b_]},
      keys_(keys),
      maximum_(panels_ * kScoreRows, kNothing) {
  for (int64_t r = 0; r < rows_; ++r) seen_.push_back(seen_by(r));
  for (int64_t panel = 0; panel < panels_; ++panel) panel_tiles_.push_back(all_.tiles_of(cells_of(panel)));
}

void AntidiagonalJob::score(float* out) {
  for (int64_t r = 0; r < rows_; r += all_.row_cells)
    std::fill_n(out + out_row(r) * all_.key_blocks, all_.key_blocks, 0.0f);
  for_each_tile([&](int64_t panel, int64_t tile, const ScorePanel& logits) {
    const int64_t place = place_of(panel, tile);
    all_.kernels.run_mass(logits, all_.tiling.run, maximum_.data() + panel * kScoreRows,
                          scratch_.references.data() + place, scratch_.sums.data() + place * all_.tiling.whole);
  });
  for (int64_t panel = 0; panel < panels_; ++panel) write(panel, out);
}

void AntidiagonalJob::score_peaks(const PeakScores& out) {
  for (int64_t r = 0; r < rows_; r += all_.row_cells) {
    std::fill_n(out.sums + out_row(r) * all_.key_blocks, all_.key_blocks, 0.0f);
    std::fill_n(out.attained + out_row(r) * all_.key_blocks, all_.key_blocks, uint8_t{0});
  }
  for_each_tile([&](int64_t panel, int64_t tile, const ScorePanel& logits) {
    all_.kernels.run_maxima(logits, all_.tiling.run, scratch_.sums.data() + place_of(panel, tile) * all_.tiling.whole);
  });
  for (int64_t panel = 0; panel < panels_; ++panel) write_peaks(panel, out);
}

// Of [batch, heads, part].
int64_t AntidiagonalJob::out_row(int64_t r) const {
  return (b_ * call_.q.heads + head(r)) * all_.part.size() + block(r) - all_.part.first;
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

template <class Visit>
void AntidiagonalJob::for_each_tile(const Visit& visit) {
  Range tiles{all_.tiling.count, 0};
  for (int64_t panel = 0; panel < panels_; ++panel) {
    if (panel_tiles_[panel].empty()) continue;
    pack_queries(panel);
    tiles = {std::min(tiles.begin, panel_tiles_[panel].begin), std::max(tiles.end, panel_tiles_[panel].end)};
  }
  const float factor = call_.scale / static_cast<float>(all_.stride) * kLog2E;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    if (keys_ == nullptr) all_.pack_keys(b_, group_, tile, scratch_, scratch_.keys.data());
    const float* keys = keys_ == nullptr ? scratch_.keys.data() : keys_ + tile * all_.tile_floats();
    const int64_t first = all_.tiling.first_cell(tile), past = all_.tiling.past_cell(tile);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      if (tile < panel_tiles_[panel].begin || tile >= panel_tiles_[panel].end) continue;
      const int count = static_cast<int>(rows_of(panel));
      uint64_t masks[kScoreRows];
      for (int64_t n = 0; n < count; ++n) {
        const Range& seen = seen_[panel * kScoreRows + n];
        masks[n] = bit_range(seen.begin - first, std::min(past, seen.end) - first);
      }
      visit(panel, tile, ScorePanel{queries(panel), keys, count, all_.padded_dim, factor, masks,
                                    scratch_.logits.data() + kLanes, static_cast<int>(all_.stride)});
    }
  }
}

// visit(row, weight of its sums against its maximum, its sums, first block) for every tile and row of a panel. The
// reference of a row seldom changes from tile to tile.
template <class Visit>
void AntidiagonalJob::for_each_sum(int64_t panel, const Visit& visit) {
  float references[kScoreRows], weights[kScoreRows];
  std::fill_n(references, kScoreRows, kNothing);
  std::fill_n(weights, kScoreRows, 0.0f);
  for (int64_t tile = panel_tiles_[panel].begin; tile < panel_tiles_[panel].end; ++tile) {
    const int64_t place = place_of(panel, tile);
    for (int64_t n = 0; n < rows_of(panel); ++n) {
      const float reference = scratch_.references[place + n], top = maximum_[panel * kScoreRows + n];
      if (reference != references[n]) {
        references[n] = reference;
        weights[n] = reference == top ? 1.0f : std::exp2(reference - top);
      }
      if (weights[n] == 0.0f) continue;
      visit(n, weights[n], scratch_.sums.data() + (place + n) * all_.tiling.whole, all_.tiling.first_block(tile));
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
    float* row = out + out_row(panel * kScoreRows + n) * all_.key_blocks;
    const int64_t blocks = std::min(all_.tiling.whole, all_.key_blocks - first);
    for (int64_t t = 0; t < blocks; ++t) row[first + t] += share * sums[t];
  });
}

// A block may lie in several tiles.
void AntidiagonalJob::write_peaks(int64_t panel, const PeakScores& out) {
  const Range tiles = panel_tiles_[panel];
  if (tiles.empty()) return;
  std::vector<float>& peaks = scratch_.peaks;
  const int64_t begin = all_.tiling.first_block(tiles.begin);
  const int64_t end = std::min(all_.key_blocks, all_.tiling.first_block(tiles.end - 1) + all_.tiling.whole);
  for (int64_t n = 0; n < rows_of(panel); ++n) {
    std::fill(peaks.begin() + begin, peaks.begin() + end, kNothing);
    float top = kNothing;
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const float* own = scratch_.sums.data() + (place_of(panel, tile) + n) * all_.tiling.whole;
      const int64_t first = all_.tiling.first_block(tile);
      for (int64_t t = 0; t < std::min(all_.tiling.whole, all_.key_blocks - first); ++t) {
        peaks[first + t] = std::max(peaks[first + t], own[t]);
        top = std::max(top, own[t]);
      }
    }
    if (top == kNothing) continue;  // it sees nothing
    const int64_t place = out_row(panel * kScoreRows + n) * all_.key_blocks + begin;
    all_.kernels.add_peaks(peaks.data() + begin, end - begin, top, std::nextafter(out.near, kNothing),
                           out.sums + place, out.attained + place);
  }
}

}  // namespace gossamer
