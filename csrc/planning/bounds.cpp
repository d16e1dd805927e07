// Bounds of the keys in the pages of a cache, kept up from the first token that was written since.
#include <algorithm>
#include <vector>

#include "kernels/half.h"
#include "kernels/integers.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

// Tokens [begin, end) of a page, the number `place` of sequence b.
struct Stretch {
  int64_t b, place, page, begin, end;
};

// The smallest bf16 that is no smaller: what lies between two is cut off towards 0, which raises what is below it.
uint16_t raised(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7fc0;
  const bool exact = (bits & 0xffff) == 0, negative = (bits >> 31) != 0;
  return static_cast<uint16_t>((bits >> 16) + (exact || negative ? 0 : 1));
}

uint16_t narrowed(float x, DType keys, DType bounds) {
  if (bounds == DType::kFloat16) return float_to_fp16(x);
  return keys == DType::kFloat32 ? raised(x) : float_to_bf16(x);
}

// Sequences may share pages, and one of them know more of its tokens: each page once, up to the most that is known.
std::vector<Stretch> find_stretches(const Tokens& keys, const int64_t* counts, const KeptBounds& kept) {
  const Pages& pages = keys.pages();
  std::vector<Stretch> found;
  for (int64_t b = 0; b < keys.batch; ++b)
    for (int64_t place = 0; place * pages.page < counts[b]; ++place) {
      const int64_t page = pages.number(b, place * pages.page);
      const int64_t end = std::min(pages.page, counts[b] - place * pages.page);
      int32_t& held = kept.held[page];
      if (held < 0) {
        Stretch& known = found[-held - 1];
        if (known.end < end) known = {b, place, page, known.begin, end};
      } else if (held < end) {
        found.push_back({b, place, page, held / kept.size * kept.size, end});
        held = -static_cast<int32_t>(found.size());
      }
    }
  for (const Stretch& one : found) kept.held[one.page] = static_cast<int32_t>(one.end);
  return found;
}

}  // namespace

void keep_bounds(const Kernels& kernels, const Tokens& keys, const int64_t* counts, const KeptBounds& kept, int threads) {
  const std::vector<Stretch> stretches = find_stretches(keys, counts, kept);
  const int64_t parts = keys.pages().page / kept.size, dim = keys.dim;
  std::vector<std::vector<char>> rooms(threads);
  run_parallel(threads, static_cast<int64_t>(stretches.size()) * keys.heads, [&](int thread, int64_t n) {
    const Stretch& own = stretches[n / keys.heads];
    const int64_t head = n % keys.heads, first = own.place * keys.pages().page;
    std::vector<char>& room = rooms[thread];
    room.resize(kept.size * keys.row_bytes());
    float low[kMaxHeadDim], high[kMaxHeadDim];
    for (int64_t t = own.begin; t < own.end; t += kept.size) {
      const int64_t count = std::min(kept.size, own.end - t);
      const EvenRows rows = keys.consecutive(*kernels.scores, own.b, head, first + t, count, room.data());
      kernels.scores->bounds(rows.first, rows.stride, count, keys.dim, keys.dtype, low, high);
      uint16_t* to = reinterpret_cast<uint16_t*>(kept.data) + ((own.page * keys.heads + head) * parts + t / kept.size) * 2 * dim;
      for (int64_t d = 0; d < dim; ++d) {
        to[d] = narrowed(high[d], keys.dtype, kept.dtype);
        to[dim + d] = narrowed(-low[d], keys.dtype, kept.dtype) ^ 0x8000;
      }
    }
  });
}

void forget_slots(const int64_t* slots, int64_t count, int64_t page, int64_t pages, int32_t* held) {
  for (int64_t n = 0; n < count; ++n) {
    if (slots[n] < 0 || slots[n] / page >= pages) continue;
    int32_t& of_page = held[slots[n] / page];
    of_page = std::min(of_page, static_cast<int32_t>(slots[n] % page));
  }
}

}  // namespace gossamer
