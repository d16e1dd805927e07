// From a plan to panels of query rows: packing, scheduling, threads.
#include "attend/executor.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "attend/operands.h"
#include "attend/streamed.h"
#include "attend/worklist.h"
#include "runtime/parallel.h"
#include "runtime/workspace.h"

namespace gossamer {
namespace {

// Packed keys and values held at once: heads are worked off in passes that fit, or one by one.
constexpr int64_t kPackBudget = int64_t{1} << 29;
// And, beside them, tiles of columns that query blocks share.
constexpr int64_t kColumnBudget = int64_t{192} << 20;

struct WorkItem {
  int64_t pass, cost;
  RowRange rows;
};

// Keys and values are packed once for all query blocks, then each query block runs over the tiles that it lists.
class Execution {
  class Worker;

 public:
  explicit Execution(const Operands& operands)
      : o_(operands),
        plan_(operands.plan),
        // A permutation of the keys belongs to a head of the plan; else keys are packed once per key/value head.
        packed_heads_(plan_.k_order != nullptr ? plan_.heads : operands.call.groups),
        heads_per_pass_(std::max<int64_t>(1, kPackBudget / std::max<int64_t>(1, o_.chunks * o_.tile_bytes()))) {}

  void run() {
    place_columns();
    const std::vector<WorkItem> items = work_items();
    const int64_t heads = plan_.batch * packed_heads_, at_once = std::min(heads, heads_per_pass_);
    const int64_t most_jobs = std::max({int64_t{1}, at_once * o_.chunks, static_cast<int64_t>(items.size())});
    const int threads = static_cast<int>(std::clamp<int64_t>(o_.call.threads, 1, most_jobs));
    const int64_t scratch_bytes = panel_scratch_bytes(o_.dim, o_.value_dim);
    const int64_t packed_bytes = (at_once * o_.chunks + column_tiles_) * o_.tile_bytes();
    KeptBuffer buffer;
    char* base = buffer.reserve(threads * scratch_bytes + packed_bytes);
    std::vector<std::unique_ptr<Worker>> workers(threads);
    for (auto& worker : workers) {
      worker = std::make_unique<Worker>(*this, base);
      base += scratch_bytes;
    }
    packed_ = o_.tiles(base);
    columns_ = o_.tiles(packed_.keys(at_once * o_.chunks));

    run_parallel(threads, column_tiles_, [&](int thread, int64_t n) { workers[thread]->pack_columns(n); });
    size_t begin = 0;
    for (int64_t first = 0; first < heads; first += at_once) {
      const int64_t last = std::min(heads, first + at_once);
      first_head_ = first;
      if (few_queries()) {
        list_needed(workers, last - first);
        run_parallel(threads, static_cast<int64_t>(needed_.size()),
                     [&](int thread, int64_t n) { workers[thread]->pack_chunk(needed_[n]); });
      } else {
        run_parallel(threads, (last - first) * o_.chunks,
                     [&](int thread, int64_t n) { workers[thread]->pack_chunk(n); });
      }
      size_t end = begin;
      while (end < items.size() && items[end].pass == first / at_once) ++end;
      run_parallel(threads, static_cast<int64_t>(end - begin), [&](int thread, int64_t n) {
        workers[thread]->attend(items[begin + static_cast<size_t>(n)].rows);
      });
      begin = end;
    }
  }

 private:
  // Where queries are as many as keys, some query block lists nearly every key; where they are fewer, as in a chunk of a
  // long prompt, it may pay to look which chunks are needed at all.
  bool few_queries() const { return plan_.query_len <= plan_.key_len / 2; }

  // The chunks of the next `heads` packed heads that some query block lists.
  void list_needed(std::vector<std::unique_ptr<Worker>>& workers, int64_t heads) {
    marks_.assign(heads * o_.chunks, 0);
    run_parallel(static_cast<int>(workers.size()), heads, [&](int thread, int64_t n) {
      workers[thread]->mark_chunks(first_head_ + n, marks_.data() + n * o_.chunks);
    });
    needed_.clear();
    for (int64_t n = 0; n < heads * o_.chunks; ++n)
      if (marks_[n] != 0) needed_.push_back(n);
  }

  // The packed head (of the whole batch) that a head of the plan reads.
  int64_t packed_head(int64_t b, int64_t plan_head) const {
    return b * packed_heads_ + (plan_.k_order != nullptr ? plan_head : o_.group_of(plan_head));
  }

  // A column list that several query blocks share is packed once, unless all lists together take more room than the
  // keys; else each query block packs what it needs.
  void place_columns() {
    if (plan_.column_group == 1 || plan_.k_order != nullptr) return;
    const int64_t lists = plan_.batch * plan_.heads * ceil_div(o_.blocks, plan_.column_group);
    column_start_.resize(lists + 1);
    for (int64_t n = 0; n < lists; ++n) {
      const int64_t count = plan_.column_indptr[n + 1] - plan_.column_indptr[n];
      column_start_[n + 1] = column_start_[n] + ceil_div(count, kChunk);
    }
    if (column_start_.back() > plan_.batch * packed_heads_ * o_.chunks ||
        column_start_.back() * o_.tile_bytes() > kColumnBudget)
      column_start_.clear();
    else
      column_tiles_ = column_start_.back();
  }

  std::vector<WorkItem> work_items() const {
    std::vector<WorkItem> items;
    const int64_t share = o_.call.query_heads / plan_.heads;
    const int64_t rows_at_once = std::min<int64_t>(plan_.block_q, kMaxRows);
    const int64_t heads_at_once = std::max<int64_t>(1, std::min(share, kMaxRows / rows_at_once));
    for (int64_t b = 0; b < plan_.batch; ++b)
      for (int64_t h = 0; h < plan_.heads; ++h)
        for (int64_t m = 0; m < o_.blocks; ++m) {
          const int64_t keys = listed_keys(plan_, b, h, m);
          const int64_t end = std::min((m + 1) * plan_.block_q, plan_.query_len);
          for (int64_t first = m * plan_.block_q; first < end; first += kMaxRows)
            for (int64_t head = 0; head < share; head += heads_at_once) {
              const int64_t heads = std::min(heads_at_once, share - head);
              const int64_t rows = std::min<int64_t>(kMaxRows, end - first);
              items.push_back({packed_head(b, h) / heads_per_pass_, keys * rows * heads,
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

  // What one thread owns.
  class Worker {
   public:
    Worker(const Execution& e, char* scratch) : e_(e), worklist_(e.plan_, e.o_.chunks), scratch_(scratch) {}

    // Sets the marks of the chunks that query blocks of a packed head list.
    void mark_chunks(int64_t packed_head, char* marks) {
      const PlanView& plan = e_.plan_;
      const int64_t b = packed_head / e_.packed_heads_, share = plan.heads / e_.packed_heads_;
      const int64_t first_head = packed_head % e_.packed_heads_ * share;
      const int64_t heads_at_once = e_.o_.call.query_heads / plan.heads;
      const PackedTiles offsets = e_.o_.tiles(nullptr), columns = offsets;
      for (int64_t h = first_head; h < first_head + share; ++h)
        for (int64_t m = 0; m < e_.o_.blocks; ++m) {
          const int64_t row = m * plan.block_q, rows = std::min<int64_t>(plan.block_q, plan.query_len - row);
          rows_.collect(e_.o_, {int32_t(b), int32_t(h), int32_t(m), int32_t(h * heads_at_once), 1, int32_t(row),
                                int32_t(rows)});
          worklist_.build(rows_.block(), offsets, e_.column_start_.empty() ? nullptr : &columns);
          for (const Tile& tile : worklist_.tiles()) {
            if (tile.slots != nullptr && plan.k_order == nullptr) continue;  // columns
            marks[(static_cast<const char*>(tile.keys) - offsets.base) / e_.o_.tile_bytes()] = 1;
          }
        }
    }

    // Chunk n of all (packed head of this pass, chunk).
    void pack_chunk(int64_t n) {
      const PlanView& plan = e_.plan_;
      const int64_t chunk = n % e_.o_.chunks, head = e_.first_head_ + n / e_.o_.chunks;
      const int64_t b = head / e_.packed_heads_, within = head % e_.packed_heads_;
      const int count = static_cast<int>(std::min<int64_t>(kChunk, plan.key_len - chunk * kChunk));
      int32_t slots[kChunk];
      for (int t = 0; t < count; ++t) slots[t] = static_cast<int32_t>(chunk * kChunk + t);
      if (plan.k_order != nullptr)
        std::copy_n(plan.k_order + head * plan.key_len + chunk * kChunk, count, slots);
      const int64_t group = plan.k_order != nullptr ? e_.o_.group_of(within) : within;
      e_.o_.pack(b, group, slots, count, e_.packed_.keys(n), e_.packed_.values(n));
    }

    // Tile n of all column lists.
    void pack_columns(int64_t n) {
      const PlanView& plan = e_.plan_;
      const auto& start = e_.column_start_;
      const int64_t list = std::upper_bound(start.begin(), start.end(), n) - start.begin() - 1;
      const int64_t head = list / ceil_div(e_.o_.blocks, plan.column_group);
      const int64_t first = plan.column_indptr[list] + (n - start[list]) * kChunk;
      const int count = static_cast<int>(std::min<int64_t>(kChunk, plan.column_indptr[list + 1] - first));
      e_.o_.pack(head / plan.heads, e_.o_.group_of(head % plan.heads), plan.column_indices + first, count,
                 e_.columns_.keys(n), e_.columns_.values(n));
    }

    void attend(const RowRange& range) {
      rows_.collect(e_.o_, range);
      const PackedTiles packed =
          e_.o_.tiles(e_.packed_.keys((e_.packed_head(range.b, range.plan_head) - e_.first_head_) * e_.o_.chunks));
      PackedTiles columns;
      if (!e_.column_start_.empty())
        columns = e_.o_.tiles(
            e_.columns_.keys(e_.column_start_[column_list(e_.plan_, range.b, range.plan_head, range.block)]));
      worklist_.build(rows_.block(), packed, e_.column_start_.empty() ? nullptr : &columns);
      gather();
      Panel panel = rows_.panel(e_.o_);
      panel.tiles = worklist_.tiles().data();
      panel.tile_count = static_cast<int64_t>(worklist_.tiles().size());
      panel.scratch = scratch_;
      e_.o_.kernels.attend(panel);
    }

   private:
    void gather() {
      const auto& slots = worklist_.gathered();
      if (slots.empty()) return;
      const int64_t total = static_cast<int64_t>(slots.size());
      const PackedTiles tiles = e_.o_.tiles(gather_buffer_.reserve(ceil_div(total, kChunk) * e_.o_.tile_bytes()));
      const QueryBlock& block = rows_.block();
      for (int64_t n = 0; n * kChunk < total; ++n)
        e_.o_.pack(block.b, e_.o_.group_of(block.plan_head), slots.data() + n * kChunk,
                   static_cast<int>(std::min<int64_t>(kChunk, total - n * kChunk)), tiles.keys(n), tiles.values(n));
      worklist_.add_gathered(block, tiles, slots.data());
    }

    const Execution& e_;
    Worklist worklist_;
    PanelRows rows_;
    char* scratch_;
    Buffer gather_buffer_;
  };

  const Operands& o_;
  const PlanView& plan_;
  const int64_t packed_heads_, heads_per_pass_;
  int64_t first_head_ = 0;  // of this pass
  PackedTiles packed_, columns_;
  std::vector<int64_t> column_start_;  // by column list: its first tile; empty if query blocks pack for themselves
  int64_t column_tiles_ = 0;
  std::vector<char> marks_;      // by packed head of this pass and chunk: listed
  std::vector<int64_t> needed_;  // these, where not all are packed
};

}  // namespace

void execute(const Kernels& kernels, const PlanView& plan, const Call& call) {
  if (plan.batch == 0 || plan.query_len == 0 || plan.heads == 0) return;
  const Operands operands(kernels, plan, call);
  if (fits_streamed(operands))
    run_streamed(operands);
  else
    Execution(operands).run();
}

}  // namespace gossamer
