// Tokens that are encoded before a tail, allocated to the byte.
#pragma once

#include <cstring>
#include <vector>

#include "plan/tokens.h"
#include "problem.h"

namespace gossamer {

// Codes are 0, scales of any size and zeros known, so that what a channel comes to is known too; or bitmaps.
class EncodedProblem {
 public:
  explicit EncodedProblem(unsigned seed) : random(seed) {
    dim = static_cast<int>(random.one_of({16, 48, 64, 128}));
    dtype = static_cast<DType>(random.below(3));
    const int64_t element = element_size(dtype);
    const bool over_tokens = random.chance(0.5);
    const int64_t group = over_tokens ? random.one_of({4, 8}) : random.one_of({4, 8, 16});
    count = (1 + random.below(40)) * 8;
    tokens = count + random.below(70);
    encoded.rows.dtype = dtype;
    encoded.rows.dim = dim;
    encoded.rows.sharers = 1;
    encoded.count = count;
    numbers.resize(kGroups * tokens * dim);
    for (float& x : numbers) x = static_cast<float>(random.below(16));
    tail.resize(kGroups * (tokens - count) * dim * element);
    for (int64_t head = 0; head < kGroups; ++head)
      for (int64_t n = 0; n < (tokens - count) * dim; ++n)
        write(tail, head * (tokens - count) * dim + n, numbers[(head * tokens + count) * dim + n]);
    const int64_t row = dim * element;
    encoded.tail = {tail.data(), 1, kGroups, tokens - count, dim, 0, (tokens - count) * row, row, dtype};
    if (random.chance(0.5))
      place_bitmaps();
    else
      place_codes(over_tokens, group);
  }

  bool is_read_right(const ScoreKernels& kernels) {
    const Tokens view(encoded);
    const int64_t head = random.below(kGroups), first = random.below(tokens), some = 1 + random.below(tokens - first);
    int64_t slots[kChunk];
    for (int t = 0; t < kChunk; ++t) slots[t] = random.chance(0.1) ? -1 : random.below(tokens);
    PointedRows pointed;
    view.point_at(kernels, 0, head, slots, pointed);
    for (int t = 0; t < kChunk; ++t) {
      if ((pointed.rows[t] == nullptr) != (slots[t] < 0)) return false;
      if (slots[t] >= 0 && !is_row(static_cast<const char*>(pointed.rows[t]), head, slots[t])) return false;
    }
    std::vector<char> room(some * view.row_bytes());
    const EvenRows even = view.consecutive(kernels, 0, head, first, some, room.data());
    for (int64_t t = 0; t < some; ++t)
      if (!is_row(even.first + t * even.stride, head, first + t)) return false;
    return true;
  }

 private:
  float& number(int64_t head, int64_t t, int64_t d) { return numbers[(head * tokens + t) * dim + d]; }

  void write(std::vector<char>& to, int64_t n, float x) const {
    if (dtype == DType::kFloat32) {
      std::memcpy(to.data() + 4 * n, &x, 4);
      return;
    }
    const uint16_t narrow = dtype == DType::kBFloat16 ? float_to_bf16(x) : float_to_fp16(x);
    std::memcpy(to.data() + 2 * n, &narrow, 2);
  }

  bool is_row(const char* row, int64_t head, int64_t t) {
    std::vector<char> expected(dim * element_size(dtype));
    for (int64_t d = 0; d < dim; ++d) write(expected, d, number(head, t, d));
    return std::memcmp(row, expected.data(), expected.size()) == 0;
  }

  // Small integers times a scale of 2 and more: exact in every dtype.
  void place_codes(bool over_tokens, int64_t group) {
    const int64_t bits = random.one_of({2, 4, 8}), element = element_size(dtype);
    const int64_t owners = over_tokens ? count / group : count, each = over_tokens ? dim : dim / group;
    StoredRows& rows = encoded.rows;
    rows.coding = Coding::kCodes;
    rows.bits = static_cast<int>(bits);
    rows.group = over_tokens ? 1 : static_cast<int>(group);
    rows.sharers = over_tokens ? group : 1;
    codes.assign(kGroups * count * dim * bits / 8, 0);
    scales.resize(kGroups * owners * each * element);
    zeros.resize(scales.size());
    for (int64_t head = 0; head < kGroups; ++head) {
      for (int64_t n = 0; n < owners * each; ++n) {
        write(scales, head * owners * each + n, 2.0f);
        write(zeros, head * owners * each + n, static_cast<float>(n % 5) - 2.0f);
      }
      for (int64_t t = 0; t < count; ++t)
        for (int64_t d = 0; d < dim; ++d) {
          const int64_t code = random.below(int64_t{1} << std::min<int64_t>(bits, 4)), place = d * bits;
          codes[(head * count + t) * dim * bits / 8 + place / 8] |= static_cast<char>(code << place % 8);
          const int64_t owner = over_tokens ? t / group * each + d : t * each + d / group;
          number(head, t, d) = 2.0f * static_cast<float>(code) + static_cast<float>(owner % 5) - 2.0f;
        }
    }
    rows.rows = codes.data();
    rows.row_stride = dim * bits / 8;
    rows.scales = scales.data();
    rows.zeros = zeros.data();
    rows.scale_stride = rows.zero_stride = each * element;
    encoded.numbers = {0, count * rows.row_stride};
    encoded.scales = encoded.zeros = {0, owners * each * element};
  }

  void place_bitmaps() {
    const int64_t kept = 1 + random.below(dim), element = element_size(dtype);
    StoredRows& rows = encoded.rows;
    rows.coding = Coding::kBitmap;
    rows.packed = static_cast<int>(kept);
    codes.resize(kGroups * count * kept * element);
    bitmaps.assign(kGroups * count * dim / 8, 0);
    std::vector<int64_t> channels(dim);
    std::iota(channels.begin(), channels.end(), 0);
    for (int64_t row = 0; row < kGroups * count; ++row) {
      std::shuffle(channels.begin(), channels.end(), random.engine);
      std::vector<bool> there(dim);
      for (int64_t n = 0; n < kept; ++n) there[channels[n]] = true;
      int64_t next = row * kept;
      for (int64_t d = 0; d < dim; ++d) {
        float& x = number(row / count, row % count, d);
        if (!there[d]) x = 0.0f;
        if (!there[d]) continue;
        bitmaps[row * dim / 8 + d / 8] |= static_cast<uint8_t>(1 << d % 8);
        write(codes, next++, x);
      }
    }
    rows.rows = codes.data();
    rows.row_stride = kept * element;
    rows.bitmaps = bitmaps.data();
    rows.bitmap_stride = dim / 8;
    encoded.numbers = {0, count * kept * element};
    encoded.bitmaps = {0, count * dim / 8};
  }

  Random random;
  int dim;
  DType dtype;
  int64_t count, tokens;
  Encoded encoded{};
  std::vector<float> numbers;
  std::vector<char> tail, codes, scales, zeros;
  std::vector<uint8_t> bitmaps;
};

}  // namespace gossamer
