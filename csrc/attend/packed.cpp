#include "attend/packed.h"

#include <algorithm>

#include "attend/packed_worker.h"
#include "runtime/parallel.h"
#include "runtime/workspace.h"

namespace gossamer {
namespace {

// Packed keys and values held at once: heads are worked off in passes that fit, or one by one.
constexpr int64_t kPackBudget = int64_t{1} << 29;
// And, beside them, tiles of columns that query blocks share.
constexpr int64_t kColumnBudget = int64_t{192} << 20;

}  // namespace

PackedKeys::PackedKeys(const Operands& operands)
    : operands(operands), heads(operands.plan.k_order != nullptr ? operands.plan.heads : operands.call.k.heads) {
  place_columns();
}

int64_t PackedKeys::head_of(int64_t b, int64_t plan_head) const {
  return b * heads + (operands.plan.k_order != nullptr ? plan_head : operands.group_of(plan_head));
}

// A column list that several query blocks share is packed once, unless all lists together take more room than the keys;
// else each query block packs what it needs.
void PackedKeys::place_columns() {
  const Plan& plan = operands.plan;
  if (plan.column_group == 1 || plan.k_order != nullptr) return;
  const int64_t lists = plan.batch() * plan.heads * plan.column_groups();
  column_start_.resize(lists + 1);
  for (int64_t n = 0; n < lists; ++n)
    column_start_[n + 1] = column_start_[n] + ceil_div(plan.columns.size(n), kChunk);
  if (column_tiles() > plan.batch() * heads * operands.chunks ||
      column_tiles() * operands.tile_bytes() > kColumnBudget)
    column_start_.clear();
}

PackedExecution::PackedExecution(const Operands& operands)
    : o_(operands),
      keys_(operands),
      heads_per_pass_(std::max<int64_t>(1, kPackBudget / std::max<int64_t>(1, o_.chunks * o_.tile_bytes()))) {}

PackedExecution::~PackedExecution() = default;

void PackedExecution::run() {
  const std::vector<WorkItem> items = work_items();
  const int64_t heads = o_.plan.batch() * keys_.heads, at_once = std::min(heads, heads_per_pass_);
  const int64_t most_jobs = std::max({int64_t{1}, at_once * o_.chunks, static_cast<int64_t>(items.size())});
  const int threads = static_cast<int>(std::clamp<int64_t>(o_.call.threads, 1, most_jobs));
  const int64_t scratch_bytes = panel_scratch_bytes(o_.padded_dim, o_.padded_value_dim);
  KeptBuffer buffer;
  place(buffer.reserve(threads * scratch_bytes + (at_once * o_.chunks + keys_.column_tiles()) * o_.tile_bytes()),
        threads, at_once);

  run_parallel(threads, keys_.column_tiles(), [&](int thread, int64_t n) { workers_[thread]->pack_columns(n); });
  size_t begin = 0;
  for (keys_.first_head = 0; keys_.first_head < heads; keys_.first_head += at_once) {
    pack_pass(std::min(at_once, heads - keys_.first_head));
    size_t end = begin;
    while (end < items.size() && items[end].pass == keys_.first_head / at_once) ++end;
    run_parallel(threads, static_cast<int64_t>(end - begin), [&](int thread, int64_t n) {
      workers_[thread]->attend(items[begin + static_cast<size_t>(n)].rows);
    });
    begin = end;
  }
}

std::vector<PackedExecution::WorkItem> PackedExecution::work_items() const {
  const Plan& plan = o_.plan;
  std::vector<WorkItem> items;
  const int64_t share = o_.heads_a_plan_head;
  const int64_t rows_at_once = std::min<int64_t>(plan.block_q, kMaxRows);
  const int64_t heads_at_once = std::max<int64_t>(1, std::min(share, kMaxRows / rows_at_once));
  for (int64_t b = 0; b < plan.batch(); ++b)
    for (int64_t h = 0; h < plan.heads; ++h)
      for (int64_t m = 0; m < o_.blocks; ++m) {
        const int64_t keys = listed_keys(plan, b, h, m);
        const int64_t end = std::min((m + 1) * plan.block_q, plan.query_len);
        for (int64_t first = m * plan.block_q; first < end; first += kMaxRows)
          for (int64_t head = 0; head < share; head += heads_at_once) {
            const int64_t heads = std::min(heads_at_once, share - head);
            const int64_t rows = std::min<int64_t>(kMaxRows, end - first);
            items.push_back({keys_.head_of(b, h) / heads_per_pass_, keys * rows * heads,
                             {int32_t(b), int32_t(h), int32_t(m), int32_t(h * share + head), int32_t(heads),
                              int32_t(first), int32_t(rows)}});
          }
      }
  // The longest first: the threads end together.
  std::stable_sort(items.begin(), items.end(), [](const WorkItem& a, const WorkItem& z) {
    return a.pass != z.pass ? a.pass < z.pass : a.cost > z.cost;
  });
  return items;
}

void PackedExecution::place(char* base, int threads, int64_t heads_at_once) {
  const int64_t scratch_bytes = panel_scratch_bytes(o_.padded_dim, o_.padded_value_dim);
  for (int t = 0; t < threads; ++t)
    workers_.push_back(std::make_unique<PackedWorker>(keys_, base + t * scratch_bytes));
  keys_.chunks = o_.tiles(base + threads * scratch_bytes);
  keys_.columns = keys_.chunks.from(heads_at_once * o_.chunks);
}

// Packs the chunks of the next `heads` packed heads, or those that some query block lists.
void PackedExecution::pack_pass(int64_t heads) {
  const int threads = static_cast<int>(workers_.size());
  if (!few_queries()) {
    run_parallel(threads, heads * o_.chunks, [&](int thread, int64_t n) { workers_[thread]->pack_chunk(n); });
    return;
  }
  list_needed(heads);
  run_parallel(threads, static_cast<int64_t>(needed_.size()),
               [&](int thread, int64_t n) { workers_[thread]->pack_chunk(needed_[n]); });
}

void PackedExecution::list_needed(int64_t heads) {
  marks_.assign(heads * o_.chunks, 0);
  run_parallel(static_cast<int>(workers_.size()), heads, [&](int thread, int64_t n) {
    workers_[thread]->mark_chunks(keys_.first_head + n, marks_.data() + n * o_.chunks);
  });
  needed_.clear();
  for (int64_t n = 0; n < heads * o_.chunks; ++n)
    if (marks_[n] != 0) needed_.push_back(n);
}

}  // namespace gossamer
