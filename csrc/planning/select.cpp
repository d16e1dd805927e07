// From scores to chosen candidates: rules, block diagonals and forced ranges as bits, bits as lists.
#include <algorithm>
#include <limits>
#include <vector>

#include "planning/planning.h"
#include "planning/ranking.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kRowsAJob = 64;
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr int64_t kMany = 512;  // candidates of a row of which only the best are ranked

void set_bit(uint64_t* bits, int64_t n) { bits[n / 64] |= uint64_t{1} << (n % 64); }

void set_range(uint64_t* bits, int64_t low, int64_t high) {
  for (int64_t n = low; n < high; ++n) set_bit(bits, n);
}

// Against the largest score that the row sees; nothing where that is NaN.
void choose_relative(const float* scores, float alpha, Range seen, uint64_t* bits) {
  if (alpha == 0) return set_range(bits, seen.begin, seen.end);
  float top = 0.0f;
  for (int64_t j = seen.begin; j < seen.end; ++j) {
    if (scores[j] != scores[j]) return;
    top = scores[j] > top ? scores[j] : top;
  }
  const float threshold = alpha * top;
  for (int64_t j = seen.begin; j < seen.end; ++j)
    if (scores[j] >= threshold && scores[j] > 0) set_bit(bits, j);
}

void choose_at_least(const float* scores, float bar, Range seen, uint64_t* bits) {
  for (int64_t j = seen.begin; j < seen.end; ++j)
    if (scores[j] >= bar && scores[j] > kNothing) set_bit(bits, j);
}

void choose_above(const float* scores, float threshold, Range seen, uint64_t* bits) {
  if (threshold == 0) return set_range(bits, seen.begin, seen.end);
  for (int64_t j = seen.begin; j < seen.end; ++j) bits[j / 64] |= uint64_t{scores[j] > threshold} << (j % 64);
}

// NaN counts as the largest: nth_element needs an order of all values.
bool before(float a, float b) { return a > b || (a != a && b == b); }

// Of equal scores the lower index wins; -inf is never chosen, and nothing where NaN takes the whole budget.
void choose_top(const float* scores, int64_t budget, int64_t low, int64_t high, std::vector<float>& sorted,
                uint64_t* bits) {
  if (budget <= 0) return;
  float threshold = kNothing;
  if (budget < high - low) {
    sorted.assign(scores + low, scores + high);
    std::nth_element(sorted.begin(), sorted.begin() + (budget - 1), sorted.end(), before);
    threshold = sorted[static_cast<size_t>(budget - 1)];
  }
  int64_t above = 0;
  for (int64_t j = low; j < high; ++j)
    if (scores[j] > threshold) {
      set_bit(bits, j);
      ++above;
    }
  if (threshold == kNothing) return;
  for (int64_t j = low; j < high && above < budget; ++j)
    if (scores[j] == threshold) {
      set_bit(bits, j);
      ++above;
    }
}

bool is_top_p_of_a_row(Rule rule) {
  return rule == Rule::kTopP || rule == Rule::kTopPForced || rule == Rule::kTopPReaching ||
         rule == Rule::kTopPBelow || rule == Rule::kTopPInTiers;
}

// Rules that take candidates up to the one that crosses a share of the row's sum.
bool crosses(Rule rule) {
  return rule == Rule::kTopP || rule == Rule::kTopPForced || rule == Rule::kTopPInTiers;
}

// How many of the best are chosen. Sums never fall, so that the first one that fails ends the list; see rules.py.
size_t count_top_p(const Ranking& ranking, Rule rule, double share) {
  size_t count = 0;
  if (rule == Rule::kTopPReaching) {
    while (count < ranking.size() && !(ranking.up_to(count) >= share && ranking.up_to(count) > 0)) ++count;
    return count < ranking.size() ? count + 1 : 0;
  }
  const double limit = share * ranking.total();
  if (rule == Rule::kTopPBelow || rule == Rule::kTopPOfAllRows) {
    while (count < ranking.size() && ranking.up_to(count) <= limit) ++count;
    return rule == Rule::kTopPBelow ? std::max<size_t>(count, 1) : count;
  }
  while (count < ranking.size() && ranking.before(count) < limit) ++count;
  return count;
}

// What a thread keeps from row to row.
struct Workspace {
  std::vector<float> sorted;
  Ranking ranking;
  Coarse coarse;
};

// How candidates are taken: by tiers, in each by a number; and those that come before the bulk, which goes by score.
template <class TierOf, class By, class IsEarly>
struct Order {
  int tiers;
  TierOf tier_of;
  By by;
  IsEarly is_early;
};
template <class TierOf, class By, class IsEarly>
Order(int, TierOf, By, IsEarly) -> Order<TierOf, By, IsEarly>;

class Chooser {
 public:
  explicit Chooser(const Choice& choice)
      : choice_(choice),
        words_(words_of(choice.width)),
        diagonals_of_(choice.batch * choice.heads),
        past_(choice.batch * choice.heads) {
    if (choice.diagonals != nullptr)
      for (size_t head = 0; head < diagonals_of_.size(); ++head)
        for (int64_t n = 0; n < choice.diagonal_count; ++n)
          if (choice.diagonals[static_cast<int64_t>(head) * choice.diagonal_count + n])
            diagonals_of_[head].push_back(n);
    if (choice.everywhere == nullptr) return;
    everywhere_.resize(diagonals_of_.size() * words_);
    for (size_t head = 0; head < diagonals_of_.size(); ++head)
      for (int64_t n = 0; n < choice.width; ++n)
        if (choice.everywhere[static_cast<int64_t>(head) * choice.width + n]) set_bit(&everywhere_[head * words_], n);
  }

  // Before rows are chosen, of each head.
  void share_out(int64_t head, Ranking& ranking) {
    if (!is_ruled(head)) return;
    const int64_t rows = choice_.rows, b = head / choice_.heads;
    const float* scores = choice_.scores + head * rows * choice_.width;
    ranking.clear();
    for (int64_t row = 0; row < rows; ++row) {
      const Range seen = seen_by(b * rows + row);
      for (int64_t j = row * choice_.width + seen.begin; j < row * choice_.width + seen.end; ++j)
        ranking.add(scores[j], j);
    }
    if (ranking.empty()) return;
    ranking.rank(scores, 1, [](int64_t) { return 0; });
    past_[head] = ranking.past(count_top_p(ranking, choice_.rule, choice_.shares[head % choice_.heads]));
  }

  // Row of [batch, heads, rows]: its bits, and how many are set.
  int64_t choose(int64_t row, Workspace& workspace, uint64_t* bits) const {
    const int64_t head = row / choice_.rows, b = head / choice_.heads, place = b * choice_.rows + row % choice_.rows;
    if (!choice_.unite) std::fill(bits, bits + words_, uint64_t{0});
    const Range seen = seen_by(place);
    if (choice_.taken != nullptr && is_ruled(head)) set_taken(choice_.taken + row * choice_.width, seen, bits);
    if (choice_.scores != nullptr && is_ruled(head)) choose_by_rule(row, place, seen, workspace, bits);
    if (!everywhere_.empty()) set_everywhere(head, seen, bits);
    for (const int64_t diagonal : diagonals_of_[static_cast<size_t>(head)]) {
      set_if_seen(choice_.origin[place] - diagonal, seen, bits);
      if (choice_.mirrored) set_if_seen(choice_.origin[place] + diagonal, seen, bits);
    }
    if (forces(head)) {
      const Range forced = choice_.forced[place];
      set_range(bits, std::max(seen.begin, forced.begin), std::min(seen.end, forced.end));
      set_range(bits, seen.begin, std::min(seen.end, choice_.first));
    }
    int64_t count = 0;
    for (int64_t n = 0; n < words_; ++n) count += __builtin_popcountll(bits[n]);
    return count;
  }

 private:
  bool forces(int64_t head) const { return choice_.forced_heads == nullptr || choice_.forced_heads[head]; }

  bool is_ruled(int64_t head) const { return choice_.ruled_heads == nullptr || choice_.ruled_heads[head]; }

  void set_everywhere(int64_t head, Range seen, uint64_t* bits) const {
    const uint64_t* taken = &everywhere_[static_cast<size_t>(head * words_)];
    for (int64_t n = seen.begin / 64; n * 64 < seen.end; ++n) {
      uint64_t word = taken[n];
      if (n * 64 < seen.begin) word &= ~uint64_t{0} << (seen.begin - n * 64);
      if (seen.end - n * 64 < 64) word &= ~(~uint64_t{0} << (seen.end - n * 64));
      bits[n] |= word;
    }
  }

  static void set_taken(const uint8_t* taken, Range seen, uint64_t* bits) {
    for (int64_t j = seen.begin; j < seen.end; ++j) bits[j / 64] |= uint64_t{taken[j] != 0} << (j % 64);
  }

  Range seen_by(int64_t place) const {
    const int64_t begin = std::clamp<int64_t>(choice_.seen[place].begin, 0, choice_.width);
    return {begin, std::clamp<int64_t>(choice_.seen[place].end, begin, choice_.width)};
  }

  static void set_if_seen(int64_t candidate, Range seen, uint64_t* bits) {
    if (candidate >= seen.begin && candidate < seen.end) set_bit(bits, candidate);
  }

  void choose_by_rule(int64_t row, int64_t place, Range seen, Workspace& workspace, uint64_t* bits) const {
    const int64_t head = row / choice_.rows;
    const float* scores = choice_.scores + row * choice_.width;
    if (choice_.rule == Rule::kRelativeToMax) choose_relative(scores, choice_.alpha, seen, bits);
    if (choice_.rule == Rule::kAtLeast)
      choose_at_least(scores, static_cast<float>(choice_.shares[head % choice_.heads]), seen, bits);
    if (choice_.rule == Rule::kTopK)
      choose_top(scores, choice_.counts[head % choice_.heads], seen.begin, seen.end, workspace.sorted, bits);
    if (choice_.rule == Rule::kAbove)
      choose_above(scores, static_cast<float>(choice_.shares[head % choice_.heads]), seen, bits);
    if (is_top_p_of_a_row(choice_.rule)) choose_top_p(scores, row, place, seen, workspace, bits);
    if (choice_.rule == Rule::kTopPOfAllRows)
      for (int64_t j = seen.begin; j < seen.end; ++j)
        if (Ranking::entry(scores[j], row % choice_.rows * choice_.width + j) < past_[head]) set_bit(bits, j);
  }

  void choose_top_p(const float* scores, int64_t row, int64_t place, Range seen, Workspace& workspace,
                    uint64_t* bits) const {
    const int64_t head = row / choice_.rows;
    const double share = choice_.shares[head % choice_.heads];
    const Range forced = choice_.forced[place];
    const auto is_forced = [&](int64_t j) { return (j >= forced.begin && j < forced.end) || j < choice_.first; };
    if (choice_.rule == Rule::kTopPInTiers) {
      if (share == 1.0) return set_range(bits, seen.begin, seen.end);
      const uint8_t* early = choice_.early + row * choice_.width;
      const bool forces_any = forces(head);
      const auto tier_of = [&](int64_t j) { return forces_any && is_forced(j) ? 0 : early[j] ? 1 : 2; };
      const Order order{3, tier_of, [&](int64_t j) { return scores[j]; }, [&](int64_t j) { return tier_of(j) < 2; }};
      return choose_in_order(scores, share, seen, order, workspace, bits);
    }
    const auto any = [](int64_t) { return 0; };
    if (choice_.rule == Rule::kTopPForced && forces(head)) {
      // As infinite ones, which other candidates may be, too.
      const Order order{1, any, [&](int64_t j) { return is_forced(j) ? -kNothing : scores[j]; }, is_forced};
      return choose_in_order(scores, share, seen, order, workspace, bits);
    }
    const Order order{1, any, [&](int64_t j) { return scores[j]; }, [](int64_t) { return false; }};
    choose_in_order(scores, share, seen, order, workspace, bits);
  }

  template <class Ordered>
  void choose_in_order(const float* scores, double share, Range seen, const Ordered& order, Workspace& workspace,
                       uint64_t* bits) const {
    if (crosses(choice_.rule) && choose_of_many(scores, share, seen, order, workspace, bits)) return;
    Ranking& ranking = workspace.ranking;
    ranking.clear();
    for (int64_t j = seen.begin; j < seen.end; ++j) ranking.add(order.by(j), j);
    if (ranking.empty()) return;
    ranking.rank(scores, order.tiers, order.tier_of);
    ranking.for_first(count_top_p(ranking, choice_.rule, share), [&](int64_t j) { set_bit(bits, j); });
  }

  // Ranks only those of many candidates that surely hold the share; false where that is not to be had.
  template <class Ordered>
  static bool choose_of_many(const float* scores, double share, Range seen, const Ordered& order, Workspace& workspace,
                             uint64_t* bits) {
    if (seen.size() < kMany || share >= 1.0 || !workspace.coarse.sum(scores, seen, order.is_early)) return false;
    const double limit = share * workspace.coarse.total();
    const uint32_t lowest = workspace.coarse.down_to(limit);
    Ranking& ranking = workspace.ranking;
    ranking.clear();
    for (int64_t j = seen.begin; j < seen.end; ++j)
      if (Coarse::bin(scores[j]) >= lowest || order.is_early(j)) ranking.add(order.by(j), j);
    if (ranking.empty()) return true;
    ranking.rank(scores, order.tiers, order.tier_of);
    size_t count = 0;
    while (count < ranking.size() && ranking.before(count) < limit) ++count;
    if (count == ranking.size() && ranking.total() < limit) return false;  // sums in another order may round otherwise
    ranking.for_first(count, [&](int64_t j) { set_bit(bits, j); });
    return true;
  }

  const Choice& choice_;
  const int64_t words_;
  std::vector<std::vector<int64_t>> diagonals_of_;
  std::vector<uint64_t> everywhere_;  // bits [batch, heads, words]; empty: none
  std::vector<uint64_t> past_;  // kTopPOfAllRows: of each head, the entry after the last that is chosen
};

// job(first row, one past the last) for stretches of rows.
template <class Job>
void for_rows(int threads, int64_t rows, const Job& job) {
  run_parallel(threads, (rows + kRowsAJob - 1) / kRowsAJob,
           [&](int, int64_t n) { job(n * kRowsAJob, std::min(rows, (n + 1) * kRowsAJob)); });
}

}  // namespace

void choose(const Choice& choice, const ChosenBits& chosen, int threads) {
  Chooser chooser(choice);
  if (choice.rule == Rule::kTopPOfAllRows) {
    std::vector<Ranking> rankings(threads);
    run_parallel(threads, choice.batch * choice.heads,
                 [&](int thread, int64_t head) { chooser.share_out(head, rankings[thread]); });
  }
  for_rows(threads, choice.batch * choice.heads * choice.rows, [&](int64_t begin, int64_t end) {
    Workspace workspace;
    for (int64_t row = begin; row < end; ++row)
      chosen.counts[row] = chooser.choose(row, workspace, chosen.bits + row * words_of(choice.width));
  });
}

void count_top_p(const float* scores, int64_t rows, int64_t width, const double* shares, int64_t* counts,
                 int threads) {
  const auto any = [](int64_t) { return 0; };
  std::vector<Workspace> workspaces(threads);
  run_parallel(threads, rows, [&](int thread, int64_t row) {
    const float* own = scores + row * width;
    Workspace& workspace = workspaces[thread];
    Ranking& ranking = workspace.ranking;
    // First those that surely hold more than the share, where they are few; if they do not, all.
    const bool few = shares[row] < 1.0 && workspace.coarse.sum(own, {0, width}, [](int64_t) { return false; });
    const uint32_t lowest = few ? workspace.coarse.down_to(shares[row] * workspace.coarse.total()) : 0;
    for (const uint32_t bar : {lowest, uint32_t{0}}) {
      ranking.clear();
      for (int64_t j = 0; j < width; ++j)
        if (bar == 0 || Coarse::bin(own[j]) >= bar) ranking.add(own[j], j);
      counts[row] = 0;
      if (ranking.empty()) continue;
      ranking.rank(own, 1, any);
      const double limit = shares[row] * (bar == 0 ? ranking.total() : workspace.coarse.total());
      size_t count = 0;
      while (count < ranking.size() && ranking.up_to(count) <= limit) ++count;
      counts[row] = static_cast<int64_t>(count);
      if (count < ranking.size()) return;
    }
  });
}

void list_bits(const uint64_t* bits, int64_t rows, int64_t width, const int64_t* starts, int32_t* indices,
               int threads) {
  for_rows(threads, rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t* out = indices + starts[row];
      for (int64_t n = 0; n < words_of(width); ++n)
        for (uint64_t word = bits[row * words_of(width) + n]; word != 0; word &= word - 1)
          *out++ = static_cast<int32_t>(n * 64 + __builtin_ctzll(word));
    }
  });
}

void place_lists(const int32_t* lists, const int64_t* counts, int64_t rows, const int64_t* starts, int32_t* indices,
                 int threads) {
  std::vector<int64_t> before(static_cast<size_t>(rows) + 1);
  for (int64_t row = 0; row < rows; ++row) before[row + 1] = before[row] + counts[row];
  for_rows(threads, rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) std::copy_n(lists + before[row], counts[row], indices + starts[row]);
  });
}

}  // namespace gossamer
