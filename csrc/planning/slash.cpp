// MInference's index construction for token-exact slashes; see methods/_exact_slash.py for the rule.
#include <algorithm>
#include <vector>

#include "kernels/integers.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kBlock = 64;  // of queries and keys; a word of the bitmaps covers one block
constexpr uint64_t kWhole = ~uint64_t{0};

// Sets bits [low, high).
void cover(uint64_t* words, int64_t low, int64_t high) {
  for (int64_t n = low / kBlock; n * kBlock < high; ++n) words[n] |= bit_range(low - n * kBlock, high - n * kBlock);
}

// The keys that the diagonals of a row block touch: merged ranges in positions, as slots [0, key_len).
void cover_ranges(const int32_t* distance, const int32_t* distances_end, int64_t end, int64_t key_start,
                  int64_t key_len, uint64_t* covered) {
  int64_t low = 0, high = 0;  // none yet
  const auto flush = [&] {
    const int64_t from = std::clamp<int64_t>(low + key_start, 0, key_len);
    const int64_t to = std::clamp<int64_t>(high + key_start, 0, key_len);
    if (from < to) cover(covered, from, to);
  };
  for (; distance < distances_end; ++distance) {
    if (*distance >= end) continue;
    const int64_t top = std::max(end - *distance, kBlock);
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

}  // namespace

void slashes(const Slashes& call, const ChosenBits& whole_blocks, const ChosenBits& columns, int threads) {
  const int64_t blocks = call.stop - call.first, words = words_of(call.key_len), block_words = words_of(words);
  run_parallel(threads, call.extent.batch * call.heads * blocks, [&](int, int64_t n) {
    const int64_t row = n / blocks, b = row / call.heads;
    const int64_t end = (call.first + n % blocks + 1) * kBlock + call.extent.query_start[b];
    const int64_t reach = end + call.extent.key_start[b];  // slots from here on lie after the row block
    uint64_t* singles = columns.bits + n * words;
    uint64_t* whole = whole_blocks.bits + n * block_words;
    std::fill(singles, singles + words, 0);
    std::fill(whole, whole + block_words, 0);
    cover_ranges(call.distances.begin(row), call.distances.end(row), end,
                 call.extent.key_start[b], call.key_len, singles);
    int64_t block_count = 0, column_count = 0;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t first = word * kBlock, present = std::min(call.key_len - first, kBlock);
      const uint64_t absent = present == kBlock ? 0 : kWhole << present;
      if ((singles[word] | absent) == kWhole) {
        singles[word] = 0;
        if (first >= reach) continue;
        whole[word / 64] |= uint64_t{1} << (word % 64);
        ++block_count;
        continue;
      }
      const int64_t seen = std::clamp<int64_t>(reach - first, 0, kBlock);
      singles[word] |= call.columns[row * words + word];
      if (seen < kBlock) singles[word] &= (uint64_t{1} << seen) - 1;
      column_count += __builtin_popcountll(singles[word]);
    }
    whole_blocks.counts[n] = block_count;
    columns.counts[n] = column_count;
  });
}

}  // namespace gossamer
