// From a plan to panels of query rows and lists of packed tiles: packing, worklists, scheduling.
#include "executor.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gossamer {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, FreeDeleter>;

Buffer allocate(int64_t bytes) {
  void* p = std::aligned_alloc(64, static_cast<size_t>(ceil_div(std::max<int64_t>(bytes, 64), 64) * 64));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<char*>(p));
}

int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

char* row_of(const TensorView& t, int64_t b, int64_t h, int64_t row, int element) {
  return t.data + (b * t.stride[0] + h * t.stride[1] + row * t.stride[2]) * element;
}

// One query block of one head of the plan, and the query heads [first, first + count) that run it together.
struct WorkItem {
  int64_t cost;
  int32_t b, plan_head, block, first_head, heads, first_row, rows;
};

class Execution {
 public:
  Execution(const Kernels& kernels, const PlanView& plan, const Call& call)
      : kernels_(kernels),
        plan_(plan),
        call_(call),
        element_(element_size(call.dtype)),
        dim_(round_up(call.head_dim, kernels.head_dim_multiple)),
        value_dim_(round_up(call.value_dim, kernels.head_dim_multiple)),
        chunks_(ceil_div(plan.key_len, kChunk)),
        blocks_(ceil_div(plan.query_len, plan.block_q)) {
    const int64_t unit = kernels.bf16_tiles ? 2 : 4;
    key_bytes_ = kChunk * dim_ * unit;
    value_bytes_ = kChunk * value_dim_ * unit;
    share_ = call.query_heads / call.groups;
  }

  void run() {
    if (plan_.batch == 0 || plan_.query_len == 0) return;
    order_keys();
    packed_ = allocate(plan_.batch * packed_heads() * chunks_ * (key_bytes_ + value_bytes_));
    std::vector<WorkItem> items = work_items();
    const int threads = std::max(1, call_.threads);
    const int64_t tiles = plan_.batch * packed_heads() * chunks_;
#pragma omp parallel num_threads(threads)
    {
      Worker worker(*this);
#pragma omp for schedule(dynamic, 4)
      for (int64_t n = 0; n < tiles; ++n) worker.pack(n);
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < static_cast<int64_t>(items.size()); ++n) worker.attend(items[n]);
    }
  }

 private:
  bool permuted() const { return plan_.k_order != nullptr || plan_.q_order != nullptr; }
  // A permutation of the keys belongs to a head of the plan; without one, keys are packed once per key/value head.
  int64_t packed_heads() const { return plan_.k_order != nullptr ? plan_.heads : call_.groups; }
  int64_t group_of_plan_head(int64_t head) const { return head * call_.groups / plan_.heads; }

  void order_keys() {}

  std::vector<WorkItem> work_items() const {
    std::vector<WorkItem> items;
    const int64_t heads_per_plan_head = call_.query_heads / plan_.heads;
    const int64_t rows_per_block = std::min<int64_t>(plan_.block_q, kMaxRows);
    const int64_t heads_per_item = std::max<int64_t>(1, std::min(heads_per_plan_head, kMaxRows / rows_per_block));
    for (int64_t b = 0; b < plan_.batch; ++b)
      for (int64_t h = 0; h < plan_.heads; ++h)
        for (int64_t m = 0; m < blocks_; ++m) {
          const int64_t row = (b * plan_.heads + h) * blocks_ + m;
          const int64_t list = (b * plan_.heads + h) * ceil_div(blocks_, plan_.column_group) + m / plan_.column_group;
          int64_t keys = (plan_.block_indptr[row + 1] - plan_.block_indptr[row]) * plan_.block_k;
          keys += plan_.column_indptr[list + 1] - plan_.column_indptr[list];
          const int64_t position = plan_.query_start[b] + (m + 1) * plan_.block_q;
          keys += std::min<int64_t>(plan_.sink[h] + int64_t{plan_.window[h]}, std::max<int64_t>(position, 0));
          const int64_t end = std::min((m + 1) * plan_.block_q, plan_.query_len);
          for (int64_t first = m * plan_.block_q; first < end; first += kMaxRows)
            for (int64_t head = 0; head < heads_per_plan_head; head += heads_per_item) {
              const int64_t heads = std::min(heads_per_item, heads_per_plan_head - head);
              const int64_t rows = std::min<int64_t>(kMaxRows, end - first);
              items.push_back({keys * rows * heads, int32_t(b), int32_t(h), int32_t(m),
                               int32_t(h * heads_per_plan_head + head), int32_t(heads), int32_t(first), int32_t(rows)});
            }
        }
    std::stable_sort(items.begin(), items.end(), [](const WorkItem& a, const WorkItem& z) { return a.cost > z.cost; });
    return items;
  }

  struct Worker {
    explicit Worker(const Execution& e) : e_(e) {
      scratch_ = allocate(panel_scratch_bytes(e.dim_, e.value_dim_));
      selected_.assign(e.chunks_, 0);
    }

    // Tile n of all (batch row, packed head, chunk) tiles.
    void pack(int64_t n) {
      const int64_t chunk = n % e_.chunks_, head = n / e_.chunks_ % e_.packed_heads();
      const int64_t b = n / e_.chunks_ / e_.packed_heads();
      int32_t slots[kChunk];
      const int64_t count = std::min<int64_t>(kChunk, e_.plan_.key_len - chunk * kChunk);
      const int32_t* order = e_.plan_.k_order;
      if (order != nullptr) order += (b * e_.plan_.heads + head) * e_.plan_.key_len;
      for (int64_t t = 0; t < count; ++t)
        slots[t] = order == nullptr ? int32_t(chunk * kChunk + t) : order[chunk * kChunk + t];
      const int64_t group = order == nullptr ? head : e_.group_of_plan_head(head);
      pack_slots(b, group, slots, static_cast<int>(count), e_.packed_key(n), e_.packed_value(n));
    }

    void pack_slots(int64_t b, int64_t group, const int32_t* slots, int count, void* keys, void* values) {
      const int64_t low = e_.plan_.key_start[b], high = low + e_.plan_.key_count[b];
      const void* key_rows[kChunk];
      const void* value_rows[kChunk];
      for (int t = 0; t < kChunk; ++t) {
        // A dead slot may hold anything, NaN too, and is never read.
        const bool live = t < count && slots[t] >= low && slots[t] < high;
        key_rows[t] = live ? row_of(e_.call_.k, b, group, slots[t], e_.element_) : nullptr;
        value_rows[t] = live ? row_of(e_.call_.v, b, group, slots[t], e_.element_) : nullptr;
      }
      e_.kernels_.pack({e_.call_.dtype, key_rows, value_rows, e_.call_.head_dim, e_.call_.value_dim, e_.dim_,
                        e_.value_dim_, keys, values});
    }

    void attend(const WorkItem& item) {
      const PlanView& plan = e_.plan_;
      collect_rows(item);
      rules_.live_begin = plan.key_start[item.b];
      rules_.live_end = rules_.live_begin + plan.key_count[item.b];
      rules_.sink_end = rules_.live_begin + plan.sink[item.plan_head];
      rules_.window = plan.window[item.plan_head];
      rules_.limit = plan.limit;
      rules_.causal = plan.causal;
      tiles_.clear();
      gathered_.clear();
      if (plan.k_order != nullptr)
        list_permuted(item);
      else
        list_tiles(item);
      Panel panel;
      panel.rows = static_cast<int>(queries_.size());
      panel.head_dim = e_.call_.head_dim;
      panel.value_dim = e_.call_.value_dim;
      panel.padded_head_dim = e_.dim_;
      panel.padded_value_dim = e_.value_dim_;
      panel.dtype = e_.call_.dtype;
      panel.queries = queries_.data();
      panel.outputs = outputs_.data();
      panel.lse = lse_.data();
      panel.coordinates = coordinates_.data();
      panel.sink_logits = e_.call_.sinks != nullptr ? sinks_.data() : nullptr;
      panel.scale = e_.call_.scale;
      panel.softcap = e_.call_.softcap;
      panel.rules = rules_;
      panel.tiles = tiles_.data();
      panel.tile_count = static_cast<int64_t>(tiles_.size());
      panel.scratch = scratch_.get();
      e_.kernels_.attend(panel);
    }

   private:
    void collect_rows(const WorkItem& item) {
      const PlanView& plan = e_.plan_;
      queries_.clear();
      outputs_.clear();
      lse_.clear();
      coordinates_.clear();
      sinks_.clear();
      lowest_ = kUnlimited;
      highest_ = -kUnlimited;
      for (int64_t h = item.first_head; h < item.first_head + item.heads; ++h)
        for (int64_t r = item.first_row; r < item.first_row + item.rows; ++r) {
          int64_t row = r;
          if (plan.q_order != nullptr)
            row = plan.q_order[(int64_t{item.b} * plan.heads + item.plan_head) * plan.query_len + r];
          queries_.push_back(row_of(e_.call_.q, item.b, h, row, e_.element_));
          outputs_.push_back(row_of(e_.call_.out, item.b, h, row, e_.element_));
          lse_.push_back(e_.call_.lse + (item.b * e_.call_.query_heads + h) * plan.query_len + row);
          const int64_t at = plan.query_start[item.b] + row + plan.key_start[item.b];
          coordinates_.push_back(at);
          lowest_ = std::min(lowest_, at);
          highest_ = std::max(highest_, at);
          if (e_.call_.sinks != nullptr) sinks_.push_back(e_.call_.sinks[h]);
        }
    }

    // Key slots that some row may attend at all.
    std::pair<int64_t, int64_t> reachable() const {
      int64_t low = rules_.live_begin, high = rules_.live_end;
      if (rules_.causal) high = std::min(high, highest_ + 1);
      if (rules_.limit < kUnlimited) {
        low = std::max(low, lowest_ - rules_.limit + 1);
        high = std::min(high, highest_ + rules_.limit);
      }
      return {low, std::max(low, high)};
    }

    void list_tiles(const WorkItem& item) {
      const PlanView& plan = e_.plan_;
      const auto [low, high] = reachable();
      if (low >= high) return;
      const int64_t first_chunk = low / kChunk, last_chunk = (high - 1) / kChunk;
      std::fill(selected_.begin() + first_chunk, selected_.begin() + last_chunk + 1, 0);
      touched_.assign(e_.chunks_, 0);

      const int64_t row = (int64_t{item.b} * plan.heads + item.plan_head) * e_.blocks_ + item.block;
      for (int64_t n = plan.block_indptr[row]; n < plan.block_indptr[row + 1]; ++n) {
        const int64_t begin = std::max(low, plan.block_indices[n] * plan.block_k);
        const int64_t end = std::min(high, (plan.block_indices[n] + int64_t{1}) * plan.block_k);
        select(begin, end);
      }
      touch(low, std::min(high, rules_.sink_end));
      if (rules_.window > 0)
        touch(std::max(low, lowest_ - rules_.window + 1), std::min(high, highest_ + rules_.window));

      const int64_t groups = ceil_div(e_.blocks_, plan.column_group);
      const int64_t list = (int64_t{item.b} * plan.heads + item.plan_head) * groups + item.block / plan.column_group;
      const int32_t* columns = plan.column_indices + plan.column_indptr[list];
      const int32_t* columns_end = plan.column_indices + plan.column_indptr[list + 1];
      for (columns = std::lower_bound(columns, columns_end, low); columns != columns_end && *columns < high; ++columns) {
        if (touched_[*columns / kChunk])
          selected_[*columns / kChunk] |= uint64_t{1} << (*columns % kChunk);
        else
          gathered_.push_back(*columns);
      }

      const int64_t group = e_.group_of_plan_head(item.plan_head);
      for (int64_t chunk = first_chunk; chunk <= last_chunk; ++chunk) {
        if (!touched_[chunk]) continue;
        const int64_t n = (item.b * e_.call_.groups + group) * e_.chunks_ + chunk;
        Tile tile{e_.packed_key(n), e_.packed_value(n), nullptr, chunk * kChunk, selected_[chunk], kChunk,
                  TileKind::kConsecutive};
        if (is_full(tile)) tile.kind = TileKind::kFull;
        tiles_.push_back(tile);
      }
      gather(item.b, group);
    }

    // A tile that every row attends whole needs no mask.
    bool is_full(const Tile& tile) const {
      const int64_t first = tile.first_slot, last = first + kChunk - 1;
      if (first < rules_.live_begin || last >= rules_.live_end) return false;
      if (rules_.causal && last > lowest_) return false;
      const int64_t reach = std::max(highest_ - first, last - lowest_);
      if (reach >= rules_.limit) return false;
      return tile.key_bits == ~uint64_t{0} || last < rules_.sink_end || reach < rules_.window;
    }

    void select(int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end;) {
        const int64_t chunk = slot / kChunk, stop = std::min(end, (chunk + 1) * kChunk);
        const int64_t width = stop - slot;
        const uint64_t bits = width == kChunk ? ~uint64_t{0} : ((uint64_t{1} << width) - 1) << (slot % kChunk);
        selected_[chunk] |= bits;
        touched_[chunk] = 1;
        slot = stop;
      }
    }

    void touch(int64_t begin, int64_t end) {
      if (begin >= end) return;
      for (int64_t chunk = begin / kChunk; chunk <= (end - 1) / kChunk; ++chunk) touched_[chunk] = 1;
    }

    // Columns outside all listed chunks, packed 64 at a time.
    void gather(int64_t b, int64_t group) {
      if (gathered_.empty()) return;
      const int64_t count = static_cast<int64_t>(gathered_.size()), needed = ceil_div(count, kChunk);
      const int64_t bytes = e_.key_bytes_ + e_.value_bytes_;
      if (needed * bytes > gather_capacity_) {
        gather_capacity_ = needed * bytes;
        gather_buffer_ = allocate(gather_capacity_);
      }
      for (int64_t n = 0; n < needed; ++n) {
        char* keys = gather_buffer_.get() + n * bytes;
        const int32_t* slots = gathered_.data() + n * kChunk;
        const int filled = static_cast<int>(std::min<int64_t>(kChunk, count - n * kChunk));
        pack_slots(b, group, slots, filled, keys, keys + e_.key_bytes_);
        const uint64_t bits = filled == kChunk ? ~uint64_t{0} : (uint64_t{1} << filled) - 1;
        Tile tile{keys, keys + e_.key_bytes_, slots, slots[0], bits, filled, TileKind::kGathered};
        const int64_t last = slots[filled - 1];
        const bool within = !rules_.causal || last <= lowest_;
        if (filled == kChunk && within && std::max(highest_ - slots[0], last - lowest_) < rules_.limit)
          tile.kind = TileKind::kFull;
        tiles_.push_back(tile);
      }
    }

    // Permuted keys: every packed chunk that any part may touch, each pair tested by its original position.
    void list_permuted(const WorkItem& item) {
      const PlanView& plan = e_.plan_;
      const int64_t row = (int64_t{item.b} * plan.heads + item.plan_head) * e_.blocks_ + item.block;
      const int64_t groups = ceil_div(e_.blocks_, plan.column_group);
      const int64_t list = (int64_t{item.b} * plan.heads + item.plan_head) * groups + item.block / plan.column_group;
      const int32_t* columns = plan.column_indices + plan.column_indptr[list];
      const int32_t* columns_end = plan.column_indices + plan.column_indptr[list + 1];
      const int32_t* order = plan.k_order + (int64_t{item.b} * plan.heads + item.plan_head) * plan.key_len;
      std::fill(selected_.begin(), selected_.end(), 0);
      touched_.assign(e_.chunks_, 0);
      for (int64_t n = plan.block_indptr[row]; n < plan.block_indptr[row + 1]; ++n)
        select(plan.block_indices[n] * plan.block_k,
               std::min(plan.key_len, (plan.block_indices[n] + int64_t{1}) * plan.block_k));
      const auto [low, high] = reachable();
      for (int64_t chunk = 0; chunk < e_.chunks_; ++chunk) {
        const int count = static_cast<int>(std::min<int64_t>(kChunk, plan.key_len - chunk * kChunk));
        const int32_t* slots = order + chunk * kChunk;
        bool needed = false;
        for (int t = 0; t < count; ++t) {
          if (slots[t] < low || slots[t] >= high) continue;
          if (std::binary_search(columns, columns_end, slots[t])) selected_[chunk] |= uint64_t{1} << t;
          const int64_t nearest = std::max<int64_t>({0, lowest_ - slots[t], slots[t] - highest_});
          needed = needed || (selected_[chunk] >> t & 1) || slots[t] < rules_.sink_end || nearest < rules_.window;
        }
        if (!needed) continue;
        const int64_t n = (int64_t{item.b} * plan.heads + item.plan_head) * e_.chunks_ + chunk;
        tiles_.push_back({e_.packed_key(n), e_.packed_value(n), slots, 0, selected_[chunk], count,
                          TileKind::kScattered});
      }
    }

    const Execution& e_;
    Buffer scratch_, gather_buffer_;
    int64_t gather_capacity_ = 0;
    std::vector<uint64_t> selected_;
    std::vector<char> touched_;
    std::vector<int32_t> gathered_;
    std::vector<Tile> tiles_;
    std::vector<const void*> queries_;
    std::vector<void*> outputs_;
    std::vector<float*> lse_;
    std::vector<int64_t> coordinates_;
    std::vector<float> sinks_;
    Rules rules_{};
    int64_t lowest_ = 0, highest_ = 0;
  };

  char* packed_key(int64_t tile) const { return packed_.get() + tile * (key_bytes_ + value_bytes_); }
  char* packed_value(int64_t tile) const { return packed_key(tile) + key_bytes_; }

  const Kernels& kernels_;
  const PlanView& plan_;
  const Call& call_;
  const int element_, dim_, value_dim_;
  const int64_t chunks_, blocks_;
  int64_t key_bytes_, value_bytes_, share_;
  Buffer packed_;
};

}  // namespace

void execute(const Kernels& kernels, const PlanView& plan, const Call& call) { Execution(kernels, plan, call).run(); }

}  // namespace gossamer
