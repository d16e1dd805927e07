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

// The keys that a query may see at all: [begin, end).
inline int64_t allowed_begin(const Rules& rules, int64_t query) {
  const int64_t begin = query - rules.limit + 1;
  return begin > 0 ? begin : 0;
}

inline int64_t allowed_end(const Rules& rules, int64_t query) {
  const int64_t end = query + (rules.causal ? 1 : rules.limit);
  return end < rules.key_count ? end : rules.key_count;
}

inline uint64_t row_mask(const Rules& rules, const Tile& tile, int64_t query) {
  const int64_t begin = allowed_begin(rules, query);
  const int64_t end = allowed_end(rules, query);
  switch (tile.kind) {
    case TileKind::kFull:
      return ~uint64_t{0};
    case TileKind::kConsecutive: {
      const int64_t first = tile.first_position;
      const uint64_t selected = tile.key_bits | bit_range(0, rules.sink - first) |
                                bit_range(query - rules.window + 1 - first, query + rules.window - first);
      return selected & bit_range(begin - first, end - first);
    }
    case TileKind::kGathered:
      return tile.key_bits & bit_range(positions_before(tile.positions, tile.count, begin),
                                       positions_before(tile.positions, tile.count, end));
    case TileKind::kMeans:
      return tile.key_bits;
    case TileKind::kScattered: {
      uint64_t mask = 0;
      for (int t = 0; t < tile.count; ++t) {
        const int64_t key = tile.positions[t];
        const int64_t distance = key < query ? query - key : key - query;
        const bool selected = (tile.key_bits >> t & 1) || key < rules.sink || distance < rules.window;
        if (selected && key >= begin && key < end) mask |= uint64_t{1} << t;
      }
      return mask;
    }
  }
  return 0;
}

}  // namespace
}  // namespace gossamer
