#include "attend/packed.h"

#include <algorithm>
#include <cmath>

#include "attend/packed_worker.h"
#include "runtime/budgets.h"
#include "runtime/parallel.h"
#include "runtime/workspace.h"

namespace gossamer {
namespace {

// Where queries are as many as keys, some query block lists nearly every key; where they are fewer, as in a chunk of a
// long prompt, it pays to look which chunks are needed at all.
bool few_queries(const Extent& extent, int64_t b) { return extent.query_count[b] <= extent.key_count[b] / 2; }

// Gathered keys, of all keys, from which on all are laid out as rows first.
constexpr int64_t kGatheredShare = 8;

}  // namespace

PackedKeys::PackedKeys(const Operands& operands, const std::vector<int64_t>& batch_rows)
    : operands(operands), first_heads_(operands.plan.batch()), log_lengths_(operands.plan.batch()) {
  const Plan& plan = operands.plan;
  // A permutation of the keys belongs to a head of the plan; else keys are packed once for each key/value head.
  const int64_t packed_heads = plan.k_order != nullptr ? plan.heads : operands.call.k.heads;
  const int64_t share = plan.heads / packed_heads;
  int64_t tiles = 0;
  for (const int64_t b : batch_rows) {
    first_heads_[b] = static_cast<int64_t>(heads.size());
    const bool shares = shares_columns(b, packed_heads);
    const int64_t mean_tiles = plan.pruned_mean ? measure_blocks(b) : 0;
    for (int64_t head = 0; head < packed_heads; ++head) {
      heads.push_back({b, head * share, share, tiles, operands.chunks(b), 0, shares, mean_tiles});
      if (shares) place_columns(heads.back());
      place_rows(heads.back());
      tiles += heads.back().tiles();
    }
  }
  if (plan.k_order != nullptr) bound_chunks();
}

void PackedKeys::bound_chunks() {
  const Plan& plan = operands.plan;
  bounds_.resize(heads.size());
  run_parallel(operands.call.threads, static_cast<int64_t>(heads.size()), [&](int, int64_t n) {
    const int32_t* positions = plan.key_ranks(heads[n].b, heads[n].first_plan_head);
    for (int64_t first = 0; first < plan.key_len; first += kChunk) {
      const auto [lowest, highest] =
          std::minmax_element(positions + first, positions + std::min(plan.key_len, first + kChunk));
      bounds_[n].push_back({*lowest, *highest});
    }
  });
}

int64_t PackedKeys::head_of(int64_t b, int64_t plan_head) const {
  return first_heads_[b] + (operands.plan.k_order != nullptr ? plan_head : operands.group_of(plan_head));
}

// A column list that several query blocks share is packed once, unless all lists of a batch row together take more room
// than its keys; else each query block gathers what it needs. The two make tiles of other keys, so that sums differ in
// their order: hence a batch row decides by itself.
bool PackedKeys::shares_columns(int64_t b, int64_t packed_heads) const {
  const Plan& plan = operands.plan;
  const int64_t blocks = plan.row_blocks(b);
  if (std::min(plan.column_group, blocks) <= 1 || plan.k_order != nullptr) return false;
  int64_t tiles = 0;
  for (int64_t h = 0; h < plan.heads; ++h)
    for (int64_t m = 0; m < blocks; m += plan.column_group) tiles += column_tiles(plan.column_list(b, h, m));
  return tiles <= packed_heads * operands.chunks(b) && tiles * operands.tile_bytes() <= kColumnBytes;
}

void PackedKeys::place_columns(PackedHead& head) {
  const Plan& plan = operands.plan;
  column_starts_.resize(plan.batch() * plan.heads * plan.column_groups());
  const int64_t live = ceil_div(plan.row_blocks(head.b), plan.column_group);
  for (int64_t h = head.first_plan_head; h < head.first_plan_head + head.plan_heads; ++h)
    for (int64_t group = 0; group < plan.column_groups(); ++group) {
      const int64_t list = plan.column_list(head.b, h, group * plan.column_group);
      column_starts_[list] = head.column_tiles;
      if (group < live) head.column_tiles += column_tiles(list);
    }
}

// A single key of a page that does not hold it as a row costs as much as some dozen neighbours. Where a head gathers
// enough of them, as rows of all its keys cost less.
void PackedKeys::place_rows(PackedHead& head) const {
  const Plan& plan = operands.plan;
  if (operands.call.k.in_rows() || plan.columns.count == 0) return;
  const int64_t blocks = plan.row_blocks(head.b), step = head.shares_columns ? plan.column_group : 1;
  const int64_t keys = plan.extent().key_count[head.b];
  int64_t gathered = 0;
  for (int64_t h = head.first_plan_head; h < head.first_plan_head + head.plan_heads; ++h)
    for (int64_t m = 0; m < blocks; m += step) gathered += plan.columns.row(plan.column_list(head.b, h, m)).size();
  if (gathered < keys / kGatheredShare) return;
  const int64_t bytes = plan.extent().key_slot(head.b, keys) * operands.call.k.row_bytes();
  head.row_tiles = ceil_div(bytes, operands.tile_bytes());
}

Tokens PackedKeys::keys_of(const PackedHead& head) const {
  const Tokens& k = operands.call.k;
  if (head.row_tiles == 0) return k;
  return TensorView{rows(head), k.batch, k.heads, k.tokens, k.dim, 0, 0, k.row_bytes(), k.dtype};
}

// Returns how many tiles of means there are.
int64_t PackedKeys::measure_blocks(int64_t b) {
  const int64_t keys = operands.plan.extent().key_count[b], block_k = operands.plan.grid.block_k;
  const int64_t blocks = ceil_div(keys, block_k), tiles = ceil_div(blocks, kChunk);
  log_lengths_[b].assign(static_cast<size_t>(tiles * kChunk), 0.0f);
  for (int64_t n = 0; n < blocks; ++n)
    log_lengths_[b][static_cast<size_t>(n)] = std::log2(static_cast<float>(std::min(block_k, keys - n * block_k)));
  return tiles;
}

int64_t PackedKeys::first_column_tile(const PackedHead& head, int64_t list) const {
  return head.first_tile + head.chunks + column_starts_[list];
}

std::pair<int64_t, int64_t> PackedKeys::list_of_column_tile(const PackedHead& head, int64_t column_tile) const {
  const Plan& plan = operands.plan;
  const auto begin = column_starts_.begin() + plan.column_list(head.b, head.first_plan_head, 0);
  const auto after = std::upper_bound(begin, begin + head.plan_heads * plan.column_groups(), column_tile);
  return {after - 1 - column_starts_.begin(), column_tile - *(after - 1)};
}

PackedExecution::PackedExecution(const Operands& operands, const std::vector<int64_t>& batch_rows)
    : o_(operands), keys_(operands, batch_rows) {
  divide_into_passes();
}

PackedExecution::~PackedExecution() = default;

void PackedExecution::run() {
  int64_t most_tiles = 0;
  for (const Pass& pass : passes_) most_tiles = std::max(most_tiles, pass.tiles);
  const int threads = static_cast<int>(std::clamp<int64_t>(o_.call.threads, 1, most_jobs()));
  const int64_t scratch_bytes = panel_scratch_bytes(o_.padded_dim, o_.padded_value_dim);
  const int64_t most_chunks = o_.most_chunks();
  KeptBuffer buffer;
  char* base = buffer.reserve(threads * scratch_bytes + most_tiles * o_.tile_bytes());
  for (int t = 0; t < threads; ++t, base += scratch_bytes)
    workers_.push_back(std::make_unique<PackedWorker>(keys_, most_chunks, base));
  keys_.base = o_.tiles(base);
  for (const Pass& pass : passes_) {
    keys_.first_tile = keys_.heads[pass.first_head].first_tile;
    copy_rows(pass);
    pack(pass);
    run_parallel(threads, static_cast<int64_t>(pass.items.size()), [&](int thread, int64_t n) {
      workers_[thread]->attend(pass.items[static_cast<size_t>(n)].rows);
    });
  }
}

void PackedExecution::divide_into_passes() {
  const int64_t most_tiles = kPackBytes / o_.tile_bytes();
  const int64_t heads = static_cast<int64_t>(keys_.heads.size());
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t tiles = keys_.heads[head].tiles();
    if (passes_.empty() || passes_.back().tiles + tiles > most_tiles) passes_.push_back({head, head, 0, {}});
    Pass& pass = passes_.back();
    pass.stop_head = head + 1;
    pass.tiles += tiles;
    add_items(head, pass.items);
  }
  // The longest first: the threads end together.
  for (Pass& pass : passes_)
    std::stable_sort(pass.items.begin(), pass.items.end(),
                     [](const WorkItem& a, const WorkItem& z) { return a.cost > z.cost; });
}

void PackedExecution::add_items(int64_t packed_head, std::vector<WorkItem>& items) const {
  const Plan& plan = o_.plan;
  const PackedHead& head = keys_.heads[packed_head];
  const int64_t share = o_.heads_a_plan_head;
  const int64_t rows_at_once = std::min<int64_t>(plan.grid.block_q, kMaxRows);
  const int64_t heads_at_once = std::max<int64_t>(1, std::min(share, kMaxRows / rows_at_once));
  for (int64_t h = head.first_plan_head; h < head.first_plan_head + head.plan_heads; ++h)
    for (int64_t m = 0; m < plan.row_blocks(head.b); ++m) {
      const int64_t keys = listed_keys(plan, head.b, h, m);
      const Range rows = plan.rows(head.b, m);
      for (int64_t first = rows.begin; first < rows.end; first += kMaxRows)
        for (int64_t query_head = 0; query_head < share; query_head += heads_at_once) {
          const int64_t heads = std::min(heads_at_once, share - query_head);
          const int64_t count = std::min<int64_t>(kMaxRows, rows.end - first);
          items.push_back({keys * count * heads,
                           {int32_t(head.b), int32_t(h), int32_t(m), int32_t(h * share + query_head), int32_t(heads),
                            int32_t(first), int32_t(count)}});
        }
    }
}

int64_t PackedExecution::most_jobs() const {
  int64_t most = 1;
  for (const Pass& pass : passes_) most = std::max({most, pass.tiles, static_cast<int64_t>(pass.items.size())});
  return most;
}

void PackedExecution::copy_rows(const Pass& pass) {
  std::vector<std::pair<const PackedHead*, int64_t>> jobs;
  for (int64_t n = pass.first_head; n < pass.stop_head; ++n)
    for (int64_t chunk = 0; keys_.heads[n].row_tiles > 0 && chunk < keys_.heads[n].chunks; ++chunk)
      jobs.push_back({&keys_.heads[n], chunk});
  run_parallel(static_cast<int>(workers_.size()), static_cast<int64_t>(jobs.size()), [&](int, int64_t n) {
    const PackedHead& head = *jobs[n].first;
    const Tokens& k = o_.call.k;
    const Extent& extent = o_.plan.extent();
    const int64_t first = jobs[n].second * kChunk, slot = extent.key_slot(head.b, first);
    k.consecutive(*o_.kernels.scores, head.b, o_.group_of(head.first_plan_head), slot,
                  std::min<int64_t>(kChunk, extent.key_count[head.b] - first),
                  keys_.rows(head) + slot * k.row_bytes());
  });
}

// Tiles of columns and means, and the chunks that some query block lists.
void PackedExecution::pack(const Pass& pass) {
  list_needed(pass);
  run_parallel(static_cast<int>(workers_.size()), static_cast<int64_t>(needed_.size()),
               [&](int thread, int64_t n) { workers_[thread]->pack_tile(needed_[n]); });
}

void PackedExecution::list_needed(const Pass& pass) {
  marks_.assign(pass.tiles, 1);
  run_parallel(static_cast<int>(workers_.size()), pass.stop_head - pass.first_head, [&](int thread, int64_t n) {
    const PackedHead& head = keys_.heads[pass.first_head + n];
    std::fill_n(marks_.data() + head.first_row_tile() - keys_.first_tile, head.row_tiles, 0);
    if (!few_queries(o_.plan.extent(), head.b)) return;
    char* marks = marks_.data() + head.first_tile - keys_.first_tile;
    std::fill(marks, marks + head.chunks, 0);
    workers_[thread]->mark_chunks(head, marks);
  });
  needed_.clear();
  for (int64_t n = 0; n < pass.tiles; ++n)
    if (marks_[n] != 0) needed_.push_back(keys_.first_tile + n);
}

}  // namespace gossamer
