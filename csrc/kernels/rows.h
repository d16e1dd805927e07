// Which of a tile's 64 keys a row attends, as a bit mask.
#pragma once

#include <cstdint>

#include "kernels/integers.h"
#include "kernels/job.h"

namespace gossamer {
namespace {

// Number of ascending positions before the given one.
inline int positions_before(const int32_t* positions, int count, int64_t position) {
  int low = 0;
  while (count > 0) {
    const int half = count / 2;
    if (positions[low + half] < position) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// Keys of a scattered tile by position: which of them lie in a range is then the difference of two sets.
class SortedKeys {
 public:
  void sort(const Tile& tile) {
    uint64_t bits[kChunk];
    count_ = tile.count;
    for (int t = 0; t < count_; ++t) {
      int n = t;
      for (; n > 0 && positions_[n - 1] > tile.positions[t]; --n) {
        positions_[n] = positions_[n - 1];
        bits[n] = bits[n - 1];
      }
      positions_[n] = tile.positions[t];
      bits[n] = uint64_t{1} << t;
    }
    first_[0] = 0;
    for (int n = 0; n < count_; ++n) first_[n + 1] = first_[n] | bits[n];
  }
  // At positions [begin, end), as a bit mask.
  uint64_t between(int64_t begin, int64_t end) const {
    const uint64_t before = begin > 0 ? first_[positions_before(positions_, count_, begin)] : 0;
    return first_[positions_before(positions_, count_, end)] & ~before;
  }

 private:
  int count_ = 0;
  int32_t positions_[kChunk];
  uint64_t first_[kChunk + 1];  // bits of the first n
};

// The keys that a query may see at all: [begin, end).
inline int64_t allowed_begin(const Rules& rules, int64_t query) {
  const int64_t begin = query - rules.limit + 1;
  return begin > 0 ? begin : 0;
}

inline int64_t allowed_end(const Rules& rules, int64_t query) {
  const int64_t end = query + (rules.causal ? 1 : rules.limit);
  return end < rules.key_count ? end : rules.key_count;
}

// Of the panel's row `row`, a query at a position. `sorted` are the keys of the tile, if it is a scattered one.
inline uint64_t row_mask(const Rules& rules, const Tile& tile, const SortedKeys& sorted, int row, int64_t query) {
  const int64_t begin = allowed_begin(rules, query);
  const int64_t end = allowed_end(rules, query);
  switch (tile.kind) {
    case TileKind::kFull:
      return ~uint64_t{0};
    case TileKind::kConsecutive: {
      const int64_t first = tile.first_position;
      const uint64_t own = tile.row_bits != nullptr ? tile.row_bits[row] : 0;
      const uint64_t selected = tile.key_bits | own | bit_range(0, rules.sink - first) |
                                bit_range(query - rules.window + 1 - first, query + rules.window - first);
      return selected & bit_range(begin - first, end - first);
    }
    case TileKind::kGathered:
      return tile.key_bits & bit_range(positions_before(tile.positions, tile.count, begin),
                                       positions_before(tile.positions, tile.count, end));
    case TileKind::kMeans:
    case TileKind::kSelected:
      return tile.key_bits;
    case TileKind::kScattered: {
      uint64_t selected = tile.key_bits;
      if (rules.sink > 0) selected |= sorted.between(0, rules.sink);
      if (rules.window > 0) selected |= sorted.between(query - rules.window + 1, query + rules.window);
      return selected & sorted.between(begin, end);
    }
  }
  return 0;
}

}  // namespace
}  // namespace gossamer
