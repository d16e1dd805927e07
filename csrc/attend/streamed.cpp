#include "attend/streamed.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "attend/partials.h"
#include "kernels/stored_job.h"
#include "runtime/budgets.h"
#include "runtime/parallel.h"
#include "runtime/workspace.h"

namespace gossamer {
namespace {

constexpr int64_t kCacheLine = 64;
// Rows of a head of the plan that are streamed though they lie in two query blocks.
constexpr int64_t kFewRows = 64;
// Rows that read keys and values where they are stored: packing them pays where more rows read a tile.
constexpr int64_t kReaders = 16;

// A panel and the tiles that it runs over, with the keys that its gathered tiles name.
struct Item {
  RowRange range;
  std::vector<Tile> tiles;
  std::vector<int32_t> gathered;
  int64_t first_stretch = 0, stretches = 0, tiles_a_stretch = 0;
};

// The keys and values of a tile, where they are stored.
struct StoredTile {
  StoredRows keys, values;
};

class Streamed {
 public:
  explicit Streamed(const Operands& operands)
      : o_(operands),
        packed_tiles_(std::max<int64_t>(1, kStretchBytes / o_.tile_bytes())),
        reads_stored_(!o_.kernels.bf16_tiles && o_.call.k.dim == o_.padded_dim &&
                      o_.call.v.dim == o_.padded_value_dim),
        values_fit_(!o_.kernels.bf16_tiles && o_.call.v.dtype == DType::kFloat32 &&
                    o_.call.v.dim == o_.padded_value_dim) {}

  void run(const std::vector<int64_t>& batch_rows) {
    for (const int64_t b : batch_rows) list_items(b);
    const int threads = static_cast<int>(std::max(1, o_.call.threads));
    run_parallel(threads, static_cast<int64_t>(items_.size()), [&](int, int64_t n) { list_tiles(items_[n]); });
    for (Item& item : items_) {
      item.first_stretch = stretches_;
      item.tiles_a_stretch = is_stored(item) ? kStoredTiles : packed_tiles_;
      item.stretches = std::max<int64_t>(1, ceil_div(static_cast<int64_t>(item.tiles.size()), item.tiles_a_stretch));
      stretches_ += item.stretches;
    }
    place(nullptr, threads);
    KeptBuffer buffer;
    place(buffer.reserve(bytes_), threads);
    run_parallel(threads, stretches_, [&](int thread, int64_t n) { attend(thread, n); });
    run_parallel(threads, static_cast<int64_t>(items_.size()), [&](int, int64_t n) { merge(items_[n]); });
  }

 private:
  void list_items(int64_t b) {
    const Plan& plan = o_.plan;
    const int64_t share = o_.heads_a_plan_head;
    for (int64_t h = 0; h < plan.heads; ++h)
      for (int64_t m = 0; m < plan.row_blocks(b); ++m) {
        const Range rows = plan.rows(b, m);
        const int64_t heads_at_once = std::clamp<int64_t>(kMaxRows / rows.size(), 1, share);
        for (int64_t head = 0; head < share; head += heads_at_once) {
          const int64_t heads = std::min(heads_at_once, share - head);
          Item item;
          item.range = {int32_t(b), int32_t(h), int32_t(m), int32_t(h * share + head), int32_t(heads),
                        int32_t(rows.begin), int32_t(rows.size())};
          most_rows_ = std::max(most_rows_, heads * rows.size());
          items_.push_back(std::move(item));
        }
      }
  }

  bool is_stored(const Item& item) const { return reads_stored_ && item.range.heads * item.range.rows <= kReaders; }

  void list_tiles(Item& item) const {
    PanelRows rows;
    rows.collect(o_, item.range);
    Worklist worklist(o_.plan, o_.chunks(item.range.b));
    worklist.build(rows.block(), o_.tiles(nullptr), nullptr, nullptr);
    item.gathered = worklist.gathered();
    worklist.add_gathered(rows.block(), o_.tiles(nullptr), item.gathered.data());
    item.tiles = worklist.tiles();
  }

  void place(char* base, int threads) {
    Pieces pieces(base);
    scratch_.resize(threads);
    packed_.resize(threads);
    for (char*& scratch : scratch_) scratch = pieces.take(panel_scratch_bytes(o_.padded_dim, o_.padded_value_dim));
    for (char*& packed : packed_) packed = pieces.take(std::max(packed_tiles_, kStoredTiles) * o_.tile_bytes());
    partials_.place(pieces, stretches_, most_rows_, o_.call.v.dim);
    bytes_ = pieces.taken();
  }

  void attend(int thread, int64_t stretch) {
    const auto after = std::upper_bound(items_.begin(), items_.end(), stretch,
                                        [](int64_t n, const Item& item) { return n < item.first_stretch; });
    const Item& item = *(after - 1);
    const int64_t total = static_cast<int64_t>(item.tiles.size());
    const int64_t first = std::min(total, (stretch - item.first_stretch) * item.tiles_a_stretch);
    const int64_t last = std::min(total, first + item.tiles_a_stretch);
    PanelRows rows;
    rows.collect(o_, item.range);
    Panel panel = rows.panel(o_);

    std::vector<Tile> tiles(item.tiles.begin() + first, item.tiles.begin() + last);
    const PackedTiles packed = o_.tiles(packed_[thread]);
    StoredTile stored[kStoredTiles];
    for (int64_t n = 0; n < last - first; ++n) {
      if (is_stored(item)) {
        place_stored(item.range, tiles[n], stored[n], packed.keys(n), packed.values(n));
        continue;
      }
      if (n + 1 < last - first) prefetch(item.range, tiles[n + 1]);
      pack(item.range, tiles[n], packed.keys(n), packed.values(n));
    }
    panel.tiles = tiles.data();
    panel.tile_count = last - first;
    panel.scratch = scratch_[thread];

    if (item.stretches > 1) partials_.direct(panel, stretch, stretch == item.first_stretch);
    o_.kernels.attend(panel);
  }

  // Where a tile's keys and values are stored; those that are not stored alike are copied first.
  void place_stored(const RowRange& range, Tile& tile, StoredTile& to, char* key_room, char* value_room) const {
    const int count = keys_of(tile, range.b);
    place_rows(o_.call.k, range, tile, count, to.keys, key_room);
    place_rows(o_.call.v, range, tile, count, to.values, value_room);
    tile.stored_keys = &to.keys;
    tile.stored_values = &to.values;
  }

  void place_rows(const Tokens& tokens, const RowRange& range, const Tile& tile, int count, StoredRows& to,
                  char* room) const {
    const Extent& extent = o_.plan.extent();
    const int64_t keys = extent.key_count[range.b], start = extent.key_start[range.b];
    const int64_t group = o_.group_of(range.plan_head);
    int64_t lowest = tile.first_position, highest = tile.first_position + count - 1;
    if (tile.positions != nullptr) {
      lowest = keys;
      highest = -1;
      for (int t = 0; t < count; ++t) {
        if (tile.positions[t] < 0 || tile.positions[t] >= keys) continue;
        lowest = std::min<int64_t>(lowest, tile.positions[t]);
        highest = std::max<int64_t>(highest, tile.positions[t]);
      }
    }
    if (lowest <= highest && tokens.stored(range.b, group, start + lowest, start + highest, to)) {
      to.first += start + (tile.positions == nullptr ? tile.first_position : 0);
      to.positions = tile.positions;
      to.most = keys;
    } else {
      copy_rows(tokens, range.b, group, tile, count, room);
      to = {};
      to.dtype = tokens.dtype;
      to.dim = tokens.dim;
      to.rows = room;
      to.row_stride = tokens.row_bytes();
    }
    to.count = count;
  }

  void copy_rows(const Tokens& tokens, int64_t b, int64_t group, const Tile& tile, int count, char* room) const {
    const Extent& extent = o_.plan.extent();
    int64_t slots[kChunk];
    for (int t = 0; t < kChunk; ++t) {
      const int64_t position = tile.positions == nullptr || t >= count ? tile.first_position + t : tile.positions[t];
      const bool live = t < count && position >= 0 && position < extent.key_count[b];
      slots[t] = live ? extent.key_slot(b, position) : -1;
    }
    PointedRows pointed;
    tokens.point_at(*o_.kernels.scores, b, group, slots, pointed);
    const size_t bytes = static_cast<size_t>(tokens.row_bytes());
    for (int t = 0; t < count; ++t) {
      if (pointed.rows[t] == nullptr)
        std::memset(room + t * bytes, 0, bytes);
      else
        std::memcpy(room + t * bytes, pointed.rows[t], bytes);
    }
  }

  // The rows of a tile, while the one before it is packed. The barrier keeps gcc from taking a function that only
  // fetches ahead for one without effect, and dropping the call.
  void prefetch(const RowRange& range, const Tile& tile) const {
    __asm__ volatile("" ::: "memory");
    const TensorView *keys = o_.call.k.tensor(), *values = o_.call.v.tensor();
    if (keys == nullptr || values == nullptr) return;
    const int64_t group = o_.group_of(range.plan_head);
    const int64_t key_bytes = keys->row_bytes(), value_bytes = values->row_bytes();
    const Extent& extent = o_.plan.extent();
    const int count = keys_of(tile, range.b);
    for (int t = 0; t < count; ++t) {
      const int64_t position = tile.positions != nullptr ? tile.positions[t] : tile.first_position + t;
      const int64_t slot = extent.key_slot(range.b, position);
      const char* key = keys->row(range.b, group, slot);
      const char* value = values->row(range.b, group, slot);
      for (int64_t byte = 0; byte < key_bytes; byte += kCacheLine) __builtin_prefetch(key + byte, 0, 2);
      for (int64_t byte = 0; byte < value_bytes; byte += kCacheLine) __builtin_prefetch(value + byte, 0, 2);
    }
  }

  // Live keys alone: those of a batch row end where its last tile may not.
  int keys_of(const Tile& tile, int64_t b) const {
    if (tile.positions != nullptr) return tile.count;
    return static_cast<int>(std::min<int64_t>(tile.count, o_.plan.extent().key_count[b] - tile.first_position));
  }

  void pack(const RowRange& range, Tile& tile, char* keys, char* values) const {
    int32_t consecutive[kChunk];
    const int32_t* positions = tile.positions;
    const int count = keys_of(tile, range.b);
    if (positions == nullptr) {
      for (int t = 0; t < count; ++t) consecutive[t] = static_cast<int32_t>(tile.first_position + t);
      positions = consecutive;
    }
    const int64_t group = o_.group_of(range.plan_head);
    EvenRows own{nullptr, 0};
    if (values_fit_ && tile.positions == nullptr && count == kChunk)
      own = o_.call.v.in_place(range.b, group, o_.plan.extent().key_slot(range.b, tile.first_position), kChunk);
    const bool in_place = own.first != nullptr && own.stride > 0;
    o_.pack(range.b, group, positions, count, keys, in_place ? nullptr : values);
    tile.keys = keys;
    tile.values = in_place ? own.first : values;
    tile.value_stride = in_place ? own.stride / int64_t{sizeof(float)} : 0;
  }

  void merge(const Item& item) const {
    if (item.stretches == 1) return;
    PanelRows rows;
    rows.collect(o_, item.range);
    partials_.merge(rows, item.first_stretch, item.stretches, o_.call.out.dtype);
  }

  const Operands& o_;
  const int64_t packed_tiles_;  // of a stretch
  const bool reads_stored_;     // whether few rows do
  // Rows of values are what the kernel multiplies, but for dead ones, which may hold anything.
  const bool values_fit_;
  std::vector<Item> items_;
  int64_t stretches_ = 0, most_rows_ = 0, bytes_ = 0;
  std::vector<char*> scratch_, packed_;  // one a thread
  Partials partials_;
};

}  // namespace

bool fits_streamed(const Operands& operands, int64_t b) {
  const Plan& plan = operands.plan;
  const Extent& extent = plan.extent();
  const int64_t rows = extent.query_count[b] * operands.heads_a_plan_head, blocks = plan.grid.row_blocks(b);
  // Stretches would begin anew with what a row leaves out, and means are packed for all query blocks.
  if (plan.permuted() || plan.pruned_mean || plan.skips() || rows > kMaxRows) return false;
  // Two blocks read the keys twice: a few tokens that happen to lie across the border of blocks.
  if (blocks > 1 && (blocks > 2 || rows > kFewRows)) return false;
  // Heads of the plan that share a key/value head pack it again, which pays where they need little of it.
  const int64_t groups = operands.call.k.heads;
  if (plan.heads == groups) return true;
  int64_t keys = 0;
  for (int64_t h = 0; h < plan.heads; ++h)
    for (int64_t m = 0; m < blocks; ++m) keys += listed_keys(plan, b, h, m);
  return keys <= 2 * groups * extent.key_count[b];
}

void run_streamed(const Operands& operands, const std::vector<int64_t>& batch_rows) {
  Streamed(operands).run(batch_rows);
}

}  // namespace gossamer
