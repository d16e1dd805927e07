// MInference's index construction for token-exact slashes; see backends/torch/slashes.py for the rule.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/integers.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kBlock = 64;  // of queries and keys; a word of the bitmaps covers one block
constexpr uint64_t kWhole = ~uint64_t{0};

// Chosen columns and distances of one batch row and head.
struct Chosen {
  std::vector<uint64_t> columns;  // bits
  std::vector<int64_t> distances;  // the farthest first
};

// Eight flags of a byte each, the first in the lowest.
uint64_t eight(const uint8_t* flags, int64_t count) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, flags, static_cast<size_t>(std::min<int64_t>(count, 8)));
  return bytes;
}

// Their bits: the product brings bit 8 t to bit 56 + t.
uint64_t bits_of(uint64_t flags) { return flags * 0x0102040810204080 >> 56; }

Chosen gather(const Slashes& call, int64_t head) {
  const uint8_t* columns = call.columns + head * call.width;
  const uint8_t* distances = call.distances + head * call.width;
  Chosen chosen;
  chosen.columns.resize(words_of(call.width));
  for (int64_t n = 0; n < call.width; n += 8)
    chosen.columns[n / kBlock] |= bits_of(eight(columns + n, call.width - n)) << (n % kBlock);
  for (int64_t n = 0; n < call.width; n += 8)
    for (uint64_t bits = bits_of(eight(distances + n, call.width - n)); bits != 0; bits &= bits - 1)
      chosen.distances.push_back(n + __builtin_ctzll(bits));
  std::reverse(chosen.distances.begin(), chosen.distances.end());
  return chosen;
}

// Sets bits [low, high).
void cover(uint64_t* words, int64_t low, int64_t high) {
  for (int64_t n = low / kBlock; n * kBlock < high; ++n) words[n] |= bit_range(low - n * kBlock, high - n * kBlock);
}

// The keys below `keys` that the diagonals of a query block touch: merged ranges.
void cover_ranges(const std::vector<int64_t>& distances, int64_t end, int64_t keys, uint64_t* covered) {
  int64_t low = 0, high = 0;  // none yet
  const auto flush = [&] {
    if (low < std::min(high, keys)) cover(covered, low, std::min(high, keys));
  };
  for (const int64_t distance : distances) {
    if (distance >= end) continue;
    const int64_t top = std::max(end - distance, kBlock);
    if (high > 0 && top <= high + kBlock) {
      if (top > high) high += kBlock;
      continue;
    }
    flush();
    low = top - kBlock;
    high = top;
  }
  flush();
}

// Splits the covered keys below `end` into whole blocks and single columns, to which chosen ones are added. Returns the
// numbers of both.
std::pair<int64_t, int64_t> split(const Chosen& chosen, int64_t end, int64_t keys, uint64_t* singles,
                                  uint64_t* whole) {
  int64_t block_count = 0, column_count = 0;
  for (int64_t word = 0; word * kBlock < keys; ++word) {
    const int64_t first = word * kBlock;
    const uint64_t live = bit_range(0, keys - first);
    if ((singles[word] | ~live) == kWhole) {
      singles[word] = 0;
      if (first >= end) continue;
      whole[word / 64] |= uint64_t{1} << (word % 64);
      ++block_count;
      continue;
    }
    singles[word] = (singles[word] | chosen.columns[word]) & bit_range(0, end - first) & live;
    column_count += __builtin_popcountll(singles[word]);
  }
  return {block_count, column_count};
}

}  // namespace

void slashes(const Slashes& call, const ChosenBits& blocks, const ChosenBits& columns, int threads) {
  const int64_t rows = call.part.size(), words = words_of(call.width), block_words = words_of(words);
  const Grid grid{call.extent, kBlock, kBlock};
  std::vector<Chosen> chosen(static_cast<size_t>(call.extent.batch * call.heads));
  run_parallel(threads, static_cast<int64_t>(chosen.size()),
               [&](int, int64_t head) { chosen[static_cast<size_t>(head)] = gather(call, head); });
  run_parallel(threads, static_cast<int64_t>(chosen.size()) * rows, [&](int, int64_t n) {
    const int64_t head = n / rows, m = call.part.first + n % rows, b = head / call.heads;
    uint64_t* singles = columns.bits + n * words;
    uint64_t* whole = blocks.bits + n * block_words;
    std::fill(singles, singles + words, 0);
    std::fill(whole, whole + block_words, 0);
    blocks.counts[n] = columns.counts[n] = 0;
    if (m >= grid.row_blocks(b)) return;
    const int64_t end = (grid.first_block(b) + m + 1) * kBlock;
    const int64_t keys = std::min(call.extent.key_count[b], call.width);
    const Chosen& own = chosen[static_cast<size_t>(head)];
    cover_ranges(own.distances, end, keys, singles);
    std::tie(blocks.counts[n], columns.counts[n]) = split(own, end, keys, singles, whole);
  });
}

}  // namespace gossamer
