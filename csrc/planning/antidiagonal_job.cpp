#include "planning/antidiagonal_job.h"

#include <cmath>

namespace gossamer {
namespace {

constexpr int64_t kRowsAJob = 256;  // rows of cells against which a tile of keys is packed once
constexpr int64_t kQueryBytesAJob = 4 << 20;

int64_t blocks_that_fit(int64_t rows_a_block, int64_t row_bytes) {
  return std::max<int64_t>(1, std::min(kRowsAJob / rows_a_block, kQueryBytesAJob / (rows_a_block * row_bytes)));
}

}  // namespace

AntidiagonalSetting::AntidiagonalSetting(const Kernels& kernels, const ScoreCall& call, const Part& part,
                                         int64_t stride)
    : call(call),
      part(part),
      stride(stride),
      kernels(*kernels.scores),
      padded_dim(padded(kernels, call.q.dim)),
      share(call.q.heads / call.k.heads),
      row_cells(part.block_q / stride),
      key_blocks(ceil_div(call.k.tokens, part.block_k)),
      tiling(key_blocks, part.block_k / stride),
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
      start_(call_.extent.key_start[b_]),
      end_(start_ + call_.extent.key_count[b_]),
      past_cell_(panels_ * kScoreRows, 0),
      maximum_(panels_ * kScoreRows, kNothing) {}

void AntidiagonalJob::score(float* out) {
  for (int64_t r = 0; r < rows_; r += all_.row_cells) {
    float* block = out_row(out, r);
    std::fill(block, block + all_.key_blocks, 0.0f);
  }
  for (int64_t r = 0; r < rows_; ++r) past_cell_[r] = past_cell_of(r);
  const int64_t past = *std::max_element(past_cell_.begin(), past_cell_.end());
  if (past <= first_cell()) return;
  for (int64_t panel = 0; panel < panels_; ++panel) pack_queries(panel);
  for (int64_t tile = first_tile(); tile <= all_.tiling.of_cell(past - 1); ++tile) {
    pack_keys(tile);
    for (int64_t panel = 0; panel < panels_; ++panel)
      if (past_of_panel(panel) > all_.tiling.first_cell(tile)) add_tile(panel, tile);
  }
  for (int64_t panel = 0; panel < panels_; ++panel) write(panel, out);
}

float* AntidiagonalJob::out_row(float* out, int64_t r) const {
  const int64_t blocks = all_.part.size();
  return out + ((b_ * call_.q.heads + head(r)) * blocks + block(r) - all_.part.first) * all_.key_blocks;
}

// A row of cells sees those whose first live key is at or before the position of its last query.
int64_t AntidiagonalJob::past_cell_of(int64_t r) const {
  if (query(r) >= call_.q.tokens || start_ == end_) return 0;
  const int64_t last =
      std::min(query(r) + all_.stride, call_.q.tokens) - 1 + call_.extent.query_start[b_];
  return last < 0 ? 0 : std::min(ceil_div(end_, all_.stride), (last + start_) / all_.stride + 1);
}
int64_t AntidiagonalJob::past_of_panel(int64_t panel) const {
  const auto begin = past_cell_.begin() + panel * kScoreRows;
  return *std::max_element(begin, begin + kScoreRows);
}

// Piece s holds the queries that meet the cells' keys s: the last query meets the first key.
void AntidiagonalJob::pack_queries(int64_t panel) {
  const void* rows[kScoreRows];
  const int64_t live = -call_.extent.query_start[b_];
  for (int64_t s = 0; s < all_.stride; ++s) {
    for (int64_t n = 0; n < rows_of(panel); ++n) {
      const int64_t r = panel * kScoreRows + n, row = query(r) + all_.stride - 1 - s;
      rows[n] = row >= live && row < call_.q.tokens
                    ? call_.q.row(b_, head(r), row)
                    : nullptr;
    }
    all_.kernels.pack_queries({rows, static_cast<int>(rows_of(panel)), call_.q.dim, all_.padded_dim, call_.q.dtype},
                               queries(panel) + s * all_.piece_floats);
  }
}

void AntidiagonalJob::pack_keys(int64_t tile) {
  const void* rows[kChunk];
  const int64_t first = all_.tiling.first_cell(tile), past = all_.tiling.past_cell(tile);
  for (int64_t s = 0; s < all_.stride; ++s) {
    for (int64_t t = 0; t < kChunk; ++t) {
      const int64_t slot = (first + t) * all_.stride + s;
      rows[t] = first + t < past && slot >= start_ && slot < end_
                    ? call_.k.row(b_, group_, slot)
                    : nullptr;
    }
    all_.kernels.pack_keys({rows, kChunk, call_.q.dim, all_.padded_dim, call_.q.dtype},
                            scratch_.keys.data() + s * all_.piece_floats);
  }
}

void AntidiagonalJob::add_tile(int64_t panel, int64_t tile) {
  const int64_t first = all_.tiling.first_cell(tile), past = all_.tiling.past_cell(tile);
  uint64_t masks[kScoreRows];
  for (int64_t n = 0; n < rows_of(panel); ++n)
    masks[n] = bit_range(first_cell() - first, std::min(past, past_cell_[panel * kScoreRows + n]) - first);
  const float factor = call_.scale / static_cast<float>(all_.stride) * kLog2E;
  const int64_t slot = slot_of(panel, tile) * kScoreRows;
  all_.kernels.run_mass({queries(panel), scratch_.keys.data(), static_cast<int>(rows_of(panel)), all_.padded_dim,
                          factor, masks, scratch_.logits.data() + kLanes, static_cast<int>(all_.stride)},
                         all_.tiling.run, maximum_.data() + panel * kScoreRows, scratch_.references.data() + slot,
                         scratch_.sums.data() + slot * all_.tiling.whole);
}

// visit(row, weight of its sums against its maximum, its sums, first block) for every tile and row of a panel.
template <class Visit>
void AntidiagonalJob::for_each_sum(int64_t panel, const Visit& visit) {
  for (int64_t tile = first_tile(); all_.tiling.first_cell(tile) < past_of_panel(panel); ++tile) {
    const int64_t slot = slot_of(panel, tile) * kScoreRows;
    for (int64_t n = 0; n < rows_of(panel); ++n) {
      const float reference = scratch_.references[slot + n], top = maximum_[panel * kScoreRows + n];
      visit(n, reference == top ? 1.0f : std::exp2(reference - top),
            scratch_.sums.data() + (slot + n) * all_.tiling.whole, all_.tiling.first_block(tile));
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
