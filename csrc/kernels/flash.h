// Flash attention of a panel of query rows over packed 64-key tiles: one template for all instruction sets. Include in
// one translation unit per instruction set, inside its own flags.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/convert.h"
#include "kernels/gemm.h"
#include "kernels/job.h"
#include "kernels/pack.h"
#include "kernels/rows.h"
#include "kernels/stored_rows.h"

namespace gossamer {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
constexpr float kInfinity = __builtin_inff();
// fp32 logits of more dimensions are summed in parts, because one long chain rounds more. Shorter parts cost time, but
// not where few rows wait for memory.
constexpr int kLongestSum = 128, kLongestSumOfFew = 32, kFewRows = 16;

// The length of parts of about one size.
inline int even_part(int depth, int longest) {
  const int parts = (depth + longest - 1) / longest;
  return (depth + parts - 1) / parts;
}

// softcap * tanh(logit / softcap) in powers of two; tanh by the exponential of the absolute value.
template <class V>
inline typename V::Reg soft_cap(typename V::Reg logit, float softcap) {
  const auto x = V::mul(logit, V::set1(1.0f / softcap));
  const auto e = V::template exp2<6>(V::mul(V::abs(x), V::set1(-2.0f * kLog2E)));
  const auto large = V::div(V::add(V::set1(1.0f), V::mul(e, V::set1(-1.0f))), V::add(V::set1(1.0f), e));
  // Near 0 the quotient cancels: x - x^3 / 3 + 2 x^5 / 15 - 17 x^7 / 315 is exact enough below 0.1.
  const auto square = V::mul(x, x);
  auto series = V::fma(V::set1(-17.0f / 315), square, V::set1(2.0f / 15));
  series = V::fma(series, square, V::set1(-1.0f / 3));
  series = V::fma(V::mul(series, square), V::abs(x), V::abs(x));
  const auto magnitude = V::select_less(V::abs(x), V::set1(0.1f), series, large);
  return V::mul(V::copy_sign(magnitude, x), V::set1(softcap * kLog2E));
}

// Online softmax. Masked logits become -inf before anything else: neither they nor their values reach the running
// maximum or the sums, so that a row's bits do not depend on keys that it cannot see.
template <class Isa>
class PanelKernel {
  using V = typename Isa::Vec;
  static constexpr int kVectors = kChunk / V::kWidth;
  // An fp32 row's reference logit is raised only if one exceeds it by a factor of 2^8: sums have room for that, and
  // most rows are then never rescaled. bf16 probabilities are relative to the largest logit, so that a key that
  // outweighs all others has a probability of exactly 1 and is not rounded.
  static constexpr float kSlack = Isa::kPairs ? 0.0f : 8.0f;

 public:
  explicit PanelKernel(const Panel& panel)
      : panel_(panel),
        dim_(panel.padded_head_dim),
        value_dim_(panel.padded_value_dim),
        depth_(Isa::kPairs ? dim_ / 2 : dim_),
        part_(Isa::kPairs ? depth_ : even_part(depth_, panel.rows > kFewRows ? kLongestSum : kLongestSumOfFew)),
        // fp32 queries carry the factor, and logits come out of the product in powers of two; bf16 ones stay exact.
        query_factor_(Isa::kPairs ? 1.0f : panel.softcap > 0 ? panel.scale : panel.scale * kLog2E),
        logit_factor_(panel.softcap > 0 ? 1.0f : panel.scale * kLog2E) {
    float* next = static_cast<float*>(panel.scratch);
    const auto take = [&next](int64_t floats) {
      float* taken = next;
      next += floats;
      return taken;
    };
    queries_ = take(int64_t{kMaxRows} * dim_);
    out_ = take(int64_t{kMaxRows} * value_dim_);
    logits_ = take(int64_t{kMaxRows} * kChunk);
    sums_ = take(int64_t{kMaxRows} * V::kWidth);
    maximum_ = take(kMaxRows);
    largest_ = take(kMaxRows);
    masks_ = reinterpret_cast<uint64_t*>(take(int64_t{kMaxRows} * 2));
  }

  void run() {
    start();
    Isa::begin();
    for (int64_t n = 0; n < panel_.tile_count; ++n) {
      next_ = n + 1 < panel_.tile_count ? panel_.tiles + n + 1 : nullptr;
      add_tile(panel_.tiles[n]);
    }
    Isa::end();
    if (!out_written_) clear_out();
    for (int r = 0; r < panel_.rows; ++r) finish_row(r);
  }

 private:
  void start() {
    for (int r = 0; r < panel_.rows; ++r) {
      float* query = queries_ + int64_t{r} * depth_;
      if constexpr (Isa::kPairs) {
        std::memset(query, 0, sizeof(float) * depth_);
        std::memcpy(query, panel_.queries[r], sizeof(uint16_t) * panel_.head_dim);
      } else {
        widen_row<V>(panel_.queries[r], panel_.dtype, panel_.head_dim, dim_, query_factor_, query);
      }
      maximum_[r] = largest_[r] = -kInfinity;
      masks_[r] = ~uint64_t{0};
    }
    std::memset(sums_, 0, sizeof(float) * panel_.rows * V::kWidth);
  }

  void add_tile(const Tile& tile) {
    int first = 0, last = panel_.rows;
    if (tile.kind != TileKind::kFull)
      mask_rows(tile, first, last);
    else if (masked_)
      for (int r = 0; r < panel_.rows; ++r) masks_[r] = ~uint64_t{0};
    masked_ = tile.kind != TileKind::kFull;
    if (first >= last) return;

    const int rows = last - first;
    float* logits = logits_ + int64_t{first} * kChunk;
    const uint32_t* queries = reinterpret_cast<uint32_t*>(queries_) + int64_t{first} * depth_;
    const uint32_t* keys = static_cast<const uint32_t*>(tile.keys);
    if (tile.stored_keys != nullptr)
      multiply_stored_keys(tile, rows, reinterpret_cast<const float*>(queries), logits);
    else
      for (int d = 0; d < depth_; d += part_)
        Isa::multiply(rows, kChunk, depth_ - d < part_ ? depth_ - d : part_, queries + d, depth_, keys + d * kChunk,
                      kChunk, logits, kChunk, d > 0);
    if (panel_.softcap > 0) cap(logits, rows);
    if (panel_.skip < kInfinity && tile.kind != TileKind::kMeans) leave_out(first, last);
    if (first < last) add_values(tile, first, last);
  }

  void add_values(const Tile& tile, int first, int last) {
    if (tile.added == nullptr)
      for (int r = first; r < last; ++r) weigh_row<false>(r, nullptr);
    else
      for (int r = first; r < last; ++r) weigh_row<true>(r, tile.added);
    // The first tile writes the sums, unless it leaves rows out.
    if (!out_written_ && last - first < panel_.rows) clear_out();
    if (tile.stored_values != nullptr) return add_stored_values(*tile.stored_values, first, last);
    Isa::multiply(last - first, value_dim_, Isa::kPairs ? kChunk / 2 : kChunk,
                  reinterpret_cast<const uint32_t*>(logits_ + int64_t{first} * kChunk), kChunk,
                  static_cast<const uint32_t*>(tile.values), tile.value_stride != 0 ? tile.value_stride : value_dim_,
                  out_ + int64_t{first} * value_dim_, value_dim_, out_written_);
    out_written_ = true;
  }

  // Only fp32 kernels get such tiles.
  void multiply_stored_keys(const Tile& tile, int rows, const float* queries, float* logits) {
    if constexpr (!Isa::kPairs) stored_.multiply_keys(*tile.stored_keys, *tile.stored_values, rows, queries, logits);
  }

  // The keys of the next tile are fetched meanwhile.
  void add_stored_values(const StoredRows& values, int first, int last) {
    if constexpr (!Isa::kPairs) {
      for (int t = 0; t < values.count; t += kStoredRows) {
        const int count = values.count - t < kStoredRows ? values.count - t : kStoredRows;
        int64_t stride = 0;
        const float* from = stored_.values(values, t, stride);
        if (next_ != nullptr && next_->stored_keys != nullptr) fetch_ahead(*next_->stored_keys, t);
        Isa::multiply(last - first, value_dim_, count,
                      reinterpret_cast<const uint32_t*>(logits_ + int64_t{first} * kChunk + t), kChunk,
                      reinterpret_cast<const uint32_t*>(from), stride, out_ + int64_t{first} * value_dim_, value_dim_,
                      out_written_);
        out_written_ = true;
      }
    }
  }

  void clear_out() {
    std::memset(out_, 0, sizeof(float) * panel_.rows * value_dim_);
    out_written_ = true;
  }

  void mask_rows(const Tile& tile, int& first, int& last) {
    if (tile.kind == TileKind::kScattered) sorted_.sort(tile);
    for (int r = 0; r < panel_.rows; ++r) masks_[r] = row_mask(panel_.rules, tile, sorted_, r, panel_.positions[r]);
    narrow(first, last);
  }

  // Rows whose largest logit of the tile lies more than the threshold below that of the tiles before leave it out.
  void leave_out(int& first, int& last) {
    for (int r = first; r < last; ++r) {
      if (masks_[r] == 0) continue;
      typename V::Reg z[kVectors];
      const float top = V::reduce_max(load_row<false>(r, nullptr, z));
      if (top < largest_[r] - panel_.skip) {
        masks_[r] = 0;
        masked_ = true;
      } else if (top > largest_[r]) {
        largest_[r] = top;
      }
    }
    narrow(first, last);
  }

  // Narrows [first, last) to the rows that attend anything, in the steps in which rows are multiplied.
  void narrow(int& first, int& last) {
    const int begin = first, end = last;
    first = end;
    last = begin;
    for (int r = begin; r < end; ++r) {
      if (masks_[r] == 0) continue;
      if (r < first) first = r;
      last = r + 1;
    }
    first = first / Isa::kRowStep * Isa::kRowStep;
    last = round_up(last, Isa::kRowStep);
    if (last > panel_.rows) last = panel_.rows;
  }

  void cap(float* logits, int rows) {
    const auto factor = V::set1(Isa::kPairs ? panel_.scale : 1.0f);
    for (int64_t i = 0; i < int64_t{rows} * kChunk; i += V::kWidth)
      V::store(logits + i, soft_cap<V>(V::mul(V::load(logits + i), factor), panel_.softcap));
  }

  // A row's 64 logits in powers of two, -inf where it is masked. Returns the largest of each lane.
  template <bool kAdded>
  inline typename V::Reg load_row(int r, const float* added, typename V::Reg* z) {
    const float* row = logits_ + int64_t{r} * kChunk;
    const uint64_t mask = masks_[r];
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) z[t] = V::load(row + t * V::kWidth);
    if constexpr (Isa::kPairs) {
      const auto factor = V::set1(logit_factor_);
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) z[t] = V::mul(z[t], factor);
    }
    if constexpr (kAdded) {
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) z[t] = V::add(z[t], V::load(added + t * V::kWidth));
    }
    if (mask != ~uint64_t{0}) {
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) z[t] = V::select(mask >> (t * V::kWidth), z[t], V::set1(-kInfinity));
    }
    auto top = z[0];
#pragma GCC unroll 16
    for (int t = 1; t < kVectors; ++t) top = V::max(top, z[t]);
    return top;
  }

  // 64 logits become probabilities relative to the row's reference logit, in place, as fp32 or bf16.
  template <bool kAdded>
  inline void weigh_row(int r, const float* added) {
    float* row = logits_ + int64_t{r} * kChunk;
    typename V::Reg z[kVectors];
    const auto top = load_row<kAdded>(r, added, z);
    if (V::any_greater(top, V::set1(maximum_[r] + kSlack))) raise_maximum(r, V::reduce_max(top));

    const auto shift = V::set1(maximum_[r] == -kInfinity ? 0.0f : -maximum_[r]);
    auto sum = V::load(sums_ + int64_t{r} * V::kWidth);
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) {
      const auto p = V::template exp2<Isa::kExpDegree>(V::add(z[t], shift));
      sum = V::add(sum, p);
      if constexpr (Isa::kPairs)
        V::store_bf16(reinterpret_cast<uint16_t*>(row) + t * V::kWidth, p);
      else
        V::store(row + t * V::kWidth, p);
    }
    V::store(sums_ + int64_t{r} * V::kWidth, sum);
  }

  // Rare after a row's first tiles, hence out of line.
  __attribute__((noinline)) void raise_maximum(int r, float top) {
    const float previous = maximum_[r];
    maximum_[r] = top;
    if (previous == -kInfinity) return;
    const auto down = V::template exp2<6>(V::set1(previous - top));
    float* sums = sums_ + int64_t{r} * V::kWidth;
    V::store(sums, V::mul(V::load(sums), down));
    float* out = out_ + int64_t{r} * value_dim_;
    for (int d = 0; d < value_dim_; d += V::kWidth) V::store(out + d, V::mul(V::load(out + d), down));
  }

  void finish_row(int r) {
    const float total = V::reduce_add(V::load(sums_ + int64_t{r} * V::kWidth));
    if (panel_.sink_logits == nullptr && total > 0 && total < kInfinity) {
      write_row(r, 1.0f / total, static_cast<float>((maximum_[r] + double{__builtin_log2f(total)}) * kLn2));
      return;
    }
    const double sink = panel_.sink_logits != nullptr ? panel_.sink_logits[r] / kLn2 : -double{kInfinity};
    const double top = maximum_[r] > sink ? maximum_[r] : sink;
    float factor = 0.0f, lse = -kInfinity;
    if (total != total) {  // NaN among the logits
      factor = lse = total;
    } else if (top != -double{kInfinity}) {
      const double own = total > 0 ? total * std::exp2(maximum_[r] - top) : 0.0;
      const double all = own + (sink == top ? 1.0 : std::exp2(sink - top));  // a sink of infinity takes all
      factor = total > 0 ? static_cast<float>(own / all / total) : 0.0f;
      lse = static_cast<float>((top + std::log2(all)) * kLn2);
    }
    write_row(r, factor, lse);
  }

  void write_row(int r, float factor, float lse) {
    narrow_row<V>(out_ + int64_t{r} * value_dim_, panel_.output_dtype, panel_.value_dim, factor, panel_.outputs[r]);
    *panel_.lse[r] = lse;
  }

  const Panel& panel_;
  const int dim_, value_dim_, depth_, part_;
  const float query_factor_;
  const float logit_factor_;  // of pairs: fp32 queries carry it
  SortedKeys sorted_;  // of the last scattered tile
  StoredTiles<V> stored_;
  const Tile* next_ = nullptr;
  bool masked_ = false;  // masks_ are not all ones
  bool out_written_ = false;
  float *queries_, *out_, *logits_;
  float* sums_;  // a vector of partial sums a row
  float* maximum_;  // the reference logit: at most kSlack below the largest
  float* largest_;  // the largest logit so far, where tiles are left out
  uint64_t* masks_;
};

template <class Isa>
void attend_panel(const Panel& panel) {
  PanelKernel<Isa>(panel).run();
}

}  // namespace
}  // namespace gossamer
