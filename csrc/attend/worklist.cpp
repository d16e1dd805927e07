#include "attend/worklist.h"

#include <algorithm>

#include "kernels/integers.h"

namespace gossamer {
namespace {

// The largest distance between a row and a key of [first, last].
int64_t farthest(const QueryBlock& block, int64_t first, int64_t last) {
  return std::max(block.highest - first, last - block.lowest);
}

// Whether every row may attend every key of [first, last].
bool all_allowed(const QueryBlock& block, int64_t first, int64_t last) {
  const Rules& rules = block.rules;
  return last < rules.key_count && (!rules.causal || last <= block.lowest) &&
         farthest(block, first, last) < rules.limit;
}

}  // namespace

Range reachable(const QueryBlock& block) {
  const Rules& rules = block.rules;
  if (block.lowest > block.highest) return {0, 0};
  return {std::max<int64_t>(block.lowest - rules.limit + 1, 0),
          std::min(rules.key_count, block.highest + (rules.causal ? 1 : rules.limit))};
}

int64_t listed_keys(const Plan& plan, int64_t b, int64_t plan_head, int64_t m) {
  const Extent& extent = plan.extent();
  const int64_t blocks = plan.blocks.row(plan.block_list(b, plan_head, m)).size();
  const int64_t columns = plan.columns.row(plan.column_list(b, plan_head, m)).size();
  const bool up_to_own = extent.causal && plan.q_order == nullptr;
  const int64_t most = up_to_own ? plan.grid.queries(b, m).end : extent.key_count[b];
  const int64_t means = plan.pruned_mean ? plan.grid.wholly_seen(b, m).size() : 0;
  return blocks * plan.grid.block_k + columns + means + std::min(plan.sink[plan_head] + int64_t{plan.window[plan_head]}, most);
}

Worklist::Worklist(const Plan& plan, int64_t most_chunks)
    : plan_(plan),
      selected_(most_chunks),
      touched_(most_chunks),
      pruned_(plan.pruned_mean ? most_chunks : 0) {}  // there are no more blocks than keys

void Worklist::build(const QueryBlock& block, const PackedTiles& packed, const PackedTiles* columns,
                     const ChunkBounds* bounds) {
  tiles_.clear();
  gathered_.clear();
  if (plan_.k_order != nullptr)
    list_permuted(block, packed, bounds);
  else
    list_in_order(block, packed, columns, {0, block.rules.key_count});
}

void Worklist::build_within(const QueryBlock& block, const PackedTiles& packed, Range keys) {
  tiles_.clear();
  gathered_.clear();
  list_in_order(block, packed, nullptr, keys);
}

void Worklist::list_in_order(const QueryBlock& block, const PackedTiles& packed, const PackedTiles* columns,
                             Range keys) {
  const Range reached = reachable(block);
  const int64_t low = std::max(reached.begin, keys.begin), high = std::min(reached.end, keys.end);
  if (low >= high) return;
  const Rules& rules = block.rules;
  const int64_t first_chunk = low / kChunk, last_chunk = (high - 1) / kChunk;
  std::fill(selected_.begin() + first_chunk, selected_.begin() + last_chunk + 1, 0);
  std::fill(touched_.begin() + first_chunk, touched_.begin() + last_chunk + 1, 0);

  const int64_t list = plan_.block_list(block.b, block.plan_head, block.block), block_k = plan_.grid.block_k;
  const Row blocks = plan_.blocks.row(list);
  const int32_t* from = low > 0 ? std::lower_bound(blocks.begin(), blocks.end(), low / block_k) : blocks.begin();
  for (; from < blocks.end(); ++from) {
    const int64_t begin = *from * block_k;
    if (begin >= high) break;
    select(std::max(low, begin), std::min(high, begin + block_k));
  }
  touch(low, std::min(high, rules.sink));
  if (rules.window > 0)
    touch(std::max(low, block.lowest - rules.window + 1), std::min(high, block.highest + rules.window));
  add_columns(block, low, high, columns);

  for (int64_t chunk = first_chunk; chunk <= last_chunk; ++chunk) {
    if (!touched_[chunk]) continue;
    const int64_t first = chunk * kChunk, last = first + kChunk - 1;
    const bool all_selected = selected_[chunk] == ~uint64_t{0} || last < rules.sink ||
                              farthest(block, first, last) < rules.window;
    const TileKind kind =
        all_selected && all_allowed(block, first, last) ? TileKind::kFull : TileKind::kConsecutive;
    tiles_.push_back({packed.keys(chunk), packed.values(chunk), nullptr, first, selected_[chunk], kChunk, kind});
  }
}

// A column inside a listed chunk becomes a bit of it, so that no pair counts twice; the others have tiles of their own.
void Worklist::add_columns(const QueryBlock& block, int64_t low, int64_t high, const PackedTiles* columns) {
  const int64_t list = plan_.column_list(block.b, block.plan_head, block.block);
  const auto [begin, end] = plan_.columns.row(list);
  const int32_t* column = std::lower_bound(begin, end, low);
  const int32_t* past = std::lower_bound(column, end, high);
  if (columns != nullptr) column = begin + (column - begin) / kChunk * kChunk;
  while (column < past) {
    const int count = static_cast<int>(std::min<int64_t>(kChunk, end - column));
    uint64_t bits = 0;
    for (int t = 0; t < count && column + t < past; ++t) {
      const int64_t position = column[t], chunk = position / kChunk;
      if (position < low || position >= high) continue;  // the latter where columns do not ascend
      if (touched_[chunk])
        selected_[chunk] |= uint64_t{1} << (position % kChunk);
      else if (columns != nullptr)
        bits |= uint64_t{1} << t;
      else
        gathered_.push_back(column[t]);
    }
    const int64_t tile = (column - begin) / kChunk;
    if (bits != 0) add_column_tile(block, column, count, bits, columns->keys(tile), columns->values(tile));
    column += count;
  }
}

void Worklist::add_gathered(const QueryBlock& block, const PackedTiles& packed, const int32_t* positions) {
  const int64_t total = static_cast<int64_t>(gathered_.size());
  for (int64_t tile = 0; tile * kChunk < total; ++tile) {
    const int count = static_cast<int>(std::min<int64_t>(kChunk, total - tile * kChunk));
    add_column_tile(block, positions + tile * kChunk, count, bit_range(0, count), packed.keys(tile),
                    packed.values(tile));
  }
}

void Worklist::add_means(const QueryBlock& block, const PackedTiles& means, const float* log_lengths) {
  const auto [begin, end] = plan_.grid.wholly_seen(block.b, block.block);
  if (begin >= end) return;
  const int64_t first_tile = begin / kChunk, last_tile = (end - 1) / kChunk;
  for (int64_t tile = first_tile; tile <= last_tile; ++tile)
    pruned_[tile] = bit_range(begin - tile * kChunk, end - tile * kChunk);
  for (const int32_t selected : plan_.blocks.row(plan_.block_list(block.b, block.plan_head, block.block)))
    if (selected >= begin && selected < end) pruned_[selected / kChunk] &= ~(uint64_t{1} << (selected % kChunk));
  for (int64_t tile = first_tile; tile <= last_tile; ++tile)
    if (pruned_[tile] != 0)
      tiles_.push_back({means.keys(tile), means.values(tile), nullptr, 0, pruned_[tile], kChunk, TileKind::kMeans, 0,
                        log_lengths + tile * kChunk});
}

void Worklist::add_column_tile(const QueryBlock& block, const int32_t* positions, int count, uint64_t bits,
                               const char* keys, const char* values) {
  const bool full = bits == ~uint64_t{0} && all_allowed(block, positions[0], positions[count - 1]);
  const TileKind kind = full ? TileKind::kFull : TileKind::kGathered;
  tiles_.push_back({keys, values, positions, positions[0], bits, count, kind});
}

// Permuted keys: every packed chunk that any part may touch. Pairs are tested by their original positions, but in chunks
// that every row may attend whole: all where attention is bidirectional, and most before the query block where keys
// change places nearby. Of these every row attends the keys that blocks select, unless columns or bands add some.
void Worklist::list_permuted(const QueryBlock& block, const PackedTiles& packed, const ChunkBounds* bounds) {
  const auto [low, high] = reachable(block);
  if (low >= high) return;
  const int64_t list = plan_.block_list(block.b, block.plan_head, block.block), block_k = plan_.grid.block_k;
  const Row columns = plan_.columns.row(plan_.column_list(block.b, block.plan_head, block.block));
  const int32_t* order = plan_.key_ranks(block.b, block.plan_head);
  const int64_t chunks = ceil_div(plan_.key_len, kChunk);
  std::fill(selected_.begin(), selected_.begin() + chunks, 0);
  std::fill(touched_.begin(), touched_.begin() + chunks, 0);
  for (const int32_t selected : plan_.blocks.row(list)) {
    const int64_t begin = selected * block_k;
    select(std::max<int64_t>(0, begin), std::min(plan_.key_len, begin + block_k));
  }
  const bool more = columns.size() > 0 || block.rules.sink > 0 || block.rules.window > 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (!touched_[chunk] && !more) continue;
    const auto [lowest, highest] = bounds[chunk];
    if (lowest >= high || highest < low) continue;
    const int count = static_cast<int>(std::min<int64_t>(kChunk, plan_.key_len - chunk * kChunk));
    const int32_t* positions = order + chunk * kChunk;
    const bool scattered = more && add_scattered(block, columns, positions, chunk, count);
    if (!touched_[chunk] && !scattered) continue;
    const bool whole = selected_[chunk] == ~uint64_t{0};
    TileKind kind = TileKind::kScattered;
    if (all_allowed(block, lowest, highest) && (whole || !more)) kind = whole ? TileKind::kFull : TileKind::kSelected;
    tiles_.push_back({packed.keys(chunk), packed.values(chunk), positions, 0, selected_[chunk], count, kind});
  }
}

bool Worklist::add_scattered(const QueryBlock& block, const Row& columns, const int32_t* positions, int64_t chunk,
                             int count) {
  bool any = false;
  for (int t = 0; t < count; ++t) {
    const int64_t key = positions[t];
    const bool column = std::binary_search(columns.begin(), columns.end(), positions[t]);
    if (column) selected_[chunk] |= uint64_t{1} << t;
    const int64_t nearest = std::max<int64_t>({0, block.lowest - key, key - block.highest});
    any = any || column || key < block.rules.sink || nearest < block.rules.window;
  }
  return any;
}

// Keys, or ranks of keys.
void Worklist::select(int64_t begin, int64_t end) {
  for (int64_t key = begin; key < end;) {
    const int64_t chunk = key / kChunk, stop = std::min(end, (chunk + 1) * kChunk);
    selected_[chunk] |= bit_range(key % kChunk, key % kChunk + stop - key);
    touched_[chunk] = 1;
    key = stop;
  }
}

void Worklist::touch(int64_t begin, int64_t end) {
  if (begin >= end) return;
  for (int64_t chunk = begin / kChunk; chunk <= (end - 1) / kChunk; ++chunk) touched_[chunk] = 1;
}

}  // namespace gossamer
