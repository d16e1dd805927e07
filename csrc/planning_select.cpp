// From scores to chosen candidates: rules, block diagonals and forced ranges as bits, bits as lists.
#include <algorithm>
#include <limits>

#include "parallel.h"
#include "planning.h"

namespace gossamer {
namespace {

constexpr int64_t kRowsAJob = 64;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

void set_bit(uint64_t* bits, int64_t at) { bits[at / 64] |= uint64_t{1} << (at % 64); }

void set_range(uint64_t* bits, int64_t low, int64_t high) {
  for (int64_t at = low; at < high; ++at) set_bit(bits, at);
}

void choose_relative(const float* scores, int64_t width, float alpha, int64_t low, int64_t high, uint64_t* bits) {
  if (alpha == 0) return set_range(bits, low, high);
  float top = kNothing;
  for (int64_t j = 0; j < width; ++j) top = scores[j] > top ? scores[j] : top;
  const float threshold = alpha * top;
  for (int64_t j = low; j < high; ++j)
    if (scores[j] >= threshold && scores[j] > 0) set_bit(bits, j);
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

class Chooser {
 public:
  explicit Chooser(const Choice& choice) : choice_(choice), words_(words_of(choice.width)), bands_of_(choice.batch * choice.heads) {
    if (choice.bands == nullptr) return;
    for (size_t head = 0; head < bands_of_.size(); ++head)
      for (int64_t n = 0; n < choice.band_count; ++n)
        if (choice.bands[static_cast<int64_t>(head) * choice.band_count + n]) bands_of_[head].push_back(n);
  }

  int64_t row(int64_t row, std::vector<float>& sorted, uint64_t* bits) const {
    const int64_t block = row % choice_.blocks, head = row / choice_.blocks, b = head / choice_.heads;
    const int64_t at = b * choice_.blocks + block;
    std::fill(bits, bits + words_, uint64_t{0});
    const int64_t low = std::clamp<int64_t>(choice_.seen[2 * at], 0, choice_.width);
    const int64_t high = std::clamp<int64_t>(choice_.seen[2 * at + 1], low, choice_.width);
    const float* scores = choice_.scores + row * choice_.width;
    if (choice_.rule == Rule::kRelative) choose_relative(scores, choice_.width, choice_.alpha, low, high, bits);
    if (choice_.rule == Rule::kTopK)
      choose_top(scores, choice_.budgets[head % choice_.heads], low, high, sorted, bits);
    for (const int64_t band : bands_of_[static_cast<size_t>(head)]) {
      const int64_t j = choice_.band_origin[at] - band;
      if (j >= low && j < high) set_bit(bits, j);
    }
    if (choice_.forcing[head]) {
      set_range(bits, std::max(low, choice_.forced[2 * at]), std::min(high, choice_.forced[2 * at + 1]));
      set_range(bits, std::max(low, choice_.leading[2 * b]), std::min(high, choice_.leading[2 * b + 1]));
    }
    int64_t count = 0;
    for (int64_t n = 0; n < words_; ++n) count += __builtin_popcountll(bits[n]);
    return count;
  }

 private:
  const Choice& choice_;
  const int64_t words_;
  std::vector<std::vector<int64_t>> bands_of_;
};

// job(first row, one past the last) for stretches of rows.
template <class Job>
void for_rows(int threads, int64_t rows, const Job& job) {
  run_parallel(threads, (rows + kRowsAJob - 1) / kRowsAJob,
           [&](int, int64_t n) { job(n * kRowsAJob, std::min(rows, (n + 1) * kRowsAJob)); });
}

}  // namespace

void choose(const Choice& choice, uint64_t* bits, int64_t* counts, int threads) {
  const Chooser chooser(choice);
  for_rows(threads, choice.batch * choice.heads * choice.blocks, [&](int64_t begin, int64_t end) {
    std::vector<float> sorted;
    for (int64_t row = begin; row < end; ++row)
      counts[row] = chooser.row(row, sorted, bits + row * words_of(choice.width));
  });
}

void list_bits(const uint64_t* bits, int64_t rows, int64_t width, const int64_t* indptr, int32_t* indices,
               int threads) {
  for_rows(threads, rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t* out = indices + indptr[row];
      for (int64_t n = 0; n < words_of(width); ++n)
        for (uint64_t word = bits[row * words_of(width) + n]; word != 0; word &= word - 1)
          *out++ = static_cast<int32_t>(n * 64 + __builtin_ctzll(word));
    }
  });
}

}  // namespace gossamer
