// Gradients of a panel of query rows over packed 64-key tiles: one template for all instruction sets. Include in one
// translation unit per instruction set, inside its own flags.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/convert.h"
#include "kernels/flash.h"
#include "kernels/gemm.h"
#include "kernels/job.h"
#include "kernels/pack.h"
#include "kernels/rows.h"

namespace gossamer {
namespace {

// Weights p = exp(logit - lse) are computed again; with dP = what reaches the output times values, the slopes are
// ds = p (dP - level). Then, all by the same matrix product of rows with tiles of 64 lanes:
//   dq += ds k      dk^T += q^T ds      dv^T += (what reaches)^T p
// so that the sums of keys lie across, and neither weights nor slopes are transposed.
template <class Isa>
class GradientKernel {
  using V = typename Isa::Vec;
  static constexpr int kVectors = kChunk / V::kWidth;
  static constexpr int kPair = Isa::kPairs ? 2 : 1;
  // Rows are the depth of the products for keys: whole pairs of them, or whole tiles of pairs.
  // Rows whose logits stay in the first cache from one product to the next.
  static constexpr int kRowsAtOnce = 64;
  static constexpr int kStep = !Isa::kPairs ? 1 : Isa::kRowStep > 1 ? kRowPadding : 2;

 public:
  explicit GradientKernel(const GradientPanel& panel)
      : panel_(panel),
        dim_(panel.padded_head_dim),
        value_dim_(panel.padded_value_dim),
        depth_(dim_ / kPair),
        value_depth_(value_dim_ / kPair),
        across_(panel.padded_rows / kPair),
        part_(Isa::kPairs ? depth_ : even_part(depth_, kLongestSum)),
        value_part_(Isa::kPairs ? value_depth_ : even_part(value_depth_, kLongestSum)),
        capped_factor_(Isa::kPairs ? panel.scale : 1.0f),
        logit_factor_(Isa::kPairs && !(panel.softcap > 0) ? panel.scale * kLog2E : 1.0f) {
    float* next = static_cast<float*>(panel.scratch);
    const auto take = [&next](int64_t floats) {
      float* taken = next;
      next += floats;
      return taken;
    };
    weights_ = take(int64_t{kMaxRows} * kChunk);
    slopes_ = take(int64_t{kMaxRows} * kChunk);
    paired_weights_ = reinterpret_cast<uint32_t*>(take(int64_t{kMaxRows} / 2 * kChunk));
    paired_slopes_ = reinterpret_cast<uint32_t*>(take(int64_t{kMaxRows} / 2 * kChunk));
    masks_ = reinterpret_cast<uint64_t*>(take(int64_t{kMaxRows} * 2));
  }

  void run() {
    for (int r = panel_.rows; r < panel_.padded_rows; ++r) masks_[r] = 0;
    Isa::begin();
    for (int64_t n = 0; n < panel_.tile_count; ++n) add_tile(panel_.tiles[n], panel_.sums[n]);
    Isa::end();
  }

 private:
  void add_tile(const Tile& tile, float* sums) {
    int first = panel_.padded_rows, last = 0;
    for (int r = 0; r < panel_.rows; ++r) {
      masks_[r] = row_mask(panel_.rules, tile, sorted_, r, panel_.positions[r]);
      if (masks_[r] == 0) continue;
      if (r < first) first = r;
      last = r + 1;
    }
    if (first >= last) return;
    first = first / kStep * kStep;
    last = round_up(last, kStep);
    const int rows = last - first;

    for (int r = first; r < last; r += kRowsAtOnce) add_rows(tile, r, last < r + kRowsAtOnce ? last : r + kRowsAtOnce);
    const uint32_t *weights = reinterpret_cast<uint32_t*>(weights_), *slopes = reinterpret_cast<uint32_t*>(slopes_);
    if constexpr (Isa::kPairs) {
      weights = paired_weights_;
      slopes = paired_slopes_;
    }
    const int64_t at = first / kPair;
    if (panel_.needs_keys)
      Isa::multiply(dim_, kChunk, rows / kPair, static_cast<const uint32_t*>(panel_.queries_across) + at, across_,
                    slopes + at * kChunk, kChunk, sums, kChunk, true);
    if (panel_.needs_values)
      Isa::multiply(value_dim_, kChunk, rows / kPair, static_cast<const uint32_t*>(panel_.reaching_across) + at,
                    across_, weights + at * kChunk, kChunk, sums + int64_t{kChunk} * dim_, kChunk, true);
  }

  // Weights and slopes of some rows, and what these add to the gradients of queries.
  void add_rows(const Tile& tile, int first, int last) {
    const int rows = last - first;
    const uint32_t* keys = static_cast<const uint32_t*>(tile.keys);
    const uint32_t* key_rows = static_cast<const uint32_t*>(tile.values);
    const uint32_t* values = key_rows + int64_t{kChunk} * depth_;
    multiply(rows, depth_, part_, elements(panel_.queries, first, depth_), keys, weights_ + int64_t{first} * kChunk);
    multiply(rows, value_depth_, value_part_, elements(panel_.reaching, first, value_depth_), values,
             slopes_ + int64_t{first} * kChunk);
    for (int r = first; r < last; ++r) weigh_row(r);
    if constexpr (Isa::kPairs)
      for (int r = first; r < last; r += 2) pair_rows(r);
    if (panel_.query_sums != nullptr)
      Isa::multiply(rows, dim_, kChunk / kPair, reinterpret_cast<uint32_t*>(slopes_) + int64_t{first} * kChunk, kChunk,
                    key_rows, dim_, panel_.query_sums + int64_t{first} * dim_, dim_, true);
  }

  static const uint32_t* elements(const void* rows, int first, int depth) {
    return static_cast<const uint32_t*>(rows) + int64_t{first} * depth;
  }

  static void multiply(int rows, int depth, int part, const uint32_t* a, const uint32_t* b, float* out) {
    for (int d = 0; d < depth; d += part)
      Isa::multiply(rows, kChunk, depth - d < part ? depth - d : part, a + d, depth, b + int64_t{d} * kChunk, kChunk,
                    out, kChunk, d > 0);
  }

  // Logits become weights, and what reaches them slopes, in place, as fp32 or bf16. What a row does not attend is 0,
  // whatever stands there.
  inline void weigh_row(int r) {
    float *weights = weights_ + int64_t{r} * kChunk, *slopes = slopes_ + int64_t{r} * kChunk;
    const uint64_t mask = masks_[r];
    if (mask == 0) {
      std::memset(weights, 0, sizeof(float) * kChunk);
      std::memset(slopes, 0, sizeof(float) * kChunk);
      return;
    }
    const auto lse = V::set1(-panel_.lse[r]), level = V::set1(-panel_.level[r]);
    const auto factor = V::set1(logit_factor_);
    typename V::Reg p[kVectors], s[kVectors];
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) {
      p[t] = V::load(weights + t * V::kWidth);
      s[t] = V::add(V::load(slopes + t * V::kWidth), level);
    }
    if (panel_.softcap > 0) cap(p, s);
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) {
      p[t] = V::template exp2<Isa::kExpDegree>(V::fma(p[t], factor, lse));
      s[t] = V::mul(s[t], p[t]);
    }
    if (mask != ~uint64_t{0}) {
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) {
        p[t] = V::select(mask >> (t * V::kWidth), p[t], V::zero());
        s[t] = V::select(mask >> (t * V::kWidth), s[t], V::zero());
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) {
      if constexpr (Isa::kPairs) {
        V::store_bf16(reinterpret_cast<uint16_t*>(weights) + t * V::kWidth, p[t]);
        V::store_bf16(reinterpret_cast<uint16_t*>(slopes) + t * V::kWidth, s[t]);
      } else {
        V::store(weights + t * V::kWidth, p[t]);
        V::store(slopes + t * V::kWidth, s[t]);
      }
    }
  }

  // Logits become capped ones in powers of two, and slopes those before the cap.
  void cap(typename V::Reg* p, typename V::Reg* s) const {
    const auto factor = V::set1(capped_factor_), inverse = V::set1(1.0f / (panel_.softcap * kLog2E));
    for (int t = 0; t < kVectors; ++t) {
      p[t] = soft_cap<V>(V::mul(p[t], factor), panel_.softcap);
      const auto share = V::mul(p[t], inverse);
      s[t] = V::mul(s[t], V::fma(V::mul(share, V::set1(-1.0f)), share, V::set1(1.0f)));
    }
  }

  void pair_rows(int r) {
    const auto pair = [r](const float* rows, uint32_t* to) {
      const uint16_t* even = reinterpret_cast<const uint16_t*>(rows + int64_t{r} * kChunk);
      const uint16_t* odd = reinterpret_cast<const uint16_t*>(rows + int64_t{r + 1} * kChunk);
      merge_rows<V>(even, odd, kChunk, kChunk, to + int64_t{r / 2} * kChunk);
    };
    pair(weights_, paired_weights_);
    pair(slopes_, paired_slopes_);
  }

  const GradientPanel& panel_;
  const int dim_, value_dim_, depth_, value_depth_, across_, part_, value_part_;
  const float capped_factor_, logit_factor_;
  SortedKeys sorted_;  // of no tile: keys that the plan orders have gradients elsewhere
  float *weights_, *slopes_;
  uint32_t *paired_weights_, *paired_slopes_;
  uint64_t* masks_;
};

template <class Isa>
void add_gradients(const GradientPanel& panel) {
  GradientKernel<Isa>(panel).run();
}

template <class Isa>
void pack_gradient_rows(const GradientRows& job) {
  using V = typename Isa::Vec;
  uint32_t* to = static_cast<uint32_t*>(job.to);
  const int depth = Isa::kPairs ? job.padded_dim / 2 : job.padded_dim;
  std::memset(to + int64_t{job.rows} * depth, 0, sizeof(uint32_t) * depth * (job.padded_rows - job.rows));
  for (int r = 0; r < job.rows; ++r) {
    uint32_t* row = to + int64_t{r} * depth;
    if constexpr (Isa::kPairs) {
      std::memset(row, 0, sizeof(uint32_t) * depth);
      std::memcpy(row, job.from[r], sizeof(uint16_t) * job.dim);
    } else {
      widen_row<V>(job.from[r], job.dtype, job.dim, job.padded_dim, job.factor, reinterpret_cast<float*>(row));
    }
  }
  // Across: columns of elements that are neighbours among the rows.
  const uint32_t* rows = to;
  const int count = Isa::kPairs ? job.padded_rows / 2 : job.padded_rows;
  if constexpr (Isa::kPairs) {
    uint32_t* pairs = static_cast<uint32_t*>(job.scratch);
    for (int r = 0; r < count; ++r)
      merge_rows<V>(to + int64_t{2 * r} * depth, to + int64_t{2 * r + 1} * depth, job.padded_dim, job.padded_dim,
                    pairs + int64_t{r} * job.padded_dim);
    rows = pairs;
  }
  const void* block[V::kWidth];
  for (int r = 0; r < count; r += V::kWidth) {
    for (int n = 0; n < V::kWidth; ++n) block[n] = rows + int64_t{r + n} * job.padded_dim;
    for (int d = 0; d < job.padded_dim; d += V::kWidth)
      V::transpose(block, d, static_cast<uint32_t*>(job.across) + int64_t{d} * count + r, count);
  }
}

template <class Isa>
void write_gradient_keys(const GradientKeys& job) {
  using V = typename Isa::Vec;
  alignas(64) float rows[V::kWidth * kMaxHeadDim];
  const void* block[V::kWidth];
  for (int key = 0; key < kChunk; key += V::kWidth) {
    for (int d = 0; d < job.padded_dim; d += V::kWidth) {
      for (int n = 0; n < V::kWidth; ++n) block[n] = job.sums + int64_t{d + n} * kChunk;
      V::transpose(block, key, reinterpret_cast<uint32_t*>(rows) + d, kMaxHeadDim);
    }
    for (int n = 0; n < V::kWidth; ++n)
      if (job.to[key + n] != nullptr)
        narrow_row<V>(rows + n * kMaxHeadDim, job.dtype, job.dim, job.factor, job.to[key + n]);
  }
}

template <class Isa>
void write_gradient_row(const float* sums, DType dtype, int dim, float factor, void* to) {
  narrow_row<typename Isa::Vec>(sums, dtype, dim, factor, to);
}

template <class Isa>
float gradient_product(const void* a, const void* b, DType dtype, int dim) {
  using V = typename Isa::Vec;
  auto sum = V::zero();
  int d = 0;
  for (; d + V::kWidth <= dim; d += V::kWidth)
    sum = V::fma(load_as_float<V>(a, d, dtype), load_as_float<V>(b, d, dtype), sum);
  float total = V::reduce_add(sum);
  for (; d < dim; ++d) total += scalar_as_float(a, d, dtype) * scalar_as_float(b, d, dtype);
  return total;
}

template <class Isa>
const GradientKernels* gradient_kernels() {
  static const GradientKernels kernels{pack_gradient_rows<Isa>, add_gradients<Isa>, write_gradient_keys<Isa>,
                                       write_gradient_row<Isa>, gradient_product<Isa>};
  return &kernels;
}

}  // namespace
}  // namespace gossamer
