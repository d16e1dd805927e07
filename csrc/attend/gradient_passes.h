// In which pieces gradients are worked off: heads, panels of query rows, and the memory that they take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attend/operands.h"
#include "kernels/integers.h"
#include "runtime/budgets.h"

namespace gossamer {

// Where few heads are worked off at once, the strips of a head run side by side; so that they do not wait for each
// other at every panel, neighbours add to sums of their own, which are added up at the end.
constexpr int64_t kMostLanes = 4;

// A key/value head of a batch row, or some panels of one whose panels do not fit at once: then its keys and their sums
// stay from pass to pass.
struct GradientUnit {
  int64_t b, group;
  std::vector<RowRange> ranges;
  bool begins, ends;
  char* tiles = nullptr;
  float* sums = nullptr;
};

using GradientPass = std::vector<GradientUnit>;

class GradientSizes {
  const Operands& o_;
  const bool needs_queries_;

 public:
  const int64_t number_bytes;  // of a number of a packed row
  const PackedTiles tiles;     // keys; then keys as values are, and values as keys are
  const int64_t chunk_sums;    // floats of the sums of 64 keys

  GradientSizes(const Operands& operands, bool needs_queries)
      : o_(operands),
        needs_queries_(needs_queries),
        number_bytes(operands.kernels.bf16_tiles ? 2 : 4),
        tiles{nullptr, kChunk * o_.padded_dim * number_bytes,
              kChunk * (o_.padded_dim + o_.padded_value_dim) * number_bytes},
        chunk_sums(int64_t{kChunk} * (o_.padded_dim + o_.padded_value_dim)) {}

  int64_t padded(int64_t rows) const { return ceil_div(rows, kRowPadding) * kRowPadding; }
  int64_t panel_bytes(const RowRange& range, int64_t lanes) const {
    const int64_t rows = padded(int64_t{range.rows} * range.heads);
    const int64_t packed = 2 * rows * (o_.padded_dim + o_.padded_value_dim) * number_bytes;
    return packed + rows * (2 * int64_t{sizeof(float)} + int64_t{sizeof(int64_t)}) + 8 * 64 +
           (needs_queries_ ? lanes * rows * o_.padded_dim * int64_t{sizeof(float)} : 0);
  }
  int64_t key_bytes(int64_t b) const {
    return o_.chunks(b) * (tiles.tile_bytes() + chunk_sums * int64_t{sizeof(float)}) + 2 * 64;
  }
  int64_t unit_bytes(const GradientUnit& unit, int64_t lanes) const {
    int64_t bytes = key_bytes(unit.b);
    for (const RowRange& range : unit.ranges) bytes += panel_bytes(range, lanes);
    return bytes;
  }
  int64_t pass_bytes(const GradientPass& pass, int64_t lanes) const {
    int64_t bytes = 0;
    for (const GradientUnit& unit : pass) bytes += unit_bytes(unit, lanes);
    return bytes;
  }
  // As many as there is room for.
  int64_t lanes_of(const GradientPass& pass) const {
    int64_t lanes = std::max<int64_t>(1, kMostLanes / static_cast<int64_t>(pass.size()));
    while (lanes > 1 && pass_bytes(pass, lanes) > kGradientBytes) --lanes;
    return lanes;
  }

  // Fixed by sizes alone, so that threads do not change the order of a sum.
  std::vector<GradientPass> passes() const;

 private:
  std::vector<RowRange> ranges_of(int64_t b, int64_t group) const;
  void add_in_pieces(const GradientUnit& whole, std::vector<GradientPass>& passes) const;
};

}  // namespace gossamer
