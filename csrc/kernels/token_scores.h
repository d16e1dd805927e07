// Scores of the tokens of a cache by labels, and collisions of their hashes: vectors over tokens, each read once.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/convert.h"
#include "kernels/token_job.h"

namespace gossamer {
namespace {

constexpr int bits_of(LabelType type) {
  switch (type) {
    case LabelType::kFloat32:
      return 32;
    case LabelType::kUint8:
      return 8;
    case LabelType::kUint4:
      return 4;
    default:
      return 16;
  }
}

// A vector of one channel; of two, where a byte holds both.
template <class V, LabelType kType>
inline void load_labels(const char* p, typename V::Reg* x) {
  if constexpr (kType == LabelType::kFloat32)
    x[0] = V::load(reinterpret_cast<const float*>(p));
  else if constexpr (kType == LabelType::kBFloat16)
    x[0] = V::load_bf16(reinterpret_cast<const uint16_t*>(p));
  else if constexpr (kType == LabelType::kFloat16)
    x[0] = V::load_fp16(reinterpret_cast<const uint16_t*>(p));
  else if constexpr (kType == LabelType::kUint8)
    x[0] = V::load_u8(reinterpret_cast<const uint8_t*>(p));
  else
    V::load_u4(reinterpret_cast<const uint8_t*>(p), x[0], x[1]);
}

// kSome vectors of tokens whose codes begin at `codes`.
template <class V, LabelType kType, int kHeads, int kSome>
inline void score_labels(const LabelScores& job, const float* queries, const char* codes, int64_t row_bytes,
                         const uint16_t* low, const uint16_t* step, float* out, int64_t pitch) {
  using Reg = typename V::Reg;
  constexpr int kPacked = kType == LabelType::kUint4 ? 2 : 1;
  constexpr bool kCoded = kType == LabelType::kUint8 || kType == LabelType::kUint4;
  Reg sums[kHeads][kSome];
  float totals[kHeads] = {};
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 16
    for (int s = 0; s < kSome; ++s) sums[h][s] = V::zero();
  for (int c = 0; c < job.channels; c += kPacked) {
    const char* row = codes + c / kPacked * row_bytes;
    Reg x[kSome][kPacked];
#pragma GCC unroll 16
    for (int s = 0; s < kSome; ++s) load_labels<V, kType>(row + s * V::kWidth * bits_of(kType) * kPacked / 8, x[s]);
#pragma GCC unroll 16
    for (int n = 0; n < kPacked; ++n) {
      if (c + n == job.channels) break;
#pragma GCC unroll 16
      for (int h = 0; h < kHeads; ++h) {
        const float query = queries[int64_t{h} * job.channels + c + n];
        if (kCoded) totals[h] += query;
#pragma GCC unroll 16
        for (int s = 0; s < kSome; ++s) sums[h][s] = V::fma(V::set1(query), x[s][n], sums[h][s]);
      }
    }
  }
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 16
    for (int s = 0; s < kSome; ++s) {
      Reg sum = sums[h][s];
      if (kCoded)
        sum = V::fma(V::load_bf16(step + s * V::kWidth), sum,
                     V::mul(V::load_bf16(low + s * V::kWidth), V::set1(totals[h])));
      V::store(out + h * pitch + s * V::kWidth, sum);
    }
}

template <class V, LabelType kType, int kHeads>
void labels_of_heads(const LabelScores& job, int head) {
  constexpr int kSome = 2, kTokens = kSome * V::kWidth, kPacked = kType == LabelType::kUint4 ? 2 : 1;
  constexpr int64_t kBytes = bits_of(kType) * kPacked / 8;
  const float* queries = job.queries + int64_t{head} * job.channels;
  float* scores = job.scores + head * job.pitch;
  int64_t t = 0;
  for (; t + kTokens <= job.count; t += kTokens)
    score_labels<V, kType, kHeads, kSome>(job, queries, job.codes + t * kBytes, job.row_bytes, job.low + t,
                                          job.step + t, scores + t, job.pitch);
  if (t == job.count) return;
  // The last ones from a copy, so that nothing behind them is read.
  constexpr int kRows = 256;
  alignas(64) char codes[kRows * kTokens * kBytes] = {};
  alignas(64) uint16_t low[kTokens] = {}, step[kTokens] = {};
  alignas(64) float out[kHeads * kTokens];
  const int64_t rest = job.count - t;
  for (int row = 0; row * kPacked < job.channels; ++row)
    std::memcpy(codes + row * kTokens * kBytes, job.codes + row * job.row_bytes + t * kBytes, rest * kBytes);
  if (job.low != nullptr) {
    std::memcpy(low, job.low + t, rest * sizeof *low);
    std::memcpy(step, job.step + t, rest * sizeof *step);
  }
  score_labels<V, kType, kHeads, kSome>(job, queries, codes, kTokens * kBytes, low, step, out, kTokens);
  for (int h = 0; h < kHeads; ++h)
    std::memcpy(scores + h * job.pitch + t, out + h * kTokens, rest * sizeof *out);
}

template <class V, LabelType kType>
void labels_of_type(const LabelScores& job) {
  int head = 0;
  for (; head + 4 <= job.heads; head += 4) labels_of_heads<V, kType, 4>(job, head);
  for (; head < job.heads; ++head) labels_of_heads<V, kType, 1>(job, head);
}

template <class V>
void label_scores_of(const LabelScores& job) {
  switch (job.type) {
    case LabelType::kBFloat16:
      return labels_of_type<V, LabelType::kBFloat16>(job);
    case LabelType::kFloat16:
      return labels_of_type<V, LabelType::kFloat16>(job);
    case LabelType::kUint8:
      return labels_of_type<V, LabelType::kUint8>(job);
    case LabelType::kUint4:
      return labels_of_type<V, LabelType::kUint4>(job);
    default:
      return labels_of_type<V, LabelType::kFloat32>(job);
  }
}

template <class V, int kHeads>
void collisions_of_heads(const Collisions& job, int head, int64_t tile) {
  using Words = typename V::Words;
  constexpr int kWords = sizeof(Words) / sizeof(int16_t), kSome = kWords < kHashTile / 2 ? 2 : 1;
  const int16_t* codes = job.codes + tile * job.tables * kHashTile;
  for (int first = 0; first < kHashTile; first += kSome * kWords) {
    Words counts[kHeads][kSome] = {};
    for (int n = 0; n < job.tables; ++n) {
      Words x[kSome];
#pragma GCC unroll 16
      for (int s = 0; s < kSome; ++s)
        std::memcpy(&x[s], codes + n * kHashTile + first + s * kWords, sizeof(Words));
#pragma GCC unroll 16
      for (int h = 0; h < kHeads; ++h) {
        const int16_t code = job.queries[int64_t{head + h} * job.tables + n];
#pragma GCC unroll 16
        for (int s = 0; s < kSome; ++s) counts[h][s] -= (Words)(x[s] == code);  // true is -1
      }
    }
    for (int h = 0; h < kHeads; ++h)
      std::memcpy(job.counts + (head + h) * job.pitch + tile * kHashTile + first, counts[h], sizeof counts[h]);
  }
}

template <class V>
void count_collisions(const Collisions& job) {
  for (int64_t tile = 0; tile < job.tiles; ++tile) {
    int head = 0;
    for (; head + 4 <= job.heads; head += 4) collisions_of_heads<V, 4>(job, head, tile);
    for (; head < job.heads; ++head) collisions_of_heads<V, 1>(job, head, tile);
  }
}

}  // namespace
}  // namespace gossamer
