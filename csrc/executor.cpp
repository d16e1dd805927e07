// From a plan to panels of query rows: packing, scheduling, threads.
#include "executor.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "worklist.h"

namespace gossamer {
namespace {

// Packed keys and values held at once: heads are worked off in passes that fit, or one by one.
constexpr int64_t kPackBudget = int64_t{1} << 30;
// Of it, kept for the next call: fresh pages cost about as much as packing into them.
constexpr int64_t kKeptBytes = int64_t{256} << 20;

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialised memory that only grows.
class Buffer {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      data_.reset();
      capacity_ = ceil_div(bytes, 64) * 64;
      data_.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(capacity_))));
      if (data_ == nullptr) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_.get();
  }
  int64_t capacity() const { return capacity_; }

 private:
  std::unique_ptr<char, FreeDeleter> data_;
  int64_t capacity_ = 0;
};

// The buffer of the last call that has ended; calls that overlap get buffers of their own.
class KeptBuffer {
 public:
  KeptBuffer() {
    const std::lock_guard<std::mutex> lock(mutex());
    std::swap(buffer_, kept());
  }
  ~KeptBuffer() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (buffer_.capacity() <= kKeptBytes && buffer_.capacity() > kept().capacity()) std::swap(buffer_, kept());
  }
  KeptBuffer(const KeptBuffer&) = delete;
  KeptBuffer& operator=(const KeptBuffer&) = delete;

  Buffer& operator*() { return buffer_; }

 private:
  static std::mutex& mutex() {
    static std::mutex instance;
    return instance;
  }
  static Buffer& kept() {
    static Buffer instance;
    return instance;
  }
  Buffer buffer_;
};

int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

char* row_of(const TensorView& t, int64_t b, int64_t h, int64_t row, int element) {
  return t.data + (b * t.stride[0] + h * t.stride[1] + row * t.stride[2]) * element;
}

// Rows of one query block of one head of the plan, for the query heads that run it together.
struct WorkItem {
  int64_t pass, cost;
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
        blocks_(ceil_div(plan.query_len, plan.block_q)),
        // A permutation of the keys belongs to a head of the plan; else keys are packed once per key/value head.
        packed_heads_(plan.k_order != nullptr ? plan.heads : call.groups) {
    const int64_t unit = kernels.bf16_tiles ? 2 : 4;
    packed_.key_bytes = kChunk * dim_ * unit;
    packed_.value_bytes = kChunk * value_dim_ * unit;
    const int64_t head_bytes = std::max<int64_t>(1, chunks_ * tile_bytes());
    heads_per_pass_ = std::max<int64_t>(1, kPackBudget / head_bytes);
  }

  void run() {
    if (plan_.batch == 0 || plan_.query_len == 0 || plan_.heads == 0) return;
    place_columns();
    const std::vector<WorkItem> items = work_items();
    const int64_t heads = plan_.batch * packed_heads_, at_once = std::min(heads, heads_per_pass_);
    KeptBuffer buffer;
    packed_.base = (*buffer).reserve((at_once * chunks_ + column_tiles_) * tile_bytes());
    columns_ = packed_;
    columns_.base += at_once * chunks_ * tile_bytes();

    const int64_t most_jobs = std::max({int64_t{1}, at_once * chunks_, static_cast<int64_t>(items.size())});
    const int threads = static_cast<int>(std::clamp<int64_t>(call_.threads, 1, most_jobs));
    std::vector<std::unique_ptr<Worker>> workers(threads);
    for (auto& worker : workers) worker = std::make_unique<Worker>(*this);
    run_parallel(workers, column_tiles_, [](Worker& w, int64_t n) { w.pack_columns(n); });
    size_t begin = 0;
    for (int64_t first = 0; first < heads; first += at_once) {
      const int64_t last = std::min(heads, first + at_once);
      first_head_ = first;
      run_parallel(workers, (last - first) * chunks_, [](Worker& w, int64_t n) { w.pack_chunk(n); });
      size_t end = begin;
      while (end < items.size() && items[end].pass == first / at_once) ++end;
      run_parallel(workers, static_cast<int64_t>(end - begin),
                   [&](Worker& w, int64_t n) { w.attend(items[begin + static_cast<size_t>(n)]); });
      begin = end;
    }
  }

 private:
  class Worker;

  // Every job goes to one thread whole, so that results do not depend on their number.
  template <class Job>
  void run_parallel(std::vector<std::unique_ptr<Worker>>& workers, int64_t jobs, const Job& job) const {
    std::exception_ptr failure;  // an exception must not leave a parallel region
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(workers.size()))
    for (int64_t n = 0; n < jobs; ++n) {
      try {
#ifdef _OPENMP
        job(*workers[omp_get_thread_num()], n);
#else
        job(*workers[0], n);
#endif
      } catch (...) {
#pragma omp critical(gossamer_failure)
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
  }

  int64_t tile_bytes() const { return packed_.key_bytes + packed_.value_bytes; }
  int64_t group_of(int64_t plan_head) const { return plan_head * call_.groups / plan_.heads; }

  // The packed head (of the whole batch) that a head of the plan reads.
  int64_t packed_head(int64_t b, int64_t plan_head) const {
    return b * packed_heads_ + (plan_.k_order != nullptr ? plan_head : group_of(plan_head));
  }

  // A column list that several query blocks share is packed once, unless all lists together take more room than the
  // keys; else each query block packs what it needs.
  void place_columns() {
    if (plan_.column_group == 1 || plan_.k_order != nullptr) return;
    const int64_t lists = plan_.batch * plan_.heads * ceil_div(blocks_, plan_.column_group);
    column_start_.resize(lists + 1);
    for (int64_t n = 0; n < lists; ++n) {
      const int64_t count = plan_.column_indptr[n + 1] - plan_.column_indptr[n];
      column_start_[n + 1] = column_start_[n] + ceil_div(count, kChunk);
    }
    if (column_start_.back() > plan_.batch * packed_heads_ * chunks_ ||
        column_start_.back() * tile_bytes() > kPackBudget)
      column_start_.clear();
    else
      column_tiles_ = column_start_.back();
  }

  std::vector<WorkItem> work_items() const {
    std::vector<WorkItem> items;
    const int64_t share = call_.query_heads / plan_.heads;
    const int64_t rows_at_once = std::min<int64_t>(plan_.block_q, kMaxRows);
    const int64_t heads_at_once = std::max<int64_t>(1, std::min(share, kMaxRows / rows_at_once));
    for (int64_t b = 0; b < plan_.batch; ++b)
      for (int64_t h = 0; h < plan_.heads; ++h)
        for (int64_t m = 0; m < blocks_; ++m) {
          const int64_t row = (b * plan_.heads + h) * blocks_ + m, list = column_list(plan_, b, h, m);
          int64_t keys = (plan_.block_indptr[row + 1] - plan_.block_indptr[row]) * plan_.block_k;
          keys += plan_.column_indptr[list + 1] - plan_.column_indptr[list];
          const int64_t position = plan_.query_start[b] + (m + 1) * plan_.block_q;
          keys += std::min<int64_t>(plan_.sink[h] + int64_t{plan_.window[h]}, std::max<int64_t>(position, 0));
          const int64_t end = std::min((m + 1) * plan_.block_q, plan_.query_len);
          for (int64_t first = m * plan_.block_q; first < end; first += kMaxRows)
            for (int64_t head = 0; head < share; head += heads_at_once) {
              const int64_t heads = std::min(heads_at_once, share - head);
              const int64_t rows = std::min<int64_t>(kMaxRows, end - first);
              items.push_back({packed_head(b, h) / heads_per_pass_, keys * rows * heads, int32_t(b), int32_t(h),
                               int32_t(m), int32_t(h * share + head), int32_t(heads), int32_t(first), int32_t(rows)});
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
    explicit Worker(const Execution& e) : e_(e), worklist_(e.plan_, e.chunks_) {
      scratch_.reserve(panel_scratch_bytes(e.dim_, e.value_dim_));
    }

    // Chunk n of all (packed head of this pass, chunk).
    void pack_chunk(int64_t n) {
      const PlanView& plan = e_.plan_;
      const int64_t chunk = n % e_.chunks_, head = e_.first_head_ + n / e_.chunks_;
      const int64_t b = head / e_.packed_heads_, within = head % e_.packed_heads_;
      const int count = static_cast<int>(std::min<int64_t>(kChunk, plan.key_len - chunk * kChunk));
      int32_t slots[kChunk];
      for (int t = 0; t < count; ++t) slots[t] = static_cast<int32_t>(chunk * kChunk + t);
      if (plan.k_order != nullptr)
        std::copy_n(plan.k_order + head * plan.key_len + chunk * kChunk, count, slots);
      pack(b, plan.k_order != nullptr ? e_.group_of(within) : within, slots, count, e_.packed_, n);
    }

    // Tile n of all column lists.
    void pack_columns(int64_t n) {
      const PlanView& plan = e_.plan_;
      const auto& start = e_.column_start_;
      const int64_t list = std::upper_bound(start.begin(), start.end(), n) - start.begin() - 1;
      const int64_t head = list / ceil_div(e_.blocks_, plan.column_group);
      const int64_t first = plan.column_indptr[list] + (n - start[list]) * kChunk;
      const int count = static_cast<int>(std::min<int64_t>(kChunk, plan.column_indptr[list + 1] - first));
      pack(head / plan.heads, e_.group_of(head % plan.heads), plan.column_indices + first, count, e_.columns_, n);
    }

    void attend(const WorkItem& item) {
      collect_rows(item);
      PackedTiles packed = e_.packed_;
      packed.base = packed.keys((e_.packed_head(item.b, item.plan_head) - e_.first_head_) * e_.chunks_);
      PackedTiles columns = e_.columns_;
      if (!e_.column_start_.empty())
        columns.base = columns.keys(e_.column_start_[column_list(e_.plan_, item.b, item.plan_head, item.block)]);
      worklist_.build(block_, packed, e_.column_start_.empty() ? nullptr : &columns);
      gather();

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
      panel.rules = block_.rules;
      panel.tiles = worklist_.tiles().data();
      panel.tile_count = static_cast<int64_t>(worklist_.tiles().size());
      panel.scratch = scratch_.reserve(0);
      e_.kernels_.attend(panel);
    }

   private:
    void pack(int64_t b, int64_t group, const int32_t* slots, int count, const PackedTiles& to, int64_t tile) {
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
                        e_.value_dim_, to.keys(tile), to.values(tile)});
    }

    void collect_rows(const WorkItem& item) {
      const PlanView& plan = e_.plan_;
      queries_.clear();
      outputs_.clear();
      lse_.clear();
      coordinates_.clear();
      sinks_.clear();
      block_ = {item.b, item.plan_head, item.block, kUnlimited, -kUnlimited, {}};
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
          block_.lowest = std::min(block_.lowest, at);
          block_.highest = std::max(block_.highest, at);
          if (e_.call_.sinks != nullptr) sinks_.push_back(e_.call_.sinks[h]);
        }
      Rules& rules = block_.rules;
      rules.live_begin = plan.key_start[item.b];
      rules.live_end = rules.live_begin + plan.key_count[item.b];
      rules.sink_end = rules.live_begin + plan.sink[item.plan_head];
      rules.window = plan.window[item.plan_head];
      rules.limit = plan.limit;
      rules.causal = plan.causal;
    }

    void gather() {
      const auto& slots = worklist_.gathered();
      if (slots.empty()) return;
      const int64_t total = static_cast<int64_t>(slots.size());
      PackedTiles tiles = e_.packed_;
      tiles.base = gather_buffer_.reserve(ceil_div(total, kChunk) * e_.tile_bytes());
      for (int64_t n = 0; n * kChunk < total; ++n)
        pack(block_.b, e_.group_of(block_.plan_head), slots.data() + n * kChunk,
             static_cast<int>(std::min<int64_t>(kChunk, total - n * kChunk)), tiles, n);
      worklist_.add_gathered(block_, tiles);
    }

    const Execution& e_;
    Worklist worklist_;
    Buffer scratch_, gather_buffer_;
    QueryBlock block_{};
    std::vector<const void*> queries_;
    std::vector<void*> outputs_;
    std::vector<float*> lse_;
    std::vector<int64_t> coordinates_;
    std::vector<float> sinks_;
  };

  const Kernels& kernels_;
  const PlanView& plan_;
  const Call& call_;
  const int element_, dim_, value_dim_;
  const int64_t chunks_, blocks_, packed_heads_;
  int64_t heads_per_pass_ = 1;
  int64_t first_head_ = 0;  // of this pass
  PackedTiles packed_, columns_;
  std::vector<int64_t> column_start_;  // by column list: its first tile; empty if query blocks pack for themselves
  int64_t column_tiles_ = 0;
};

}  // namespace

void execute(const Kernels& kernels, const PlanView& plan, const Call& call) { Execution(kernels, plan, call).run(); }

}  // namespace gossamer
