// Tokens of a page of a cache, copied out as rows: plain structures. No std:: here; job.h says why.
#pragma once

#include <cstdint>

namespace gossamer {

// How a page holds the keys or the values of one head; gossamer/paged.py says which cache has which.
enum class PageForm : int {
  kRows,        // [page][dim]
  kColumns,     // [dim][page]
  kKeyTiles,    // [page / 16][dim / 2][16][2], 16 bits each
  kValueTiles,  // [dim / 16][page / 2][16][2], 16 bits each
};

constexpr int kTileTokens = 16;

// Consecutive tokens [first, first + count) of a page. No other token's numbers are used.
struct PageJob {
  const void* page;
  PageForm form;
  int64_t page_tokens;
  int dim;
  int element_bytes;  // 2 or 4
  int64_t first;
  int64_t count;
  void* rows;  // [count][dim]
};

}  // namespace gossamer
