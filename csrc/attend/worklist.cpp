#include "attend/worklist.h"

#include <algorithm>
#include <utility>

#include "kernels/integers.h"

namespace gossamer {
namespace {

// Key slots that some row may attend at all.
std::pair<int64_t, int64_t> reachable(const QueryBlock& block) {
  const Rules& rules = block.rules;
  int64_t low = rules.live_begin, high = rules.live_end;
  if (rules.causal) high = std::min(high, block.highest + 1);
  if (rules.limit < kUnlimited) {
    low = std::max(low, block.lowest - rules.limit + 1);
    high = std::min(high, block.highest + rules.limit);
  }
  return {low, std::max(low, high)};
}

// The largest distance between a row and a slot of [first, last].
int64_t reach(const QueryBlock& block, int64_t first, int64_t last) {
  return std::max(block.highest - first, last - block.lowest);
}

// Whether every row may attend every slot of [first, last].
bool all_allowed(const QueryBlock& block, int64_t first, int64_t last) {
  const Rules& rules = block.rules;
  return first >= rules.live_begin && last < rules.live_end && (!rules.causal || last <= block.lowest) &&
         reach(block, first, last) < rules.limit;
}

}  // namespace

int64_t listed_keys(const Plan& plan, int64_t b, int64_t plan_head, int64_t block) {
  const int64_t blocks = plan.blocks.size(plan.block_list(b, plan_head, block));
  const int64_t columns = plan.columns.size(plan.column_list(b, plan_head, block));
  const int64_t position = std::max<int64_t>(plan.extent.query_start[b] + (block + 1) * plan.block_q, 0);
  return blocks * plan.block_k + columns + std::min(plan.sink[plan_head] + int64_t{plan.window[plan_head]}, position);
}

Worklist::Worklist(const Plan& plan, int64_t chunks)
    : plan_(plan), chunks_(chunks), selected_(chunks), touched_(chunks) {}

void Worklist::build(const QueryBlock& block, const PackedTiles& packed, const PackedTiles* columns) {
  tiles_.clear();
  gathered_.clear();
  if (plan_.k_order != nullptr)
    list_permuted(block, packed);
  else
    list_in_order(block, packed, columns);
}

void Worklist::list_in_order(const QueryBlock& block, const PackedTiles& packed, const PackedTiles* columns) {
  const auto [low, high] = reachable(block);
  if (low >= high) return;
  const Rules& rules = block.rules;
  const int64_t first_chunk = low / kChunk, last_chunk = (high - 1) / kChunk;
  std::fill(selected_.begin() + first_chunk, selected_.begin() + last_chunk + 1, 0);
  std::fill(touched_.begin() + first_chunk, touched_.begin() + last_chunk + 1, 0);

  const int64_t list = plan_.block_list(block.b, block.plan_head, block.block);
  for (const int32_t* selected = plan_.blocks.begin(list); selected < plan_.blocks.end(list); ++selected) {
    const int64_t begin = *selected * plan_.block_k;
    if (begin >= high) break;
    select(std::max(low, begin), std::min(high, begin + plan_.block_k));
  }
  touch(low, std::min(high, rules.sink_end));
  if (rules.window > 0)
    touch(std::max(low, block.lowest - rules.window + 1), std::min(high, block.highest + rules.window));
  add_columns(block, low, high, columns);

  for (int64_t chunk = first_chunk; chunk <= last_chunk; ++chunk) {
    if (!touched_[chunk]) continue;
    const int64_t first = chunk * kChunk, last = first + kChunk - 1;
    const bool all_selected = selected_[chunk] == ~uint64_t{0} || last < rules.sink_end ||
                              reach(block, first, last) < rules.window;
    const TileKind kind =
        all_selected && all_allowed(block, first, last) ? TileKind::kFull : TileKind::kConsecutive;
    tiles_.push_back({packed.keys(chunk), packed.values(chunk), nullptr, first, selected_[chunk], kChunk, kind});
  }
}

// A column inside a listed chunk becomes a bit of it, so that no pair counts twice; the others have tiles of their own.
void Worklist::add_columns(const QueryBlock& block, int64_t low, int64_t high, const PackedTiles* columns) {
  const int64_t list = plan_.column_list(block.b, block.plan_head, block.block);
  const int32_t* begin = plan_.columns.begin(list);
  const int32_t* end = plan_.columns.end(list);
  const int32_t* column = std::lower_bound(begin, end, low);
  const int32_t* past = std::lower_bound(column, end, high);
  if (columns != nullptr) column = begin + (column - begin) / kChunk * kChunk;
  while (column < past) {
    const int count = static_cast<int>(std::min<int64_t>(kChunk, end - column));
    uint64_t bits = 0;
    for (int t = 0; t < count && column + t < past; ++t) {
      const int64_t slot = column[t], chunk = slot / kChunk;
      if (slot < low) continue;
      if (touched_[chunk])
        selected_[chunk] |= uint64_t{1} << (slot % kChunk);
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

void Worklist::add_gathered(const QueryBlock& block, const PackedTiles& packed, const int32_t* slots) {
  const int64_t total = static_cast<int64_t>(gathered_.size());
  for (int64_t tile = 0; tile * kChunk < total; ++tile) {
    const int count = static_cast<int>(std::min<int64_t>(kChunk, total - tile * kChunk));
    add_column_tile(block, slots + tile * kChunk, count, bit_range(0, count), packed.keys(tile),
                    packed.values(tile));
  }
}

void Worklist::add_column_tile(const QueryBlock& block, const int32_t* slots, int count, uint64_t bits,
                               const char* keys, const char* values) {
  const bool full = bits == ~uint64_t{0} && all_allowed(block, slots[0], slots[count - 1]);
  tiles_.push_back({keys, values, slots, slots[0], bits, count, full ? TileKind::kFull : TileKind::kGathered});
}

// Permuted keys: every packed chunk that any part may touch, each pair tested by its original position.
void Worklist::list_permuted(const QueryBlock& block, const PackedTiles& packed) {
  const int64_t list = plan_.block_list(block.b, block.plan_head, block.block);
  const int64_t column_list = plan_.column_list(block.b, block.plan_head, block.block);
  const int32_t* columns = plan_.columns.begin(column_list);
  const int32_t* columns_end = plan_.columns.end(column_list);
  const int32_t* order = plan_.k_order + (block.b * plan_.heads + block.plan_head) * plan_.key_len;
  std::fill(selected_.begin(), selected_.end(), 0);
  for (const int32_t* selected = plan_.blocks.begin(list); selected < plan_.blocks.end(list); ++selected) {
    const int64_t begin = *selected * plan_.block_k;
    select(begin, std::min(plan_.key_len, begin + plan_.block_k));
  }
  const auto [low, high] = reachable(block);
  for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
    const int count = static_cast<int>(std::min<int64_t>(kChunk, plan_.key_len - chunk * kChunk));
    const int32_t* slots = order + chunk * kChunk;
    bool needed = false;
    for (int t = 0; t < count; ++t) {
      if (slots[t] < low || slots[t] >= high) continue;
      if (std::binary_search(columns, columns_end, slots[t])) selected_[chunk] |= uint64_t{1} << t;
      const int64_t nearest = std::max<int64_t>({0, block.lowest - slots[t], slots[t] - block.highest});
      needed = needed || (selected_[chunk] >> t & 1) || slots[t] < block.rules.sink_end ||
               nearest < block.rules.window;
    }
    if (!needed) continue;
    tiles_.push_back({packed.keys(chunk), packed.values(chunk), slots, 0, selected_[chunk], count,
                      TileKind::kScattered});
  }
}

void Worklist::select(int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end;) {
    const int64_t chunk = slot / kChunk, stop = std::min(end, (chunk + 1) * kChunk);
    selected_[chunk] |= bit_range(slot % kChunk, slot % kChunk + stop - slot);
    touched_[chunk] = 1;
    slot = stop;
  }
}

void Worklist::touch(int64_t begin, int64_t end) {
  if (begin >= end) return;
  for (int64_t chunk = begin / kChunk; chunk <= (end - 1) / kChunk; ++chunk) touched_[chunk] = 1;
}

}  // namespace gossamer
