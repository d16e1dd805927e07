#include "plan/tokens.h"

#include <algorithm>
#include <cstring>

#include "kernels/integers.h"

namespace gossamer {

Tokens::Tokens(const TensorView& rows)
    : batch(rows.batch),
      heads(rows.heads),
      tokens(rows.tokens),
      dim(rows.dim),
      dtype(rows.dtype),
      tensor_(rows),
      pages_{},
      encoded_{} {}

Tokens::Tokens(const Pages& pages, int64_t batch, int64_t heads, int64_t tokens, int dim, DType dtype)
    : batch(batch), heads(heads), tokens(tokens), dim(dim), dtype(dtype), tensor_{}, pages_(pages), encoded_{} {}

Tokens::Tokens(const Encoded& encoded)
    : batch(encoded.tail.batch),
      heads(encoded.tail.heads),
      tokens(encoded.count + encoded.tail.tokens),
      dim(encoded.tail.dim),
      dtype(encoded.tail.dtype),
      tensor_(encoded.tail),
      pages_{},
      encoded_(encoded) {}

PageJob Tokens::job(int64_t b, int64_t head, int64_t slot, int64_t count, char* rows) const {
  return {page_of(b, head, slot),  pages_.form, pages_.page, dim, element_size(dtype),
          slot % pages_.page, count,       rows};
}

void Tokens::point_at(const ScoreKernels& kernels, int64_t b, int64_t head, const int64_t* slots,
                      PointedRows& to) const {
  if (paged()) return read_page_rows(kernels, b, head, slots, to);
  for (int t = 0; t < kChunk; ++t) {
    if (slots[t] < 0) {
      to.rows[t] = nullptr;
    } else if (slots[t] >= encoded_.count) {
      to.rows[t] = tensor_.row(b, head, slots[t] - encoded_.count);
    } else {
      char* copy = to.copies + t * row_bytes();
      read_encoded(kernels, b, head, slots[t], 1, copy);
      to.rows[t] = copy;
    }
  }
}

void Tokens::read_page_rows(const ScoreKernels& kernels, int64_t b, int64_t head, const int64_t* slots,
                            PointedRows& to) const {
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
      rows = const_cast<char*>(page_of(b, head, slots[t])) + inside * bytes;
    else
      kernels.read_page(job(b, head, slots[t], count, rows));
    for (int n = 0; n < count; ++n) to.rows[t + n] = rows + n * bytes;
    t += count;
  }
}

EvenRows Tokens::in_place(int64_t b, int64_t head, int64_t slot, int64_t count) const {
  if (slot < encoded_.count) return {nullptr, 0};
  if (!paged()) return {tensor_.row(b, head, slot - encoded_.count), tensor_.token_stride};
  const int64_t inside = slot % pages_.page;
  if (pages_.form != PageForm::kRows || inside + count > pages_.page) return {nullptr, 0};
  return {page_of(b, head, slot) + inside * row_bytes(), row_bytes()};
}

EvenRows Tokens::consecutive(const ScoreKernels& kernels, int64_t b, int64_t head, int64_t slot, int64_t count,
                             char* room) const {
  const EvenRows rows = in_place(b, head, slot, count);
  if (rows.first != nullptr) return rows;
  if (encoded()) {
    const int64_t coded = std::min(count, encoded_.count - slot), bytes = row_bytes();
    read_encoded(kernels, b, head, slot, coded, room);
    for (int64_t t = coded; t < count; ++t)
      std::memcpy(room + t * bytes, tensor_.row(b, head, slot + t - encoded_.count), static_cast<size_t>(bytes));
    return {room, bytes};
  }
  for (int64_t done = 0; done < count;) {
    const int64_t here = std::min(count - done, pages_.page - (slot + done) % pages_.page);
    kernels.read_page(job(b, head, slot + done, here, room + done * row_bytes()));
    done += here;
  }
  return {room, row_bytes()};
}

bool Tokens::stored(int64_t b, int64_t head, int64_t lowest, int64_t highest, StoredRows& to) const {
  if ((lowest < encoded_.count) != (highest < encoded_.count)) return false;
  if (lowest >= encoded_.count) {
    to = {};
    to.dtype = dtype;
    to.dim = dim;
    if (paged()) {
      if (pages_.form != PageForm::kRows || lowest / pages_.page != highest / pages_.page) return false;
      to.rows = page_of(b, head, lowest);
      to.row_stride = row_bytes();
      to.first = -(lowest / pages_.page * pages_.page);
      return true;
    }
    to.rows = tensor_.row(b, head, 0);
    to.row_stride = tensor_.token_stride;
    to.first = -encoded_.count;
    return true;
  }
  const auto offset = [&](const Encoded::Strides& strides) { return b * strides.batch + head * strides.head; };
  to = encoded_.rows;
  to.rows += offset(encoded_.numbers);
  if (to.coding == Coding::kCodes) {
    to.scales += offset(encoded_.scales);
    to.zeros += offset(encoded_.zeros);
  } else {
    to.bitmaps += offset(encoded_.bitmaps);
  }
  to.first = 0;
  // Of a row that begins before it, a vector is read that ends within the rows behind.
  const int64_t vector = int64_t{kLanes} * element_size(dtype);
  to.guarded = to.row_stride > 0 ? encoded_.count - ceil_div(vector, to.row_stride) : 0;
  return true;
}

void Tokens::read_encoded(const ScoreKernels& kernels, int64_t b, int64_t head, int64_t slot, int64_t count,
                          char* to) const {
  StoredRows rows;
  stored(b, head, slot, slot + count - 1, rows);
  rows.first = slot;
  rows.count = static_cast<int>(count);
  rows.positions = nullptr;
  kernels.read_stored(rows, to);
}

}  // namespace gossamer
