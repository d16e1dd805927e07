// Flash attention of a panel of query rows over packed 64-key tiles: one template for all instruction sets.
//
// All matrix work is one shape: rows of 32-bit elements, broadcast, times tiles of 32-bit lanes, accumulated in fp32.
// In the fp32 paths an element is a float and a step is an FMA; in the bf16 path it is a pair of bf16 and a step is a
// pairwise dot product. Include in one translation unit per instruction set, inside its own flags.
#pragma once

#include <math.h>
#include <cstdint>
#include <string.h>

#include "half.h"
#include "job.h"

namespace gossamer {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_inff();

// out[r][c] (+)= sum over d of a[r][d] * b[d][c], for R rows and C vectors of columns.
template <class Isa, int R, int C>
inline void micro_kernel(int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* out,
                         int64_t ldo, bool accumulate) {
  using V = typename Isa::Vec;
  typename V::Reg acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = accumulate ? V::load(out + r * ldo + c * V::kWidth) : V::zero();
  for (int d = 0; d < depth; ++d) {
    typename Isa::Operand columns[C];
    for (int c = 0; c < C; ++c) columns[c] = Isa::load(b + d * ldb + c * V::kWidth);
    for (int r = 0; r < R; ++r) {
      const auto element = Isa::broadcast(a + r * lda + d);
      for (int c = 0; c < C; ++c) acc[r][c] = Isa::mac(element, columns[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) V::store(out + r * ldo + c * V::kWidth, acc[r][c]);
}

template <class Isa, int R>
inline void row_strip(int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                      float* out, int64_t ldo, bool accumulate) {
  using V = typename Isa::Vec;
  constexpr int kStep = V::kGemmCols * V::kWidth;
  int c = 0;
  for (; c + kStep <= columns; c += kStep)
    micro_kernel<Isa, R, V::kGemmCols>(depth, a, lda, b + c, ldb, out + c, ldo, accumulate);
  for (; c < columns; c += V::kWidth) micro_kernel<Isa, R, 1>(depth, a, lda, b + c, ldb, out + c, ldo, accumulate);
}

template <class Isa>
inline void gemm(int rows, int columns, int depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                 float* out, int64_t ldo, bool accumulate) {
  constexpr int kRows = Isa::Vec::kGemmRows;
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    row_strip<Isa, kRows>(columns, depth, a + r * lda, lda, b, ldb, out + r * ldo, ldo, accumulate);
  for (; r + 2 <= rows; r += 2)
    row_strip<Isa, 2>(columns, depth, a + r * lda, lda, b, ldb, out + r * ldo, ldo, accumulate);
  for (; r < rows; ++r) row_strip<Isa, 1>(columns, depth, a + r * lda, lda, b, ldb, out + r * ldo, ldo, accumulate);
}

inline uint64_t bits_below(int64_t count) {
  return count <= 0 ? 0 : count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// Bits of the slots low..high-1 among 64 consecutive ones.
inline uint64_t bits_between(int64_t first, int64_t low, int64_t high) {
  return bits_below(high - first) & ~bits_below(low - first);
}

// The keys of a tile that a row at this coordinate attends.
inline uint64_t row_bits(const Tile& tile, const Rules& rules, int64_t at) {
  if (tile.kind == TileKind::kConsecutive) {
    const int64_t f = tile.first_slot;
    uint64_t allowed = bits_between(f, rules.live_begin, rules.live_end);
    if (rules.causal) allowed &= bits_below(at + 1 - f);
    if (rules.limit < kUnlimited) allowed &= bits_between(f, at - rules.limit + 1, at + rules.limit);
    uint64_t chosen = tile.key_bits | bits_below(rules.sink_end - f);
    if (rules.window > 0) chosen |= bits_between(f, at - rules.window + 1, at + rules.window);
    return allowed & chosen;
  }
  uint64_t bits = 0;
  for (int t = 0; t < tile.slot_count; ++t) {
    const int64_t slot = tile.slots[t];
    const int64_t distance = slot < at ? at - slot : slot - at;
    bool yes = slot >= rules.live_begin && slot < rules.live_end && (!rules.causal || slot <= at);
    yes = yes && distance < rules.limit;
    if (tile.kind == TileKind::kScattered)
      yes = yes && ((tile.key_bits >> t & 1) || slot < rules.sink_end || distance < rules.window);
    else
      yes = yes && (tile.key_bits >> t & 1);
    bits |= uint64_t{yes} << t;
  }
  return bits;
}

template <class V>
inline typename V::Reg load_as_float(const void* row, int at, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return V::load_bf16(static_cast<const uint16_t*>(row) + at);
    case DType::kFloat16:
      return V::load_fp16(static_cast<const uint16_t*>(row) + at);
    default:
      return V::load(static_cast<const float*>(row) + at);
  }
}

inline float scalar_as_float(const void* row, int at, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(row)[at]);
    case DType::kFloat16:
      return fp16_to_float(static_cast<const uint16_t*>(row)[at]);
    default:
      return static_cast<const float*>(row)[at];
  }
}

// A row of dim values as floats, zero up to padded.
template <class V>
inline void widen_row(const void* row, DType dtype, int dim, int padded, float* out) {
  int d = 0;
  for (; d + V::kWidth <= dim; d += V::kWidth) V::store(out + d, load_as_float<V>(row, d, dtype));
  for (; d < dim; ++d) out[d] = scalar_as_float(row, d, dtype);
  for (; d < padded; ++d) out[d] = 0.0f;
}

template <class V>
inline void narrow_row(const float* row, DType dtype, int dim, void* out) {
  int d = 0;
  for (; d + V::kWidth <= dim; d += V::kWidth) {
    if (dtype == DType::kBFloat16)
      V::store_bf16(static_cast<uint16_t*>(out) + d, V::load(row + d));
    else if (dtype == DType::kFloat16)
      V::store_fp16(static_cast<uint16_t*>(out) + d, V::load(row + d));
    else
      V::store(static_cast<float*>(out) + d, V::load(row + d));
  }
  for (; d < dim; ++d) {
    if (dtype == DType::kBFloat16)
      static_cast<uint16_t*>(out)[d] = float_to_bf16(row[d]);
    else if (dtype == DType::kFloat16)
      static_cast<uint16_t*>(out)[d] = float_to_fp16(row[d]);
    else
      static_cast<float*>(out)[d] = row[d];
  }
}

inline uint32_t bf16_pair(uint16_t low, uint16_t high) { return uint32_t{low} | uint32_t{high} << 16; }

// Keys become [depth][64] elements, values [depth][padded_value_dim]: depth counts floats, or pairs of bf16.
template <class Isa>
void pack_tile(const PackJob& job) {
  using V = typename Isa::Vec;
  uint32_t* keys = static_cast<uint32_t*>(job.keys);
  uint32_t* values = static_cast<uint32_t*>(job.values);
  if constexpr (Isa::kPairs) {
    const int depth = job.padded_head_dim / 2;
    for (int t = 0; t < kChunk; ++t) {
      const uint16_t* row = static_cast<const uint16_t*>(job.key_rows[t]);
      for (int d = 0; d < depth; ++d) {
        const int at = 2 * d;
        keys[d * kChunk + t] = row == nullptr || at >= job.head_dim
                                   ? 0
                                   : bf16_pair(row[at], at + 1 < job.head_dim ? row[at + 1] : uint16_t{0});
      }
    }
    for (int t = 0; t < kChunk / 2; ++t) {
      const uint16_t* low = static_cast<const uint16_t*>(job.value_rows[2 * t]);
      const uint16_t* high = static_cast<const uint16_t*>(job.value_rows[2 * t + 1]);
      uint32_t* out = values + int64_t{t} * job.padded_value_dim;
      for (int d = 0; d < job.value_dim; ++d) out[d] = bf16_pair(low ? low[d] : 0, high ? high[d] : 0);
      for (int d = job.value_dim; d < job.padded_value_dim; ++d) out[d] = 0;
    }
  } else {
    float* wide = reinterpret_cast<float*>(values);
    alignas(64) float row[kMaxHeadDim];
    for (int t = 0; t < kChunk; ++t) {
      if (job.key_rows[t] == nullptr) {
        for (int d = 0; d < job.padded_head_dim; ++d) keys[d * kChunk + t] = 0;
        memset(wide + int64_t{t} * job.padded_value_dim, 0, sizeof(float) * job.padded_value_dim);
        continue;
      }
      widen_row<V>(job.key_rows[t], job.dtype, job.head_dim, job.padded_head_dim, row);
      for (int d = 0; d < job.padded_head_dim; ++d) keys[d * kChunk + t] = float_to_bits(row[d]);
      widen_row<V>(job.value_rows[t], job.dtype, job.value_dim, job.padded_value_dim,
                   wide + int64_t{t} * job.padded_value_dim);
    }
  }
}

// logits to softcap * tanh(logits / softcap), in base-2 units; tanh by the exponential of the absolute value.
template <class V>
inline typename V::Reg soft_cap(typename V::Reg logit, float softcap) {
  const auto x = V::mul(logit, V::set1(1.0f / softcap));
  const auto e = V::template exp2<5>(V::mul(V::abs(x), V::set1(-2.0f * kLog2E)));
  const auto large = V::div(V::add(V::set1(1.0f), V::mul(e, V::set1(-1.0f))), V::add(V::set1(1.0f), e));
  // Near 0 the quotient cancels: x - x^3 / 3 + 2 x^5 / 15 - 17 x^7 / 315 is exact enough below 0.1.
  const auto square = V::mul(x, x);
  auto series = V::fma(V::set1(-17.0f / 315), square, V::set1(2.0f / 15));
  series = V::fma(series, square, V::set1(-1.0f / 3));
  series = V::fma(V::mul(series, square), V::abs(x), V::abs(x));
  const auto magnitude = V::select_less(V::abs(x), V::set1(0.1f), series, large);
  return V::mul(V::copy_sign(magnitude, x), V::set1(softcap * kLog2E));
}

// One row of 64 logits becomes probabilities relative to the running maximum; returns the sum.
template <class Isa>
inline float softmax_row(float* s, uint64_t bits, float softcap, float& maximum, float& correction) {
  using V = typename Isa::Vec;
  constexpr int kVectors = kChunk / V::kWidth;
  constexpr uint64_t kLanes = (uint64_t{1} << V::kWidth) - 1;
  typename V::Reg x[kVectors];
  auto top = V::set1(-kInfinity);
  for (int n = 0; n < kVectors; ++n) {
    x[n] = V::load(s + n * V::kWidth);
    if (softcap > 0) x[n] = soft_cap<V>(x[n], softcap);
    const uint64_t lanes = bits >> (n * V::kWidth) & kLanes;
    if (lanes != kLanes) x[n] = V::select(lanes, x[n], V::set1(-kInfinity));
    top = V::max(top, x[n]);
  }
  const float highest = V::reduce_max(top);
  const float updated = highest > maximum ? highest : maximum;
  correction = maximum == updated ? 1.0f : exp2f(maximum - updated);
  maximum = updated;
  const auto shift = V::set1(updated == -kInfinity ? 0.0f : updated);
  auto sum = V::zero();
  for (int n = 0; n < kVectors; ++n) {
    const auto p = V::template exp2<Isa::kExpDegree>(V::fms(x[n], V::set1(1.0f), shift));
    V::store(s + n * V::kWidth, p);
    sum = V::add(sum, p);
  }
  return V::reduce_add(sum);
}

template <class Isa>
void attend_panel(const Panel& p) {
  using V = typename Isa::Vec;
  const int dim = p.padded_head_dim, value_dim = p.padded_value_dim;
  const int depth = Isa::kPairs ? dim / 2 : dim;
  const int key_depth = Isa::kPairs ? kChunk / 2 : kChunk;
  float* queries = static_cast<float*>(p.scratch);
  float* out = queries + int64_t{kMaxRows} * dim;
  float* logits = out + int64_t{kMaxRows} * value_dim;
  float* maximum = logits + int64_t{kMaxRows} * kChunk;
  float* total = maximum + kMaxRows;
  uint32_t* packed = reinterpret_cast<uint32_t*>(queries);

  // Without a soft-cap the logits come out of the product in base-2 units.
  const float factor = p.softcap > 0 ? p.scale : p.scale * kLog2E;
  alignas(64) float row[kMaxHeadDim];
  for (int r = 0; r < p.rows; ++r) {
    widen_row<V>(p.queries[r], p.dtype, p.head_dim, dim, row);
    if constexpr (Isa::kPairs) {
      for (int d = 0; d < depth; ++d)
        packed[int64_t{r} * depth + d] = bf16_pair(float_to_bf16(row[2 * d]), float_to_bf16(row[2 * d + 1]));
    } else {
      for (int d = 0; d < dim; d += V::kWidth) V::store(queries + int64_t{r} * dim + d, V::mul(V::load(row + d), V::set1(factor)));
    }
    maximum[r] = -kInfinity;
    total[r] = 0.0f;
  }
  memset(out, 0, sizeof(float) * p.rows * value_dim);

  Isa::begin();
  for (int64_t n = 0; n < p.tile_count; ++n) {
    const Tile& tile = p.tiles[n];
    Isa::multiply(p.rows, kChunk, depth, packed, depth, static_cast<const uint32_t*>(tile.keys), kChunk, logits, kChunk,
              false);
    for (int r = 0; r < p.rows; ++r) {
      float* s = logits + int64_t{r} * kChunk;
      const uint64_t bits =
          tile.kind == TileKind::kFull ? ~uint64_t{0} : row_bits(tile, p.rules, p.coordinates[r]);
      if (bits == 0) {
        memset(s, 0, sizeof(float) * kChunk);
        continue;
      }
      if constexpr (Isa::kPairs)  // bf16 queries keep their exact values; the factor comes afterwards
        for (int t = 0; t < kChunk; t += V::kWidth) V::store(s + t, V::mul(V::load(s + t), V::set1(factor)));
      float correction;
      const float sum = softmax_row<Isa>(s, bits, p.softcap, maximum[r], correction);
      total[r] = total[r] * correction + sum;
      if (correction != 1.0f) {
        float* o = out + int64_t{r} * value_dim;
        for (int d = 0; d < value_dim; d += V::kWidth) V::store(o + d, V::mul(V::load(o + d), V::set1(correction)));
      }
      if constexpr (Isa::kPairs) Isa::round_row(s);
    }
    Isa::multiply(p.rows, value_dim, key_depth, reinterpret_cast<const uint32_t*>(logits), kChunk,
              static_cast<const uint32_t*>(tile.values), value_dim, out, value_dim, true);
  }
  Isa::end();

  for (int r = 0; r < p.rows; ++r) {
    float sum = total[r], top = maximum[r];
    float* o = out + int64_t{r} * value_dim;
    float scale = sum > 0 || sum != sum ? 1.0f / sum : 0.0f;
    float lse = sum > 0 || sum != sum ? top * kLn2 + logf(sum) : -kInfinity;
    if (p.sink_logits != nullptr) {
      const float sink = p.sink_logits[r];
      const float high = lse > sink ? lse : sink;
      const float both = high == -kInfinity ? high : high + logf(expf(lse - high) + expf(sink - high));
      scale *= expf(lse - both);
      if (!(lse > -kInfinity) && lse == lse) scale = 0.0f;
      lse = both;
    }
    for (int d = 0; d < value_dim; d += V::kWidth) V::store(o + d, V::mul(V::load(o + d), V::set1(scale)));
    narrow_row<V>(o, p.dtype, p.value_dim, p.outputs[r]);
    *p.lse[r] = lse;
  }
}

}  // namespace
}  // namespace gossamer
