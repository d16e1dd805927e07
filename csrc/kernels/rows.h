// Which of a tile's 64 keys a row attends, as a bit mask.
#pragma once

#include <cstdint>

#include "kernels/integers.h"
#include "kernels/job.h"

namespace gossamer {
namespace {

// Number of ascending slots before the given one.
inline int slots_before(const int32_t* slots, int count, int64_t slot) {
  int low = 0;
  while (count > 0) {
    const int half = count / 2;
    if (slots[low + half] < slot) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// The slots that a row may see at all: [begin, end).
inline int64_t allowed_begin(const Rules& rules, int64_t coordinate) {
  const int64_t begin = coordinate - rules.limit + 1;
  return begin > rules.live_begin ? begin : rules.live_begin;
}

inline int64_t allowed_end(const Rules& rules, int64_t coordinate) {
  const int64_t end = rules.causal ? coordinate + 1 : coordinate + rules.limit;
  return end < rules.live_end ? end : rules.live_end;
}

inline uint64_t row_mask(const Rules& rules, const Tile& tile, int64_t coordinate) {
  const int64_t begin = allowed_begin(rules, coordinate);
  const int64_t end = allowed_end(rules, coordinate);
  switch (tile.kind) {
    case TileKind::kFull:
      return ~uint64_t{0};
    case TileKind::kConsecutive: {
      const int64_t first = tile.first_slot;
      const uint64_t selected =
          tile.key_bits | bit_range(0, rules.sink_end - first) |
          bit_range(coordinate - rules.window + 1 - first, coordinate + rules.window - first);
      return selected & bit_range(begin - first, end - first);
    }
    case TileKind::kGathered:
      return tile.key_bits & bit_range(slots_before(tile.slots, tile.slot_count, begin),
                                       slots_before(tile.slots, tile.slot_count, end));
    case TileKind::kScattered: {
      uint64_t mask = 0;
      for (int t = 0; t < tile.slot_count; ++t) {
        const int64_t slot = tile.slots[t];
        const int64_t distance = slot < coordinate ? coordinate - slot : slot - coordinate;
        const bool selected = (tile.key_bits >> t & 1) || slot < rules.sink_end || distance < rules.window;
        if (selected && slot >= begin && slot < end) mask |= uint64_t{1} << t;
      }
      return mask;
    }
  }
  return 0;
}

}  // namespace
}  // namespace gossamer
