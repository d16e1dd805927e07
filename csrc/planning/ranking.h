// Candidates by score, with their running sums: what shares of a row's sum are measured by.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "planning/planning.h"

namespace gossamer {

// Candidates from the best score down, as a stable sort has them: of equal scores the lower index first, NaN before
// all. Their running sums, in fp64 and in this order, are those of the torch rules.
class Ranking {
 public:
  void clear() { entries_.clear(); }
  // Candidate j, ranked by what need not be its score.
  void add(float by, int64_t j) { entries_.push_back(entry(by, j)); }
  // Tier by tier, where tier_of(j) is one of the first `tiers` numbers.
  template <class TierOf>
  void rank(const float* scores, int tiers, const TierOf& tier_of) {
    sort();
    if (tiers > 1) {
      other_.clear();
      for (int tier = 0; tier < tiers; ++tier)
        for (const uint64_t entry : entries_)
          if (tier_of(index(entry)) == tier) other_.push_back(entry);
      entries_.swap(other_);
    }
    sums_.clear();
    double sum = 0.0;
    for (const uint64_t entry : entries_) sums_.push_back(sum += scores[index(entry)]);
  }

  // Entries ascend as candidates are ranked.
  static uint64_t entry(float score, int64_t index) {
    return uint64_t{falling(score)} << 32 | static_cast<uint32_t>(index);
  }
  // The entry after the first `count`.
  uint64_t past(size_t count) const { return count == 0 ? 0 : entries_[count - 1] + 1; }
  bool empty() const { return entries_.empty(); }
  double total() const { return sums_.back(); }
  size_t size() const { return entries_.size(); }
  double before(size_t rank) const { return rank == 0 ? 0.0 : sums_[rank - 1]; }
  double up_to(size_t rank) const { return sums_[rank]; }
  // visit(candidate) for each of the first `count`.
  template <class Visit>
  void for_first(size_t count, const Visit& visit) const {
    for (size_t n = 0; n < count; ++n) visit(index(entries_[n]));
  }

 private:
  static constexpr int kDigitBits = 8;
  static constexpr int kDigits = 32 / kDigitBits;  // of a key
  static constexpr size_t kDigitValues = size_t{1} << kDigitBits;
  static constexpr size_t kFew = 64;  // where counting digits costs more than comparing

  static int64_t index(uint64_t entry) { return static_cast<int64_t>(entry & 0xffffffff); }

  // Ascending where scores fall.
  static uint32_t falling(float x) {
    if (x != x) return 0;
    x += 0.0f;  // -0 and 0 are equal
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7fffffff;
  }

  void sort() {
    if (entries_.size() < kFew) return std::sort(entries_.begin(), entries_.end());
    uint32_t counts[kDigits][kDigitValues] = {};
    for (const uint64_t entry : entries_)
      for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][digit_of(entry, digit)];
    other_.resize(entries_.size());
    for (int digit = 0; digit < kDigits; ++digit) {
      if (counts[digit][digit_of(entries_[0], digit)] == entries_.size()) continue;
      uint32_t before = 0;
      for (uint32_t& count : counts[digit]) before += std::exchange(count, before);
      for (const uint64_t entry : entries_) other_[counts[digit][digit_of(entry, digit)]++] = entry;
      entries_.swap(other_);
    }
  }
  static size_t digit_of(uint64_t entry, int digit) { return entry >> (32 + digit * kDigitBits) & (kDigitValues - 1); }

  std::vector<uint64_t> entries_, other_;  // falling(score), index
  std::vector<double> sums_;
};

// Sums of scores that are not negative, by their leading bits: an eighth of a power of two each.
class Coarse {
 public:
  // False where a score is negative or NaN: then sums say nothing. Where is_early(j), candidate j is in no bin.
  template <class IsEarly>
  bool sum(const float* scores, Range seen, const IsEarly& is_early) {
    sums_.assign(kBins, 0.0);
    early_ = 0.0;
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      if (!(scores[j] >= 0.0f)) return false;
      (is_early(j) ? early_ : sums_[bin(scores[j])]) += scores[j];
    }
    total_ = early_;
    for (const double part : sums_) total_ += part;
    return total_ > 0.0 && total_ < std::numeric_limits<double>::infinity();
  }
  double total() const { return total_; }
  // The lowest bin of those that together hold `limit`, from the best down, behind what is early.
  uint32_t down_to(double limit) const {
    double up_to = early_;
    uint32_t n = kBins;
    while (n > 0 && up_to < limit) up_to += sums_[--n];
    return n;
  }
  static uint32_t bin(float x) {
    x += 0.0f;  // -0 and 0 are equal
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >> kDropped;
  }

 private:
  static constexpr int kDropped = 20;
  static constexpr uint32_t kBins = 1 << (31 - kDropped);

  std::vector<double> sums_;
  double early_ = 0.0, total_ = 0.0;
};

}  // namespace gossamer
