// Planning's inner loops: one template for all instruction sets. Include in one translation unit per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/convert.h"
#include "kernels/pack.h"
#include "kernels/page_scores.h"
#include "kernels/read_page.h"
#include "kernels/score_job.h"
#include "kernels/stored_rows.h"
#include "kernels/token_scores.h"

namespace gossamer {
namespace {

template <class Isa>
class ScoreCode {
  using V = typename Isa::Vec;
  using Reg = typename V::Reg;
  static constexpr int kVectors = kChunk / V::kWidth;
  static constexpr int kDegree = 5;  // of 2^x; scores decide between near-equals, so bf16 gets no coarser one
  static constexpr float kNothing = -__builtin_inff();

 public:
  static void pack_queries(const RowList& list, void* out) {
    const int depth = depth_of(list.padded_dim);
    for (int r = 0; r < list.count; ++r) {
      uint32_t* row = static_cast<uint32_t*>(out) + int64_t{r} * depth;
      const bool padded = Isa::kPairs && list.dim < list.padded_dim;
      if (list.rows[r] == nullptr || padded) std::memset(row, 0, sizeof(uint32_t) * depth);
      if (list.rows[r] == nullptr) continue;
      if constexpr (Isa::kPairs)
        std::memcpy(row, list.rows[r], sizeof(uint16_t) * list.dim);
      else
        widen_row<V>(list.rows[r], list.dtype, list.dim, list.padded_dim, 1.0f, reinterpret_cast<float*>(row));
    }
  }

  static void pack_keys(const RowList& list, void* out) {
    alignas(64) uint32_t copies[kChunk * kMaxHeadDim];
    const int depth = depth_of(list.padded_dim);
    const void* rows[kChunk];
    if (list.dim == list.padded_dim && (Isa::kPairs || list.dtype == DType::kFloat32)) {
      for (int t = 0; t < kChunk; ++t) rows[t] = list.rows[t] != nullptr ? list.rows[t] : KeyRows<Isa>::zeros();
    } else {
      pack_queries(list, copies);
      for (int t = 0; t < kChunk; ++t) rows[t] = copies + int64_t{t} * depth;
    }
    transpose_keys<V>(rows, depth, static_cast<uint32_t*>(out));
  }

  static void add_exponentials(const ScorePanel& panel, float* maximum, float* sums) {
    multiply(panel);
    for (int r = 0; r < panel.rows; ++r) {
      if (panel.masks[r] == 0) continue;
      Reg z[kVectors];
      load_row(panel, r, z);
      Reg top = z[0];
#pragma GCC unroll 16
      for (int t = 1; t < kVectors; ++t) top = V::max(top, z[t]);
      float* row_sums = sums + int64_t{r} * kLanes;
      Reg sum = V::load(row_sums);
      if (V::any_greater(top, V::set1(maximum[r]))) {
        const float raised = V::reduce_max(top);
        if (maximum[r] != kNothing) sum = V::mul(sum, V::template exp2<6>(V::set1(maximum[r] - raised)));
        maximum[r] = raised;
      }
      const Reg shift = V::set1(maximum[r] == kNothing ? 0.0f : -maximum[r]);
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) sum = V::add(sum, V::template exp2<kDegree>(V::add(z[t], shift)));
      V::store(row_sums, sum);
    }
  }

  static void raise_maxima(const ScorePanel& panel, float* maximum) {
    multiply(panel);
    for (int r = 0; r < panel.rows; ++r) {
      if (panel.masks[r] == 0) continue;
      Reg z[kVectors];
      load_row(panel, r, z);
#pragma GCC unroll 16
      for (int t = 1; t < kVectors; ++t) z[0] = V::max(z[0], z[t]);
      if (V::any_greater(z[0], V::set1(maximum[r]))) maximum[r] = V::reduce_max(z[0]);
    }
  }

  static void add_mass(const ScorePanel& panel, const float* shift, float* columns, float* diagonals) {
    multiply(panel);
    Reg sums[kVectors];
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) sums[t] = V::load(columns + t * V::kWidth);
    for (int r = 0; r < panel.rows; ++r) {
      Reg z[kVectors];
      load_row(panel, r, z);
      float* row = panel.logits + int64_t{r} * kScorePitch;
      const Reg down = V::set1(shift[r]);
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) {
        const Reg mass = V::template exp2<kDegree>(V::add(z[t], down));
        V::store(row + t * V::kWidth, mass);
        sums[t] = V::add(sums[t], mass);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) V::store(columns + t * V::kWidth, sums[t]);
    for (int first = 0; first < kChunk + panel.rows - 1; first += V::kWidth)
      add_diagonals(panel, first, diagonals + first);
  }

  static void column_mass(const ScorePanel& panel, const float* shift, float* columns) {
    multiply(panel);
    Reg sums[kVectors];
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) sums[t] = V::load(columns + t * V::kWidth);
    for (int r = 0; r < panel.rows; ++r) {
      if (panel.masks[r] == 0) continue;
      Reg z[kVectors];
      load_row(panel, r, z);
      const Reg down = V::set1(shift[r]);
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t)
        sums[t] = V::add(sums[t], V::template exp2<kDegree>(V::add(z[t], down)));
    }
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) V::store(columns + t * V::kWidth, sums[t]);
  }

  static float energy(const ScorePanel& panel, float* sums) {
    multiply(panel);
    Reg top = V::set1(kNothing);
    for (int r = 0; r < panel.rows; ++r) {
      Reg z[kVectors];
      load_row(panel, r, z);
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) {
        V::store(panel.logits + int64_t{r} * kScorePitch + t * V::kWidth, z[t]);
        top = V::max(top, z[t]);
      }
    }
    const float largest = V::reduce_max(top);
    const Reg shift = V::set1(largest == kNothing ? 0.0f : -largest);
    Reg total[kVectors];
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) total[t] = V::zero();
    for (int r = 0; r < panel.rows; ++r) {
      const float* row = panel.logits + int64_t{r} * kScorePitch;
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t)
        total[t] = V::add(total[t], V::template exp2<kDegree>(V::add(V::load(row + t * V::kWidth), shift)));
    }
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) V::store(sums + t * V::kWidth, total[t]);
    return largest;
  }

  static void run_mass(const ScorePanel& panel, int run, float* maximum, float* references, float* sums) {
    multiply(panel);
    const int runs = kChunk / run;
    for (int r = 0; r < panel.rows; ++r) {
      float* row_sums = sums + int64_t{r} * runs;
      references[r] = kNothing;
      if (panel.masks[r] == 0) {
        for (int n = 0; n < runs; ++n) row_sums[n] = 0.0f;
        continue;
      }
      Reg z[kVectors];
      load_row(panel, r, z);
      Reg top = z[0];
#pragma GCC unroll 16
      for (int t = 1; t < kVectors; ++t) top = V::max(top, z[t]);
      if (V::any_greater(top, V::set1(maximum[r]))) maximum[r] = V::reduce_max(top);
      references[r] = maximum[r];
      const Reg shift = V::set1(maximum[r] == kNothing ? 0.0f : -maximum[r]);
      float* row = panel.logits + int64_t{r} * kScorePitch;
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t)
        V::store(row + t * V::kWidth, V::template exp2<kDegree>(V::add(z[t], shift)));
      for (int n = 0; n < runs; ++n) row_sums[n] = sum_of(row + n * run, run);
    }
  }

  static void run_maxima(const ScorePanel& panel, int run, float* maxima) {
    multiply(panel);
    const int runs = kChunk / run;
    for (int r = 0; r < panel.rows; ++r) {
      Reg z[kVectors];
      load_row(panel, r, z);
      float* row = panel.logits + int64_t{r} * kScorePitch;
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) V::store(row + t * V::kWidth, z[t]);
      for (int n = 0; n < runs; ++n) maxima[int64_t{r} * runs + n] = largest_of(row + n * run, run);
    }
  }

  static void add_peaks(const float* peaks, int64_t count, float top, float bar, float* sums, uint8_t* flags) {
    const Reg shift = V::set1(-top);
    for (int64_t j = 0; j < count; j += V::kWidth) {
      const int width = static_cast<int>(count - j < V::kWidth ? count - j : V::kWidth);
      alignas(64) float own[V::kWidth], sum[V::kWidth];
      for (int n = 0; n < width; ++n) {
        own[n] = peaks[j + n];
        sum[n] = sums[j + n];
      }
      for (int n = width; n < V::kWidth; ++n) own[n] = kNothing, sum[n] = 0.0f;
      const Reg e = V::template exp2<kDegree>(V::add(V::load(own), shift));
      V::store(sum, V::add(V::load(sum), e));
      for (int n = 0; n < width; ++n) sums[j + n] = sum[n];
      if (!V::any_greater(e, V::set1(bar))) continue;
      V::store(own, e);
      for (int n = 0; n < width; ++n) flags[j + n] |= own[n] > bar;
    }
  }

  template <bool kMass>
  static void largest(const ScorePanel& panel, const float* shift, int run, float* largest) {
    multiply(panel);
    for (int first = 0; first < panel.rows; first += run) {
      Reg top[kVectors];
      largest_of_run(panel, shift, first, run, top);
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t)
        V::store(largest + first / run * kChunk + t * V::kWidth,
                 kMass ? V::template exp2<kDegree>(top[t]) : top[t]);
    }
  }

  static void mark_above(const ScorePanel& panel, const float* shift, int run, float bar, uint64_t* marks) {
    multiply(panel);
    for (int first = 0; first < panel.rows; first += run) {
      Reg top[kVectors];
      largest_of_run(panel, shift, first, run, top);
      uint64_t& mark = marks[first / run];
      mark = 0;
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) {
        if (!V::any_greater(top[t], V::set1(bar))) continue;
        float values[V::kWidth];
        V::store(values, top[t]);
        for (int n = 0; n < V::kWidth; ++n) mark |= uint64_t{values[n] > bar} << (t * V::kWidth + n);
      }
    }
  }

  static void products(const ScorePanel& panel) { multiply(panel); }

  static void softmax(float* x, int64_t count, float factor) {
    const Reg times = V::set1(factor);
    float top = kNothing, total = 0.0f;
    const int64_t whole = count / V::kWidth * V::kWidth;
    alignas(64) float rest[V::kWidth];
    for (int n = 0; n < V::kWidth; ++n) rest[n] = whole + n < count ? x[whole + n] * factor : kNothing;
    if (whole > 0) {
      Reg most = V::mul(V::load(x), times);
      for (int64_t j = V::kWidth; j < whole; j += V::kWidth) most = V::max(most, V::mul(V::load(x + j), times));
      top = V::reduce_max(most);
    }
    for (int n = 0; n < V::kWidth; ++n) top = rest[n] > top ? rest[n] : top;
    const Reg shift = V::set1(-top);
    Reg sum = V::template exp2<kDegree>(V::add(V::load(rest), shift));
    V::store(rest, sum);
    for (int64_t j = 0; j < whole; j += V::kWidth) {
      const Reg e = V::template exp2<kDegree>(V::add(V::mul(V::load(x + j), times), shift));
      V::store(x + j, e);
      sum = V::add(sum, e);
    }
    total = V::reduce_add(sum);
    const Reg divisor = V::set1(total);
    for (int64_t j = 0; j < whole; j += V::kWidth) V::store(x + j, V::div(V::load(x + j), divisor));
    for (int64_t j = whole; j < count; ++j) x[j] = rest[j - whole] / total;
  }

  static void turn(const char* row, int dim, int pairs, DType dtype, const float* cos, const float* sin, char* out) {
    int d = 0;
    for (; d + V::kWidth <= pairs; d += V::kWidth) {
      const Reg x = load_as_float<V>(row, d, dtype), y = load_as_float<V>(row, pairs + d, dtype);
      const Reg c = V::load(cos + d), s = V::load(sin + d);
      store_as<V>(out, d, dtype, V::add(V::mul(x, c), V::mul(V::mul(y, s), V::set1(-1.0f))));
      store_as<V>(out, pairs + d, dtype, V::add(V::mul(y, c), V::mul(x, s)));
    }
    for (; d < pairs; ++d) {
      const float x = scalar_as_float(row, d, dtype), y = scalar_as_float(row, pairs + d, dtype);
      store_scalar(out, d, dtype, x * cos[d] - y * sin[d]);
      store_scalar(out, pairs + d, dtype, y * cos[d] + x * sin[d]);
    }
    for (d = 2 * pairs; d < dim; ++d) store_scalar(out, d, dtype, scalar_as_float(row, d, dtype));
  }

  static void mean(const char* rows, int64_t stride_bytes, int64_t count, int dim, DType dtype, float* out) {
    constexpr int kAtOnce = 4;
    const Reg divisor = V::set1(static_cast<float>(count));
    int d = 0;
    for (; d + kAtOnce * V::kWidth <= dim; d += kAtOnce * V::kWidth) {
      Reg sum[kAtOnce];
      for (int t = 0; t < kAtOnce; ++t) sum[t] = V::zero();
      for (int64_t r = 0; r < count; ++r)
        for (int t = 0; t < kAtOnce; ++t)
          sum[t] = V::add(sum[t], load_as_float<V>(rows + r * stride_bytes, d + t * V::kWidth, dtype));
      for (int t = 0; t < kAtOnce; ++t) V::store(out + d + t * V::kWidth, V::div(sum[t], divisor));
    }
    for (; d < dim; ++d) {
      float sum = 0.0f;
      for (int64_t r = 0; r < count; ++r) sum += scalar_as_float(rows + r * stride_bytes, d, dtype);
      out[d] = sum / static_cast<float>(count);
    }
  }

  static void bounds(const char* rows, int64_t stride_bytes, int64_t count, int dim, DType dtype, float* low,
                     float* high) {
    const Reg minus = V::set1(-1.0f);
    int d = 0;
    for (; d + V::kWidth <= dim; d += V::kWidth) {
      Reg top = load_as_float<V>(rows, d, dtype), least = V::mul(top, minus);
      for (int64_t r = 1; r < count; ++r) {
        const Reg x = load_as_float<V>(rows + r * stride_bytes, d, dtype);
        top = V::max(top, x);
        least = V::max(least, V::mul(x, minus));
      }
      V::store(high + d, top);
      V::store(low + d, V::mul(least, minus));
    }
    for (; d < dim; ++d) {
      low[d] = high[d] = scalar_as_float(rows, d, dtype);
      for (int64_t r = 1; r < count; ++r) {
        const float x = scalar_as_float(rows + r * stride_bytes, d, dtype);
        low[d] = x < low[d] ? x : low[d];
        high[d] = x > high[d] ? x : high[d];
      }
    }
  }

 private:
  static int depth_of(int padded_dim) { return Isa::kPairs ? padded_dim / 2 : padded_dim; }

  static void multiply(const ScorePanel& panel) {
    const int depth = depth_of(panel.padded_dim);
    const uint32_t* queries = static_cast<const uint32_t*>(panel.queries);
    const uint32_t* keys = static_cast<const uint32_t*>(panel.keys);
    const int64_t next_a = int64_t{kScoreRows} * depth, next_b = int64_t{kChunk} * depth;
    Isa::begin();
    if constexpr (Isa::kRowStep > 1)  // tiles
      Isa::multiply(panel.rows, kChunk, depth, queries, depth, keys, kChunk, panel.logits, kScorePitch, false,
                    {panel.pieces, next_a, next_b});
    else
      for (int64_t n = 0; n < panel.pieces; ++n)
        Isa::multiply(panel.rows, kChunk, depth, queries + n * next_a, depth, keys + n * next_b, kChunk, panel.logits,
                      kScorePitch, n > 0);
    Isa::end();
  }

  // Of logit + shift[row] in each column, over rows [first, first + run).
  static inline void largest_of_run(const ScorePanel& panel, const float* shift, int first, int run, Reg* top) {
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) top[t] = V::set1(kNothing);
    for (int r = first; r < first + run && r < panel.rows; ++r) {
      if (panel.masks[r] == 0) continue;
      Reg z[kVectors];
      load_row(panel, r, z);
      const Reg down = V::set1(shift[r]);
#pragma GCC unroll 16
      for (int t = 0; t < kVectors; ++t) top[t] = V::max(top[t], V::add(z[t], down));
    }
  }

  static inline float largest_of(const float* x, int count) {
    if (count % V::kWidth == 0) {
      Reg top = V::load(x);
      for (int n = V::kWidth; n < count; n += V::kWidth) top = V::max(top, V::load(x + n));
      return V::reduce_max(top);
    }
    float top = x[0];
    for (int n = 1; n < count; ++n) top = x[n] > top ? x[n] : top;
    return top;
  }

  static inline float sum_of(const float* x, int count) {
    if (count % V::kWidth == 0) {
      Reg sum = V::load(x);
      for (int n = V::kWidth; n < count; n += V::kWidth) sum = V::add(sum, V::load(x + n));
      return V::reduce_add(sum);
    }
    float sum = 0.0f;
    for (int n = 0; n < count; ++n) sum += x[n];
    return sum;
  }

  static inline void load_row(const ScorePanel& panel, int r, Reg* z) {
    const float* row = panel.logits + int64_t{r} * kScorePitch;
    const uint64_t mask = panel.masks[r];
    const Reg factor = V::set1(panel.factor);
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) z[t] = V::mul(V::load(row + t * V::kWidth), factor);
    if (mask == ~uint64_t{0}) return;
#pragma GCC unroll 16
    for (int t = 0; t < kVectors; ++t) z[t] = V::select(mask >> (t * V::kWidth), z[t], V::set1(kNothing));
  }

  // Diagonals first .. first + kWidth - 1: row r holds them from column first - (rows - 1) + r on. The zeros around a
  // row serve where a part of the vector falls outside.
  static inline void add_diagonals(const ScorePanel& panel, int first, float* out) {
    const int column = first - (panel.rows - 1);
    int first_row = 1 - V::kWidth - column;
    int last_row = kChunk - 1 - column;
    if (first_row < 0) first_row = 0;
    if (last_row > panel.rows - 1) last_row = panel.rows - 1;
    const float* diagonal = panel.logits + column;
    Reg sum[4] = {V::load(out), V::zero(), V::zero(), V::zero()};
    int r = first_row;
    for (; r + 4 <= last_row + 1; r += 4)
      for (int n = 0; n < 4; ++n)
        sum[n] = V::add(sum[n], V::load(diagonal + int64_t{r + n} * (kScorePitch + 1)));
    for (; r <= last_row; ++r) sum[0] = V::add(sum[0], V::load(diagonal + int64_t{r} * (kScorePitch + 1)));
    V::store(out, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
  }
};

template <class Isa>
const ScoreKernels* score_kernels() {
  using Code = ScoreCode<Isa>;
  static const ScoreKernels kernels{
      Code::pack_keys, Code::pack_queries, Code::add_exponentials,      Code::raise_maxima,           Code::add_mass,
      Code::column_mass, Code::energy,  Code::run_mass,     Code::run_maxima,            Code::add_peaks,
      Code::template largest<true>,        Code::template largest<false>,
      Code::mark_above, Code::products,    Code::softmax,               Code::turn,
      Code::mean,       Code::bounds,      score_pages<typename Isa::Vec>,   label_scores_of<typename Isa::Vec>,
      count_collisions<typename Isa::Vec>, read_page<typename Isa::Vec>,     copy_stored<typename Isa::Vec>};
  return &kernels;
}

}  // namespace
}  // namespace gossamer
