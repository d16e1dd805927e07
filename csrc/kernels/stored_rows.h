// Rows that are stored in one of several ways, as floats, and their products with a few queries.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/convert.h"
#include "kernels/stored_job.h"

namespace gossamer {
namespace {

constexpr int64_t kCacheLine = 64;

// Reads rows one after the other; scales that rows share are widened once.
template <class V>
class RowReader {
 public:
  // Row number t of `from` as floats.
  void read(const StoredRows& from, int t, float* out) {
    const int64_t row = from.row(t);
    if (row < 0) {
      std::memset(out, 0, sizeof(float) * from.dim);
      return;
    }
    switch (from.coding) {
      case Coding::kPlain:
        return widen_row<V>(from.rows + row * from.row_stride, from.dtype, from.dim, from.dim, 1.0f, out);
      case Coding::kBitmap:
        return read_bitmap(from, row, out);
      case Coding::kCodes:
        if (from.bits == 8) return read_codes<8>(from, row, out);
        return from.bits == 4 ? read_codes<4>(from, row, out) : read_codes<2>(from, row, out);
    }
  }

 private:
  template <int kBits>
  void read_codes(const StoredRows& from, int64_t row, float* out) {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(from.rows + row * from.row_stride);
    const int64_t owner = from.sharers == 1 ? row : static_cast<int32_t>(row) / static_cast<int32_t>(from.sharers);
    const char* scales = from.scales + owner * from.scale_stride;
    const char* zeros = from.zeros + owner * from.zero_stride;
    if (from.group == 1) {
      hold(from, scales, zeros);
#pragma GCC unroll 4
      for (int d = 0; d < from.dim; d += V::kWidth)
        V::store(out + d, V::fma(V::template load_codes<kBits>(codes + d * kBits / 8), V::load(scales_ + d),
                                 V::load(zeros_ + d)));
    } else if (from.group % V::kWidth == 0) {
      for (int first = 0, n = 0; first < from.dim; first += from.group, ++n) {
        const auto scale = V::set1(scalar_as_float(scales, n, from.dtype));
        const auto zero = V::set1(scalar_as_float(zeros, n, from.dtype));
#pragma GCC unroll 4
        for (int d = first; d < first + from.group; d += V::kWidth)
          V::store(out + d, V::fma(V::template load_codes<kBits>(codes + d * kBits / 8), scale, zero));
      }
    } else {
      for (int d = 0; d < from.dim; d += V::kWidth) V::store(out + d, V::template load_codes<kBits>(codes + d * kBits / 8));
      for (int d = 0; d < from.dim; ++d)
        out[d] = out[d] * scalar_as_float(scales, d / from.group, from.dtype) +
                 scalar_as_float(zeros, d / from.group, from.dtype);
    }
  }

  void hold(const StoredRows& from, const char* scales, const char* zeros) {
    if (scales == held_) return;
    held_ = scales;
    widen_row<V>(scales, from.dtype, from.dim, from.dim, 1.0f, scales_);
    widen_row<V>(zeros, from.dtype, from.dim, from.dim, 1.0f, zeros_);
  }

  // Whole vectors are loaded, so that rows behind which nothing may lie are copied first. A bitmap that was
  // written since, and has other numbers of bits than there are elements, is one of zeros.
  void read_bitmap(const StoredRows& from, int64_t row, float* out) {
    const char* packed = from.rows + row * from.row_stride;
    if (row >= from.guarded) {
      std::memcpy(guarded_, packed, static_cast<size_t>(from.packed) * (from.dtype == DType::kFloat32 ? 4 : 2));
      packed = reinterpret_cast<const char*>(guarded_);
    }
    const uint8_t* bitmap = from.bitmaps + row * from.bitmap_stride;
    int found = 0;
    for (int d = 0; d < from.dim; d += 16) found += __builtin_popcount(bits_of(bitmap, d));
    if (found != from.packed) {
      std::memset(out, 0, sizeof(float) * from.dim);
    } else if (from.dtype == DType::kFloat32) {
      expand<DType::kFloat32>(packed, bitmap, from.dim, out);
    } else if (from.dtype == DType::kBFloat16) {
      expand<DType::kBFloat16>(packed, bitmap, from.dim, out);
    } else {
      expand<DType::kFloat16>(packed, bitmap, from.dim, out);
    }
  }

  // Of 16 channels.
  static uint32_t bits_of(const uint8_t* bitmap, int d) {
    uint16_t bits;
    std::memcpy(&bits, bitmap + d / 8, sizeof bits);
    return bits;
  }

  template <DType kDType>
  static void expand(const char* packed, const uint8_t* bitmap, int dim, float* out) {
    constexpr int kBytes = kDType == DType::kFloat32 ? 4 : 2;
    constexpr uint32_t kMask = (uint32_t{1} << V::kWidth) - 1;
    for (int d = 0; d < dim; d += 16) {
      const uint32_t bits = bits_of(bitmap, d);
#pragma GCC unroll 4
      for (int n = 0; n < 16; n += V::kWidth) {
        const uint32_t before = bits & ((uint32_t{1} << n) - 1);
        V::store(out + d + n,
                 V::template expand<kDType>(packed + kBytes * __builtin_popcount(before), bits >> n & kMask));
      }
      packed += kBytes * __builtin_popcount(bits);
    }
  }

  const char* held_ = nullptr;
  alignas(64) float scales_[kMaxHeadDim], zeros_[kMaxHeadDim];
  float guarded_[kMaxHeadDim + 16];
};

template <class V>
void copy_stored(const StoredRows& from, char* rows) {
  RowReader<V> reader;
  alignas(64) float row[kMaxHeadDim];
  const int64_t bytes = int64_t{from.dim} * (from.dtype == DType::kFloat32 ? 4 : 2);
  for (int t = 0; t < from.count; ++t) {
    reader.read(from, t, row);
    narrow_row<V>(row, from.dtype, from.dim, 1.0f, rows + t * bytes);
  }
}

// Rows [t, t + kStoredRows), while others are computed with.
inline void fetch_ahead(const StoredRows& from, int t) {
  __asm__ volatile("" ::: "memory");  // else gcc takes this for a function without effect, and drops the call
  const int end = t + kStoredRows < from.count ? t + kStoredRows : from.count;
  const int64_t element = from.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t bytes = from.coding == Coding::kPlain    ? from.dim * element
                        : from.coding == Coding::kBitmap ? from.packed * element
                                                         : int64_t{from.dim} * from.bits / 8;
  for (; t < end; ++t) {
    const int64_t row = from.row(t);
    if (row < 0) continue;
    const char* first = from.rows + row * from.row_stride;
    for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(first + byte, 0, 2);
    if (from.coding == Coding::kBitmap) __builtin_prefetch(from.bitmaps + row * from.bitmap_stride, 0, 2);
    if (from.coding == Coding::kCodes && from.sharers == 1) {
      __builtin_prefetch(from.scales + row * from.scale_stride, 0, 2);
      __builtin_prefetch(from.zeros + row * from.zero_stride, 0, 2);
    }
  }
}

// logits[r * kChunk + t] = queries[r] . rows[t] for kRows queries of `dim` floats and kStoredRows rows of a dtype. The
// order of each sum is the same for all kRows.
template <class V, DType kDType, int kRows>
inline void row_products(const float* queries, int dim, const char* const* rows, float* logits) {
  constexpr int kRowsAtOnce = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
  for (int first = 0; first < kStoredRows; first += kRowsAtOnce) {
    typename V::Reg sums[8];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) sums[n] = V::zero();
    for (int d = 0; d < dim; d += V::kWidth) {
      typename V::Reg x[kRowsAtOnce];
#pragma GCC unroll 8
      for (int t = 0; t < kRowsAtOnce; ++t) x[t] = load_as_float<V>(rows[first + t], d, kDType);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto query = V::keep(V::load(queries + int64_t{r} * dim + d));
#pragma GCC unroll 8
        for (int t = 0; t < kRowsAtOnce; ++t) sums[r * kRowsAtOnce + t] = V::fma(query, x[t], sums[r * kRowsAtOnce + t]);
      }
    }
    float found[8];
    V::reduce_each(sums, found);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < kRowsAtOnce; ++t) logits[int64_t{r} * kChunk + first + t] = found[r * kRowsAtOnce + t];
  }
}

template <class V, DType kDType>
void row_products_of(int count, const float* queries, int dim, const char* const* rows, float* logits) {
  int r = 0;
  for (; r + 4 <= count; r += 4)
    row_products<V, kDType, 4>(queries + int64_t{r} * dim, dim, rows, logits + int64_t{r} * kChunk);
  const float* rest = queries + int64_t{r} * dim;
  float* to = logits + int64_t{r} * kChunk;
  if (count - r == 3) row_products<V, kDType, 3>(rest, dim, rows, to);
  if (count - r == 2) row_products<V, kDType, 2>(rest, dim, rows, to);
  if (count - r == 1) row_products<V, kDType, 1>(rest, dim, rows, to);
}

// Keys and values of tiles that are stored, for the flash kernel: logits, and rows of values.
template <class V>
class StoredTiles {
 public:
  // Rows are read in eights; the values are fetched meanwhile.
  void multiply_keys(const StoredRows& keys, const StoredRows& values, int rows, const float* queries, float* logits) {
    const bool as_they_are = keys.coding == Coding::kPlain && (keys.dtype == DType::kFloat32 || rows <= 4);
    for (int t = 0; t < keys.count; t += kStoredRows) {
      const char* pointers[kStoredRows];
      for (int n = 0; n < kStoredRows; ++n) {
        const int64_t row = as_they_are ? keys.row(t + n) : -1;
        if (as_they_are) {
          pointers[n] = row < 0 ? reinterpret_cast<const char*>(kNothing) : keys.rows + row * keys.row_stride;
        } else {
          float* copy = copies_ + n * keys.dim;
          keys_.read(keys, t + n, copy);
          pointers[n] = reinterpret_cast<const char*>(copy);
        }
      }
      fetch_ahead(values, t);
      if (!as_they_are || keys.dtype == DType::kFloat32)
        row_products_of<V, DType::kFloat32>(rows, queries, keys.dim, pointers, logits + t);
      else if (keys.dtype == DType::kBFloat16)
        row_products_of<V, DType::kBFloat16>(rows, queries, keys.dim, pointers, logits + t);
      else
        row_products_of<V, DType::kFloat16>(rows, queries, keys.dim, pointers, logits + t);
    }
  }

  // Rows [t, t + kStoredRows) of values, and the floats from one to the next.
  const float* values(const StoredRows& values, int t, int64_t& stride) {
    if (values.coding == Coding::kPlain && values.dtype == DType::kFloat32 && values.positions == nullptr) {
      stride = values.row_stride / int64_t{sizeof(float)};
      return reinterpret_cast<const float*>(values.rows + (values.first + t) * values.row_stride);
    }
    for (int n = 0; n < kStoredRows && t + n < values.count; ++n) values_.read(values, t + n, copies_ + n * values.dim);
    stride = values.dim;
    return copies_;
  }

 private:
  alignas(64) static constexpr float kNothing[kMaxHeadDim] = {};
  RowReader<V> keys_, values_;
  alignas(64) float copies_[kStoredRows * kMaxHeadDim];
};

}  // namespace
}  // namespace gossamer
