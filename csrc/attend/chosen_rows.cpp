#include "attend/chosen_rows.h"

#include <algorithm>
#include <vector>

#include "attend/partials.h"
#include "kernels/integers.h"
#include "runtime/budgets.h"
#include "runtime/parallel.h"
#include "runtime/workspace.h"

namespace gossamer {
namespace {

// Rows [first, first + rows) of the call's list for some heads that share a key/value head: one panel.
struct Item {
  int64_t b, group, first_head, heads, first, rows;
  int64_t first_stretch, stretches;
};

// Each panel runs over all chunks of 64 keys that its rows select any of, with a word of bits for each row and chunk.
// The chunks are dealt out in stretches by their positions, so that results depend neither on threads nor on the batch.
class ChosenRows {
 public:
  explicit ChosenRows(const Operands& operands) : o_(operands), call_(operands.call), plan_(operands.plan) {}

  void run() {
    list_items();
    const int threads = std::max(1, call_.threads);
    place(nullptr, threads);
    KeptBuffer buffer;
    place(buffer.reserve(bytes_), threads);
    run_parallel(threads, stretches_, [&](int thread, int64_t n) { attend(thread, n); });
    run_parallel(threads, static_cast<int64_t>(items_.size()), [&](int, int64_t n) {
      PanelRows rows;
      collect(items_[n], rows);
      clear_dead(items_[n]);
      partials_.merge(rows, items_[n].first_stretch, items_[n].stretches, call_.out.dtype);
    });
  }

 private:
  void list_items() {
    const int64_t share = call_.q.heads / call_.k.heads, count = call_.out.tokens;
    const int64_t rows_at_once = std::min<int64_t>(count, kMaxRows), heads_at_once = kMaxRows / rows_at_once;
    for (int64_t b = 0; b < plan_.batch(); ++b)
      for (int64_t head = 0; head < call_.q.heads; head += std::min(heads_at_once, share - head % share))
        for (int64_t first = 0; first < count; first += rows_at_once) {
          const int64_t heads = std::min(heads_at_once, share - head % share);
          const int64_t stretches = std::max<int64_t>(1, ceil_div(o_.chunks(b), kRowTiles));
          items_.push_back({b, head / share, head, heads, first, std::min(rows_at_once, count - first), stretches_,
                            stretches});
          stretches_ += stretches;
        }
  }

  void place(char* base, int threads) {
    Pieces pieces(base);
    scratch_.resize(threads);
    packed_.resize(threads);
    bits_.resize(threads);
    for (char*& scratch : scratch_) scratch = pieces.take(panel_scratch_bytes(o_.padded_dim, o_.padded_value_dim));
    for (char*& packed : packed_) packed = pieces.take(kRowTiles * o_.tile_bytes());
    for (uint64_t*& bits : bits_)
      bits = reinterpret_cast<uint64_t*>(pieces.take(kRowTiles * kMaxRows * sizeof(uint64_t)));
    partials_.place(pieces, stretches_, kMaxRows, call_.v.dim);
    bytes_ = pieces.taken();
  }

  // Live rows in the order of the list, each in all heads: of ascending ones those that see a chunk are the last.
  void collect(const Item& item, PanelRows& rows) const {
    rows.start(o_, item.b, item.first_head / o_.heads_a_plan_head, 0);
    for (int64_t n = item.first; n < item.first + item.rows; ++n)
      for (int64_t h = item.first_head; h < item.first_head + item.heads && is_live(item.b, n); ++h)
        rows.add(o_, h, query(item.b, n), n);
  }

  void clear_dead(const Item& item) const {
    for (int64_t n = item.first; n < item.first + item.rows; ++n)
      for (int64_t h = item.first_head; h < item.first_head + item.heads && !is_live(item.b, n); ++h)
        o_.clear_row(item.b, h, n);
  }

  // Counted from the first live one.
  int64_t query(int64_t b, int64_t n) const {
    return call_.rows[b * call_.out.tokens + n] - plan_.extent().first_query(b);
  }
  bool is_live(int64_t b, int64_t n) const {
    return query(b, n) >= 0 && query(b, n) < plan_.extent().query_count[b];
  }

  void attend(int thread, int64_t stretch) {
    const auto after = std::upper_bound(items_.begin(), items_.end(), stretch,
                                        [](int64_t n, const Item& item) { return n < item.first_stretch; });
    const Item& item = *(after - 1);
    PanelRows rows;
    collect(item, rows);
    if (rows.size() == 0) return;
    const int64_t first = (stretch - item.first_stretch) * kRowTiles;
    const int64_t last = std::min(first + kRowTiles, o_.chunks(item.b));
    uint64_t* bits = bits_[thread];
    std::fill(bits, bits + kRowTiles * rows.size(), uint64_t{0});
    for (int64_t r = 0; r < rows.size(); ++r)
      select(item, rows.position(r), item.first_head + r % item.heads, first, last, bits + r, rows.size());

    std::vector<Tile> tiles;
    const PackedTiles packed = o_.tiles(packed_[thread]);
    for (int64_t chunk = first; chunk < last; ++chunk, bits += rows.size()) {
      uint64_t any = 0, all = ~uint64_t{0};
      for (int64_t r = 0; r < rows.size(); ++r) {
        any |= bits[r];
        all &= bits[r];
      }
      if (any == 0) continue;
      const int64_t tile = static_cast<int64_t>(tiles.size());
      pack(item, chunk, packed.keys(tile), packed.values(tile));
      tiles.push_back({packed.keys(tile), packed.values(tile), nullptr, chunk * kChunk, 0, kChunk,
                       all == ~uint64_t{0} ? TileKind::kFull : TileKind::kConsecutive, 0, nullptr, bits});
    }
    Panel panel = rows.panel(o_);
    panel.rules.sink = panel.rules.window = 0;  // among the bits
    panel.tiles = tiles.data();
    panel.tile_count = static_cast<int64_t>(tiles.size());
    panel.scratch = scratch_[thread];
    partials_.direct(panel, stretch, stretch == item.first_stretch);
    o_.kernels.attend(panel);
  }

  // Bits of what the query at a position computes among the chunks [first, last): a word each, `stride` words apart.
  void select(const Item& item, int64_t position, int64_t head, int64_t first, int64_t last, uint64_t* words,
              int64_t stride) const {
    const Range allowed = plan_.extent().keys_of(item.b, {position, position + 1});
    const int64_t low = std::max(allowed.begin, first * kChunk), high = std::min(allowed.end, last * kChunk);
    const auto cover = [&](int64_t begin, int64_t end) {
      begin = std::max(begin, low);
      end = std::min(end, high);
      for (int64_t chunk = begin / kChunk; chunk * kChunk < end; ++chunk)
        words[(chunk - first) * stride] |= bit_range(begin - chunk * kChunk, end - chunk * kChunk);
    };
    if (low >= high) return;
    const int64_t h = head / o_.heads_a_plan_head, block_k = plan_.grid.block_k;
    const int64_t m = position / plan_.grid.block_q - plan_.grid.first_block(item.b);
    cover(0, plan_.sink[h]);
    cover(position - plan_.window[h] + 1, position + int64_t{plan_.window[h]});
    const Row blocks = plan_.blocks.row(plan_.block_list(item.b, h, m));
    for (const int32_t* block = std::lower_bound(blocks.begin(), blocks.end(), low / block_k); block < blocks.end();
         ++block) {
      if (*block * block_k >= high) break;
      cover(*block * block_k, (*block + int64_t{1}) * block_k);
    }
    const Row columns = plan_.columns.row(plan_.column_list(item.b, h, m));
    for (const int32_t* key = std::lower_bound(columns.begin(), columns.end(), low); key < columns.end(); ++key) {
      if (*key >= high) break;
      cover(*key, *key + int64_t{1});
    }
  }

  void pack(const Item& item, int64_t chunk, char* keys, char* values) const {
    int32_t positions[kChunk];
    const int64_t live = std::min<int64_t>(kChunk, plan_.extent().key_count[item.b] - chunk * kChunk);
    for (int64_t t = 0; t < live; ++t) positions[t] = static_cast<int32_t>(chunk * kChunk + t);
    o_.pack(item.b, item.group, positions, static_cast<int>(live), keys, values);
  }

  const Operands& o_;
  const AttentionCall& call_;
  const Plan& plan_;
  std::vector<Item> items_;
  int64_t stretches_ = 0, bytes_ = 0;
  std::vector<char*> scratch_, packed_;  // one a thread
  std::vector<uint64_t*> bits_;
  Partials partials_;
};

}  // namespace

void run_chosen_rows(const Operands& operands) {
  if (operands.call.out.tokens > 0) ChosenRows(operands).run();
}

}  // namespace gossamer
