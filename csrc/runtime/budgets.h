// In which pieces a call is worked off. Tests build with small ones, so that small inputs take many of each.
#pragma once

#include <cstdint>

namespace gossamer {

#ifndef GOSSAMER_SMALL_BUDGETS
// Packed tiles held at once: heads are worked off in passes that fit, or one by one.
constexpr int64_t kPackBytes = int64_t{192} << 20;
// Of them, tiles of columns that the query blocks of a batch row share.
constexpr int64_t kColumnBytes = int64_t{192} << 20;
// Packed tiles of a stretch of a few queries' keys: a share of the L2 cache.
constexpr int64_t kStretchBytes = 256 << 10;
// Tiles of a stretch that few queries read where they are stored.
constexpr int64_t kStoredTiles = 8;
// Tiles of 64 keys that some rows of a call run over before their results are merged.
constexpr int64_t kRowTiles = 32;
// Tiles of 64 keys that the probe sums before partial sums are combined.
constexpr int64_t kProbeTiles = 32;
// Rows of cells, and the bytes of their queries, against which antidiagonals pack a tile of keys once.
constexpr int64_t kCellRows = 256;
constexpr int64_t kCellBytes = 4 << 20;
// Panels, tiles and sums that gradients hold at once: heads are worked off in passes that fit, or in pieces of one.
constexpr int64_t kGradientBytes = int64_t{176} << 20;
// Packed tiles, and sums, of a strip of keys whose gradients one thread finds: half of the L2 cache.
constexpr int64_t kStripBytes = 1 << 20;
#else
constexpr int64_t kGradientBytes = 256 << 10;
constexpr int64_t kStripBytes = 1;
constexpr int64_t kPackBytes = 256 << 10;
constexpr int64_t kColumnBytes = 128 << 10;
constexpr int64_t kStretchBytes = 32 << 10;
constexpr int64_t kStoredTiles = 3;
constexpr int64_t kRowTiles = 2;
constexpr int64_t kProbeTiles = 2;
constexpr int64_t kCellRows = 8;
constexpr int64_t kCellBytes = 16 << 10;
#endif

}  // namespace gossamer
