#include "attend/gradient.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "attend/gradient_passes.h"
#include "attend/worklist.h"
#include "kernels/integers.h"
#include "runtime/budgets.h"
#include "runtime/parallel.h"
#include "runtime/workspace.h"

namespace gossamer {
namespace {

// Rows that run together, where they are packed, and the strips of keys that they reach: [first_strip, past_strip).
struct PanelItem {
  RowRange range;
  int64_t unit;  // in its pass
  int rows, padded_rows;
  QueryBlock block;
  int64_t first_strip, past_strip;
  char *queries, *queries_across, *reaching, *reaching_across;
  float *lse, *level;
  float* sums;  // of each lane
  int64_t* positions;
};

// What a thread needs of its own.
struct Worker {
  Worker(const Plan& plan, int64_t most_chunks) : worklist(plan, most_chunks) {}

  Worklist worklist;
  PanelRows rows;
  char* scratch = nullptr;
  Buffer gathered, sums;
  std::vector<float*> targets;
};

class Gradients {
 public:
  Gradients(const Operands& operands, const GradientCall& call)
      : o_(operands),
        call_(call),
        kernels_(*operands.kernels.gradients),
        sizes_(operands, call.queries.data != nullptr),
        pairs_(operands.kernels.bf16_tiles),
        strip_chunks_(std::max<int64_t>(
            1, kStripBytes / (sizes_.tiles.tile_bytes() + sizes_.chunk_sums * int64_t{sizeof(float)}))) {}

  void run() {
    const int threads = std::max(1, o_.call.threads);
    const int64_t most_chunks = o_.most_chunks();
    for (int t = 0; t < threads; ++t) workers_.push_back(std::make_unique<Worker>(o_.plan, most_chunks));
    std::vector<GradientPass> passes = sizes_.passes();
    KeptBuffer buffer;
    int64_t most = 0;
    for (const auto& pass : passes) most = std::max(most, sizes_.pass_bytes(pass, sizes_.lanes_of(pass)));
    char* base = buffer.reserve(threads * gradient_scratch_bytes() + most);
    for (auto& worker : workers_) {
      worker->scratch = base;
      base += gradient_scratch_bytes();
    }
    for (auto& pass : passes) run_pass(pass, base);
  }

 private:
  int64_t strip() const { return strip_chunks_ * kChunk; }  // keys

  void run_pass(GradientPass& pass, char* base) {
    place(pass, base);
    run_jobs(static_cast<int64_t>(panels_.size()), [&](Worker& worker, int64_t n) { pack_panel(worker, panels_[n]); });
    if (pass.front().begins) pack_keys(pass);
    add_strips(pass);
    if (call_.queries.data != nullptr)
      run_jobs(static_cast<int64_t>(panels_.size()),
               [&](Worker& worker, int64_t n) { write_queries(worker, panels_[n]); });
    if (pass.back().ends) write_keys(pass);
  }

  template <class Job>
  void run_jobs(int64_t jobs, const Job& job) {
    run_parallel(static_cast<int>(workers_.size()), jobs, [&](int thread, int64_t n) { job(*workers_[thread], n); });
  }

  // Keys first: of a unit in pieces they lie where they lay.
  void place(GradientPass& pass, char* base) {
    Pieces pieces(base);
    panels_.clear();
    lanes_ = sizes_.lanes_of(pass);
    for (GradientUnit& unit : pass) {
      unit.tiles = pieces.take(o_.chunks(unit.b) * sizes_.tiles.tile_bytes());
      unit.sums = reinterpret_cast<float*>(pieces.take(o_.chunks(unit.b) * sizes_.chunk_sums * int64_t{sizeof(float)}));
    }
    for (const GradientUnit& unit : pass)
      for (const RowRange& range : unit.ranges) {
        PanelItem item{};
        item.range = range;
        item.unit = &unit - pass.data();
        const int64_t rows = sizes_.padded(int64_t{range.rows} * range.heads);
        item.queries = pieces.take(rows * o_.padded_dim * sizes_.number_bytes);
        item.queries_across = pieces.take(rows * o_.padded_dim * sizes_.number_bytes);
        item.reaching = pieces.take(rows * o_.padded_value_dim * sizes_.number_bytes);
        item.reaching_across = pieces.take(rows * o_.padded_value_dim * sizes_.number_bytes);
        item.lse = reinterpret_cast<float*>(pieces.take(rows * int64_t{sizeof(float)}));
        item.level = reinterpret_cast<float*>(pieces.take(rows * int64_t{sizeof(float)}));
        item.positions = reinterpret_cast<int64_t*>(pieces.take(rows * int64_t{sizeof(int64_t)}));
        if (call_.queries.data != nullptr)
          item.sums = reinterpret_cast<float*>(pieces.take(lanes_ * rows * o_.padded_dim * int64_t{sizeof(float)}));
        panels_.push_back(item);
      }
    done_ = std::make_unique<std::atomic<int64_t>[]>(panels_.size() * lanes_);
  }

  void pack_panel(Worker& worker, PanelItem& item) {
    PanelRows& rows = worker.rows;
    rows.collect(o_, item.range);
    item.block = rows.block();
    item.rows = static_cast<int>(rows.size());
    item.padded_rows = static_cast<int>(sizes_.padded(item.rows));
    const Range reached = item.rows > 0 ? reachable(item.block) : Range{0, 0};
    item.first_strip = reached.empty() ? 0 : reached.begin / strip();
    item.past_strip = reached.empty() ? 0 : ceil_div(reached.end, strip());
    for (int64_t strip = item.first_strip; strip < item.first_strip + lanes_; ++strip)
      done(item, strip).store(strip, std::memory_order_relaxed);
    if (item.rows == 0) return;

    alignas(64) static const float nothing[kMaxHeadDim] = {};
    std::vector<const void*> queries, reaching;
    for (int r = 0; r < item.rows; ++r) {
      const int64_t head = rows.head(r), token = rows.token(r);
      const float lse = *rows.lse(r);
      const bool empty = lse == -std::numeric_limits<float>::infinity();
      queries.push_back(o_.call.q.row(item.block.b, head, token));
      reaching.push_back(empty ? static_cast<const void*>(nothing) : call_.reaching.row(item.block.b, head, token));
      item.lse[r] = empty ? 0.0f : lse * kLog2E;
      item.level[r] = level(item.block.b, head, token);
      item.positions[r] = rows.position(r);
    }
    const float factor = pairs_ ? 1.0f : o_.call.softcap > 0 ? o_.call.scale : o_.call.scale * kLog2E;
    kernels_.pack({o_.call.q.dtype, item.rows, item.padded_rows, o_.call.q.dim, o_.padded_dim, queries.data(), factor,
                   item.queries, item.queries_across, worker.scratch});
    kernels_.pack({o_.call.q.dtype, item.rows, item.padded_rows, o_.call.v.dim, o_.padded_value_dim, reaching.data(),
                   1.0f, item.reaching, item.reaching_across, worker.scratch});
    if (item.sums != nullptr) std::fill_n(item.sums, lanes_ * lane_floats(item), 0.0f);
  }

  int64_t lane_floats(const PanelItem& item) const { return int64_t{item.padded_rows} * o_.padded_dim; }
  // The first strip of this one's lane that has not added to the panel's queries.
  std::atomic<int64_t>& done(const PanelItem& item, int64_t strip) const {
    return done_[(&item - panels_.data()) * lanes_ + strip % lanes_];
  }

  // Of a live row: the output times what reaches it, less what reaches the LSE.
  float level(int64_t b, int64_t head, int64_t token) const {
    const int64_t n = (b * o_.call.q.heads + head) * o_.call.q.tokens + token;
    const float of_lse = call_.reaching_lse != nullptr ? call_.reaching_lse[n] : 0.0f;
    if (o_.call.lse[n] == -std::numeric_limits<float>::infinity()) return 0.0f;
    return kernels_.product(o_.call.out.row(b, head, token), call_.reaching.row(b, head, token), o_.call.q.dtype,
                            o_.call.v.dim) -
           of_lse;
  }

  void pack_keys(const GradientPass& pass) {
    std::vector<std::pair<const GradientUnit*, int64_t>> chunks;
    for (const GradientUnit& unit : pass)
      for (int64_t chunk = 0; chunk < o_.chunks(unit.b); ++chunk) chunks.emplace_back(&unit, chunk);
    run_jobs(static_cast<int64_t>(chunks.size()), [&](Worker&, int64_t n) {
      const auto [unit, chunk] = chunks[static_cast<size_t>(n)];
      const int64_t keys = o_.plan.extent().key_count[unit->b];
      const int count = static_cast<int>(std::min<int64_t>(kChunk, keys - chunk * kChunk));
      int32_t positions[kChunk];
      for (int t = 0; t < count; ++t) positions[t] = static_cast<int32_t>(chunk * kChunk + t);
      pack_tile(*unit, positions, count, unit->tiles + chunk * sizes_.tiles.tile_bytes());
      std::fill_n(unit->sums + chunk * sizes_.chunk_sums, sizes_.chunk_sums, 0.0f);
    });
  }

  void pack_tile(const GradientUnit& unit, const int32_t* positions, int count, char* to) const {
    const Extent& extent = o_.plan.extent();
    int64_t slots[kChunk];
    for (int t = 0; t < kChunk; ++t) {
      const bool live = t < count && positions[t] >= 0 && positions[t] < extent.key_count[unit.b];
      slots[t] = live ? extent.key_slot(unit.b, positions[t]) : -1;
    }
    PointedRows keys, values;
    o_.call.k.point_at(*o_.kernels.scores, unit.b, unit.group, slots, keys);
    o_.call.v.point_at(*o_.kernels.scores, unit.b, unit.group, slots, values);
    const DType dtype = o_.call.k.dtype;
    const int dim = o_.call.k.dim, value_dim = o_.call.v.dim;
    char* key_rows = to + sizes_.tiles.key_bytes;
    o_.kernels.pack({dtype, keys.rows, keys.rows, dim, dim, o_.padded_dim, o_.padded_dim, to, key_rows});
    o_.kernels.pack({dtype, values.rows, values.rows, value_dim, value_dim, o_.padded_value_dim, o_.padded_value_dim,
                     key_rows + kChunk * o_.padded_dim * sizes_.number_bytes, nullptr});
  }

  // Strips of all units side by side, the first of each first: jobs begin in this order, so that one only ever waits
  // for such that have begun.
  void add_strips(const GradientPass& pass) {
    struct Job {
      int64_t unit, strip;
    };
    std::vector<Job> jobs;
    int64_t most = 0;
    for (const GradientUnit& unit : pass) most = std::max(most, ceil_div(o_.chunks(unit.b), strip_chunks_));
    for (int64_t strip = 0; strip < most; ++strip)
      for (size_t unit = 0; unit < pass.size(); ++unit)
        if (strip * strip_chunks_ < o_.chunks(pass[unit].b)) jobs.push_back({static_cast<int64_t>(unit), strip});
    failed_ = false;
    std::atomic<size_t> next{0};  // which of several threads gets which number first, nobody promises
    run_jobs(static_cast<int64_t>(jobs.size()), [&](Worker& worker, int64_t) {
      const Job job = jobs[next++];
      try {
        for (PanelItem& item : panels_)
          if (item.unit == job.unit) add_strip(worker, pass[static_cast<size_t>(job.unit)], job.strip, item);
      } catch (...) {
        failed_ = true;
        throw;
      }
    });
  }

  void add_strip(Worker& worker, const GradientUnit& unit, int64_t strip, PanelItem& item) {
    if (strip < item.first_strip || strip >= item.past_strip) return;
    std::atomic<int64_t>& next = done(item, strip);
    const PackedTiles packed{unit.tiles, sizes_.tiles.key_bytes, sizes_.tiles.value_bytes};
    worker.worklist.build_within(item.block, packed, {strip * this->strip(), (strip + 1) * this->strip()});
    const int64_t consecutive = static_cast<int64_t>(worker.worklist.tiles().size());
    gather(worker, unit, item.block);
    const auto& tiles = worker.worklist.tiles();
    const int64_t total = static_cast<int64_t>(tiles.size());
    float* gathered = reinterpret_cast<float*>(
        worker.sums.reserve((total - consecutive) * sizes_.chunk_sums * int64_t{sizeof(float)}));
    std::fill_n(gathered, (total - consecutive) * sizes_.chunk_sums, 0.0f);
    worker.targets.clear();
    for (int64_t n = 0; n < total; ++n)
      worker.targets.push_back(n < consecutive ? unit.sums + tiles[n].first_position / kChunk * sizes_.chunk_sums
                                               : gathered + (n - consecutive) * sizes_.chunk_sums);
    // The strips before come first in every sum of a query.
    for (int spins = 0; next.load(std::memory_order_acquire) < strip && !failed_; ++spins)
      if (spins > 1000) std::this_thread::yield();
    if (total > 0 && !failed_) add_tiles(worker, item, total, strip % lanes_);
    next.store(strip + lanes_, std::memory_order_release);
    for (int64_t n = consecutive; n < total; ++n) scatter(unit, tiles[n], worker.targets[n]);
  }

  void gather(Worker& worker, const GradientUnit& unit, const QueryBlock& block) const {
    const auto& positions = worker.worklist.gathered();
    if (positions.empty()) return;
    const int64_t total = static_cast<int64_t>(positions.size());
    char* base = worker.gathered.reserve(ceil_div(total, kChunk) * sizes_.tiles.tile_bytes());
    for (int64_t n = 0; n * kChunk < total; ++n)
      pack_tile(unit, positions.data() + n * kChunk, static_cast<int>(std::min<int64_t>(kChunk, total - n * kChunk)),
                base + n * sizes_.tiles.tile_bytes());
    worker.worklist.add_gathered(block, {base, sizes_.tiles.key_bytes, sizes_.tiles.value_bytes}, positions.data());
  }

  void add_tiles(Worker& worker, const PanelItem& item, int64_t total, int64_t lane) const {
    GradientPanel panel{};
    panel.rows = item.rows;
    panel.padded_rows = item.padded_rows;
    panel.padded_head_dim = o_.padded_dim;
    panel.padded_value_dim = o_.padded_value_dim;
    panel.queries = item.queries;
    panel.queries_across = item.queries_across;
    panel.reaching = item.reaching;
    panel.reaching_across = item.reaching_across;
    panel.lse = item.lse;
    panel.level = item.level;
    panel.positions = item.positions;
    panel.scale = o_.call.scale;
    panel.softcap = o_.call.softcap;
    panel.rules = item.block.rules;
    panel.tiles = worker.worklist.tiles().data();
    panel.sums = worker.targets.data();
    panel.tile_count = total;
    panel.query_sums = item.sums == nullptr ? nullptr : item.sums + lane * lane_floats(item);
    panel.needs_keys = call_.keys.data != nullptr;
    panel.needs_values = call_.values.data != nullptr;
    panel.scratch = worker.scratch;
    kernels_.add(panel);
  }

  // Sums of gathered keys, to where those keys are.
  void scatter(const GradientUnit& unit, const Tile& tile, const float* sums) const {
    for (int t = 0; t < tile.count; ++t) {
      const int64_t position = tile.positions[t];
      if (position < 0 || position >= o_.plan.extent().key_count[unit.b]) continue;
      float* to = unit.sums + position / kChunk * sizes_.chunk_sums + position % kChunk;
      for (int64_t n = 0; n < sizes_.chunk_sums; n += kChunk) to[n] += sums[n + t];
    }
  }

  void write_queries(Worker& worker, const PanelItem& item) {
    worker.rows.collect(o_, item.range);
    for (int64_t lane = 1; lane < lanes_; ++lane)
      for (int64_t n = 0; n < lane_floats(item); ++n) item.sums[n] += item.sums[lane * lane_floats(item) + n];
    for (int r = 0; r < item.rows; ++r)
      kernels_.write_row(item.sums + int64_t{r} * o_.padded_dim, o_.call.q.dtype, o_.call.q.dim, o_.call.scale,
                         call_.queries.row(item.block.b, worker.rows.head(r), worker.rows.token(r)));
  }

  void write_keys(const GradientPass& pass) {
    std::vector<std::pair<const GradientUnit*, int64_t>> chunks;
    for (const GradientUnit& unit : pass)
      for (int64_t chunk = 0; chunk < o_.chunks(unit.b); ++chunk) chunks.emplace_back(&unit, chunk);
    // Queries of floats carry the factor of the logits, in powers of two unless there is a soft-cap.
    const float factor = pairs_ ? o_.call.scale : o_.call.softcap > 0 ? 1.0f : 1.0f / kLog2E;
    run_jobs(static_cast<int64_t>(chunks.size()), [&](Worker&, int64_t n) {
      const auto [unit, chunk] = chunks[static_cast<size_t>(n)];
      const float* sums = unit->sums + chunk * sizes_.chunk_sums;
      write_tensor(*unit, chunk, call_.keys, o_.padded_dim, sums, factor);
      write_tensor(*unit, chunk, call_.values, o_.padded_value_dim, sums + int64_t{kChunk} * o_.padded_dim, 1.0f);
    });
  }

  void write_tensor(const GradientUnit& unit, int64_t chunk, const TensorView& to, int padded_dim, const float* sums,
                    float factor) const {
    if (to.data == nullptr) return;
    const Extent& extent = o_.plan.extent();
    void* rows[kChunk];
    for (int t = 0; t < kChunk; ++t) {
      const int64_t position = chunk * kChunk + t;
      rows[t] = position < extent.key_count[unit.b] ? to.row(unit.b, unit.group, extent.key_slot(unit.b, position))
                                                    : nullptr;
    }
    kernels_.write_keys({to.dtype, to.dim, padded_dim, sums, factor, rows});
  }

  const Operands& o_;
  const GradientCall& call_;
  const GradientKernels& kernels_;
  const GradientSizes sizes_;
  const bool pairs_;
  const int64_t strip_chunks_;
  std::vector<std::unique_ptr<Worker>> workers_;  // one a thread
  int64_t lanes_ = 1;                              // of this pass, as what follows
  std::vector<PanelItem> panels_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;  // by panel and lane
  std::atomic<bool> failed_{false};
};

// One thread a head, in the order of the rows.
void find_sinks(const Operands& o, const GradientCall& call) {
  const AttentionCall& attended = o.call;
  const Extent& extent = o.plan.extent();
  run_parallel(attended.threads, attended.q.heads, [&](int, int64_t head) {
    double sum = 0;
    for (int64_t b = 0; b < o.plan.batch(); ++b)
      for (int64_t row = 0; row < extent.query_count[b]; ++row) {
        const int64_t token = extent.first_query(b) + row;
        const int64_t n = (b * attended.q.heads + head) * attended.q.tokens + token;
        const float sink = attended.sinks[head], lse = attended.lse[n];
        const double of_lse = call.reaching_lse != nullptr ? call.reaching_lse[n] : 0.0;
        const double of_out = o.kernels.gradients->product(attended.out.row(b, head, token),
                                                           call.reaching.row(b, head, token), attended.q.dtype,
                                                           attended.v.dim);
        sum -= (sink == lse ? 1.0 : std::exp(double{sink} - lse)) * (of_out - of_lse);
      }
    call.sinks[head] = static_cast<float>(sum);
  });
}

}  // namespace

void find_gradients(const Kernels& kernels, const Plan& plan, const GradientCall& call) {
  if (plan.batch() == 0 || plan.query_len == 0 || plan.heads == 0) return;
  const Operands operands(kernels, plan, call.attended);
  if (call.sinks != nullptr) find_sinks(operands, call);
  const bool more = call.queries.data != nullptr || call.keys.data != nullptr || call.values.data != nullptr;
  if (more) Gradients(operands, call).run();
}

}  // namespace gossamer
