#include "plan/tokens.h"

#include <algorithm>

namespace gossamer {

Tokens::Tokens(const TensorView& rows)
    : batch(rows.batch),
      heads(rows.heads),
      tokens(rows.tokens),
      dim(rows.dim),
      dtype(rows.dtype),
      tensor_(rows),
      pages_{} {}

Tokens::Tokens(const Pages& pages, int64_t heads, int64_t tokens, int dim, DType dtype)
    : batch(1), heads(heads), tokens(tokens), dim(dim), dtype(dtype), tensor_{}, pages_(pages) {}

PageJob Tokens::job(int64_t head, int64_t slot, int64_t count, char* rows) const {
  return {page_of(head, slot),     pages_.form, pages_.page, dim, element_size(dtype),
          slot % pages_.page, count,       rows};
}

void Tokens::point_at(const ScoreKernels& kernels, int64_t b, int64_t head, const int64_t* slots,
                      PointedRows& to) const {
  if (!paged()) {
    for (int t = 0; t < kChunk; ++t) to.rows[t] = slots[t] < 0 ? nullptr : tensor_.row(b, head, slots[t]);
    return;
  }
  const int64_t bytes = row_bytes();
  for (int t = 0; t < kChunk;) {
    if (slots[t] < 0) {
      to.rows[t++] = nullptr;
      continue;
    }
    // As many as follow one another in the page.
    const int64_t inside = slots[t] % pages_.page;
    int count = 1;
    while (t + count < kChunk && inside + count < pages_.page && slots[t + count] == slots[t] + count) ++count;
    char* rows = to.copies + t * bytes;
    if (pages_.form == PageForm::kRows)
      rows = const_cast<char*>(page_of(head, slots[t])) + inside * bytes;
    else
      kernels.read_page(job(head, slots[t], count, rows));
    for (int n = 0; n < count; ++n) to.rows[t + n] = rows + n * bytes;
    t += count;
  }
}

EvenRows Tokens::in_place(int64_t b, int64_t head, int64_t slot, int64_t count) const {
  if (!paged()) return {tensor_.row(b, head, slot), tensor_.token_stride};
  const int64_t inside = slot % pages_.page;
  if (pages_.form != PageForm::kRows || inside + count > pages_.page) return {nullptr, 0};
  return {page_of(head, slot) + inside * row_bytes(), row_bytes()};
}

EvenRows Tokens::consecutive(const ScoreKernels& kernels, int64_t b, int64_t head, int64_t slot, int64_t count,
                             char* room) const {
  const EvenRows rows = in_place(b, head, slot, count);
  if (rows.first != nullptr) return rows;
  for (int64_t done = 0; done < count;) {
    const int64_t here = std::min(count - done, pages_.page - (slot + done) % pages_.page);
    kernels.read_page(job(head, slot + done, here, room + done * row_bytes()));
    done += here;
  }
  return {room, row_bytes()};
}

}  // namespace gossamer
