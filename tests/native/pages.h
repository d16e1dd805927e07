// Tokens in the pages of a cache, allocated to the byte; whatever is not the sequence's is NaN.
#pragma once

#include <cstring>
#include <vector>

#include "kernels/half.h"
#include "plan/tokens.h"
#include "problem.h"

namespace gossamer {

class PagedProblem {
 public:
  explicit PagedProblem(unsigned seed) : random(seed) {
    form = static_cast<PageForm>(random.below(4));
    const bool tiles = form == PageForm::kKeyTiles || form == PageForm::kValueTiles;
    element = tiles || random.chance(0.5) ? 2 : 4;
    page = tiles ? random.one_of({16, 48, 128}) : random.one_of({1, 7, 32, 128});
    dim = static_cast<int>(tiles ? random.one_of({16, 48}) : random.one_of({1, 20, 33, 64}));
    tokens = 1 + random.below(300);
    const int64_t used = ceil_div(tokens, page), pages = used + 2;
    std::vector<int32_t> numbers(pages);
    std::iota(numbers.begin(), numbers.end(), 0);
    std::shuffle(numbers.begin(), numbers.end(), random.engine);
    table.assign(numbers.begin(), numbers.begin() + used);
    rows.resize(kGroups * tokens * dim * element);
    for (char& byte : rows) byte = static_cast<char>(random.below(256));
    cache.assign(pages * kGroups * page * dim * element, static_cast<char>(0xff));
    for (int64_t head = 0; head < kGroups; ++head)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t d = 0; d < dim; ++d)
          std::memcpy(cache.data() + ((table[t / page] * kGroups + head) * page * dim + place(t % page, d)) * element,
                      row(head, t) + d * element, element);
  }

  const char* row(int64_t head, int64_t t) const { return rows.data() + (head * tokens + t) * dim * element; }
  Tokens view() const {
    const int64_t head = page * dim * element;
    const int64_t each = static_cast<int64_t>(table.size());
    return Tokens({cache.data(), kGroups * head, head, page, form, table.data(), each}, 1, kGroups, tokens, dim,
                  element == 4 ? DType::kFloat32 : DType::kFloat16);
  }

  // Any rows as pointers, and any stretch of them.
  bool is_read_right(const ScoreKernels& kernels) {
    const Tokens view = this->view();
    const size_t bytes = static_cast<size_t>(view.row_bytes());
    const int64_t head = random.below(kGroups), first = random.below(tokens), count = 1 + random.below(tokens - first);
    int64_t slots[kChunk];
    for (int t = 0; t < kChunk; ++t)
      slots[t] = random.chance(0.1) ? -1 : random.chance(0.5) ? random.below(tokens) : std::min(tokens - 1, first + t);
    PointedRows pointed;
    view.point_at(kernels, 0, head, slots, pointed);
    for (int t = 0; t < kChunk; ++t) {
      if ((pointed.rows[t] == nullptr) != (slots[t] < 0)) return false;
      if (slots[t] >= 0 && std::memcmp(pointed.rows[t], row(head, slots[t]), bytes) != 0) return false;
    }
    std::vector<char> room(count * bytes);
    const EvenRows even = view.consecutive(kernels, 0, head, first, count, room.data());
    for (int64_t t = 0; t < count; ++t)
      if (std::memcmp(even.first + t * even.stride, row(head, first + t), bytes) != 0) return false;
    return true;
  }

 private:
  int64_t place(int64_t t, int64_t d) const {
    switch (form) {
      case PageForm::kRows:
        return t * dim + d;
      case PageForm::kColumns:
        return d * page + t;
      case PageForm::kKeyTiles:
        return ((t / 16 * (dim / 2) + d / 2) * 16 + t % 16) * 2 + d % 2;
      case PageForm::kValueTiles:
        return ((d / 16 * (page / 2) + t / 2) * 16 + d % 16) * 2 + t % 2;
    }
    return 0;
  }

  Random random;
  PageForm form;
  int64_t page, tokens;
  int dim, element;
  std::vector<int32_t> table;
  std::vector<char> rows, cache;
};

}  // namespace gossamer
