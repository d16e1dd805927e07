// Exact number of pairs in a plan. A tile that all rows of a query block see whole is counted at once, the others row
// by row; bands are counted for all keys, then blocks and columns for what the bands leave.
#include <algorithm>
#include <vector>

#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kBlocksAJob = 64;

int64_t length(int64_t low, int64_t high) { return std::max<int64_t>(0, high - low); }

// Of one head of the plan in a batch row.
class Counter {
 public:
  Counter(const Plan& plan, int64_t b, int64_t head)
      : plan_(plan),
        extent_(plan.extent()),
        b_(b),
        head_(head),
        count_(extent_.key_count[b]),
        sink_(plan.sink[head]),
        window_(plan.window[head]) {}

  int64_t block_pairs(int64_t m) const {
    const Range queries = plan_.grid.queries(b_, m);
    if (queries.empty()) return 0;
    const int64_t list = plan_.block_list(b_, head_, m), block_k = plan_.grid.block_k;
    const int64_t first = queries.begin, last = queries.end - 1;
    const Row blocks = plan_.blocks.row(list);
    int64_t total = 0;
    if (sink_ > 0 || window_ > 0)
      for (int64_t p = first; p <= last; ++p) total += band_pairs(p, 0, count_);
    for (const int64_t block : blocks)
      total += tile_pairs(first, last, std::max<int64_t>(0, block * block_k), std::min((block + 1) * block_k, count_));

    const int32_t* covering = blocks.begin();
    for (const int64_t column : plan_.columns.row(plan_.column_list(b_, head_, m))) {
      if (extent_.causal && column > last) break;
      while (covering < blocks.end() && (*covering + int64_t{1}) * block_k <= column) ++covering;
      if (covering < blocks.end() && *covering * block_k <= column) continue;
      total += column_pairs(first, last, column);
    }
    return total;
  }

 private:
  // Narrows keys [low, high) to those that a query may attend at all.
  void allow(int64_t p, int64_t& low, int64_t& high) const {
    if (extent_.causal) high = std::min(high, p + 1);
    low = std::max(low, p - extent_.limit + 1);
    high = std::min(high, p + extent_.limit);
  }

  int64_t band_pairs(int64_t p, int64_t low, int64_t high) const {
    allow(p, low, high);
    const int64_t window_low = std::max(low, p - window_ + 1), window_high = std::min(high, p + window_);
    const int64_t sink_high = std::min(high, sink_);
    return length(low, sink_high) + length(window_low, window_high) -
           length(window_low, std::min(sink_high, window_high));
  }

  // Pairs of a block outside the bands.
  int64_t tile_pairs(int64_t first, int64_t last, int64_t low, int64_t high) const {
    if (low >= high || (extent_.causal && low > last)) return 0;
    const int64_t nearest = std::max(first - (high - 1), low - last);
    const int64_t farthest = std::max(last - low, high - 1 - first);
    if ((!extent_.causal || high - 1 <= first) && farthest < extent_.limit && low >= sink_ && nearest >= window_)
      return (last - first + 1) * (high - low);
    int64_t total = 0;
    for (int64_t p = first; p <= last; ++p) {
      int64_t allowed_low = low, allowed_high = high;
      allow(p, allowed_low, allowed_high);
      total += length(allowed_low, allowed_high) - band_pairs(p, low, high);
    }
    return total;
  }

  // Rows that see one key outside the bands.
  int64_t column_pairs(int64_t first, int64_t last, int64_t key) const {
    if (key >= count_ || key < sink_) return 0;
    const int64_t from = std::max({first, extent_.causal ? key : first, key - extent_.limit + 1});
    const int64_t to = std::min(last, key + extent_.limit - 1) + 1;
    return length(from, to) - length(std::max(from, key - window_ + 1), std::min(to, key + window_));
  }

  const Plan& plan_;
  const Extent& extent_;
  const int64_t b_, head_, count_, sink_, window_;
};

}  // namespace

void count_pairs(const Plan& plan, int64_t* counts, int threads) {
  const int64_t blocks = plan.query_blocks, parts = ceil_div(blocks, kBlocksAJob);
  std::vector<int64_t> partial(plan.batch() * plan.heads * parts);
  run_parallel(threads, static_cast<int64_t>(partial.size()), [&](int, int64_t n) {
    const int64_t row = n / parts;
    const Counter counter(plan, row / plan.heads, row % plan.heads);
    for (int64_t m = n % parts * kBlocksAJob; m < std::min(blocks, (n % parts + 1) * kBlocksAJob); ++m)
      partial[static_cast<size_t>(n)] += counter.block_pairs(m);
  });
  for (size_t n = 0; n < partial.size(); ++n) counts[n / parts] += partial[n];
}

}  // namespace gossamer
