// What a decode step reads: scores of pages, and the tokens of the best ones.
#include <algorithm>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "planning/ranking.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kPagesAJob = 256;
constexpr int kDropped = 32 + 21;  // of an entry's bits, for a bin
constexpr size_t kBins = size_t{1} << (64 - kDropped);

int64_t pages_of(const PageChoice& choice, int64_t b) {
  return std::min(choice.pages, ceil_div(choice.keys[b], choice.size));
}

// One head of a choice.
class Reader {
 public:
  Reader(const Kernels& kernels, const PageChoice& choice, const float* scores, int64_t share)
      : kernels_(*kernels.scores), choice_(choice), scores_(scores), share_(share) {}

  // Returns how many tokens there are.
  int64_t read(int64_t b, int64_t head, int64_t room, int32_t* tokens) {
    const int64_t pages = pages_of(choice_, b), keys = choice_.keys[b];
    taken_.assign(pages, 0);
    const int64_t sinks = std::min(pages, ceil_div(choice_.sinks, choice_.size));
    const int64_t recent = std::max<int64_t>(keys - std::max<int64_t>(choice_.recent, 1), 0) / choice_.size;
    for (int64_t n = 0; n < pages; ++n) taken_[n] = n < sinks || n >= recent;
    const int64_t held = std::count(taken_.begin(), taken_.end(), 1);
    if (held < choice_.count) take_best(scores_of(b, head, pages), pages, choice_.count - held);
    int64_t count = 0;
    for (int64_t n = 0; n < pages; ++n)
      if (taken_[n])
        for (int64_t t = n * choice_.size; t < std::min(keys, (n + 1) * choice_.size) && count < room; ++t)
          tokens[count++] = static_cast<int32_t>(t);
    return count;
  }

 private:
  // Of the query heads that choose together: their own scores, or the sum of what each gives.
  const float* scores_of(int64_t b, int64_t head, int64_t pages) {
    const float* first = scores_ + (b * choice_.heads + head) * share_ * choice_.pages;
    if (share_ == 1) return first;
    sums_.assign(pages, 0.0f);
    row_.resize(pages);
    for (int64_t n = 0; n < share_; ++n) {
      std::copy_n(first + n * choice_.pages, pages, row_.data());
      kernels_.softmax(row_.data(), pages, kLog2E);
      for (int64_t page = 0; page < pages; ++page) sums_[page] += row_[page];
    }
    return sums_.data();
  }

  // Ties break by the lower page; NaN ranks before all, and is not taken. By leading bits first: few pages share those
  // of the last one that is taken.
  void take_best(const float* scores, int64_t pages, int64_t count) {
    counts_.assign(kBins, 0);
    entries_.resize(pages);
    for (int64_t n = 0; n < pages; ++n) {
      if (taken_[n] || scores[n] == kNothing) continue;
      entries_[n] = Ranking::entry(scores[n], n);
      ++counts_[entries_[n] >> kDropped];
    }
    size_t last = 0;
    for (; last < kBins && count >= counts_[last]; ++last) count -= counts_[last];
    if (last == kBins) count = 0;
    size_t shared = 0;
    for (int64_t n = 0; n < pages; ++n) {
      if (taken_[n] || scores[n] == kNothing) continue;
      const size_t bin = entries_[n] >> kDropped;
      if (bin < last) take(scores, n);
      if (bin == last) entries_[shared++] = entries_[n];
    }
    const auto begin = entries_.begin();
    std::nth_element(begin, begin + count, begin + shared);
    for (int64_t n = 0; n < count; ++n) take(scores, entries_[n] & 0xffffffff);
  }

  void take(const float* scores, int64_t page) { taken_[page] = scores[page] == scores[page]; }

  const ScoreKernels& kernels_;
  const PageChoice& choice_;
  const float* scores_;
  const int64_t share_;
  std::vector<uint8_t> taken_;
  std::vector<float> sums_, row_;
  std::vector<uint64_t> entries_;
  std::vector<int64_t> counts_;
};

}  // namespace

void page_scores(const Kernels& kernels, const TensorView& queries, const Tokens& pages, const PageChoice& choice,
                 float* out, int threads) {
  const int64_t share = queries.heads / pages.heads, parts = ceil_div(choice.pages, kPagesAJob);
  // A thread's queries lie side by side, whatever the strides of the tensor.
  std::vector<float> rows(queries.batch * queries.heads * queries.dim);
  for (int64_t n = 0; n < queries.batch * queries.heads; ++n)
    std::copy_n(reinterpret_cast<const float*>(queries.row(n / queries.heads, n % queries.heads, 0)), queries.dim,
                rows.data() + n * queries.dim);
  run_parallel(threads, pages.batch * pages.heads * parts, [&](int, int64_t n) {
    const int64_t b = n / parts / pages.heads, group = n / parts % pages.heads, head = b * queries.heads + group * share;
    const int64_t first = n % parts * kPagesAJob, stop = std::min(choice.pages, first + kPagesAJob);
    const int64_t live = std::clamp(pages_of(choice, b), first, stop);
    float* scores = out + head * choice.pages;
    for (int64_t page = first; page < live;) {
      const int64_t count = pages.evenly(page, live - page);
      const EvenRows bounds = pages.in_place(b, group, page, count);
      kernels.scores->page_scores({rows.data() + head * queries.dim, static_cast<int>(share), queries.dim, bounds.first,
                                   bounds.stride, count, pages.dtype, scores + page, choice.pages});
      page += count;
    }
    for (int64_t h = 0; h < share; ++h)
      std::fill(scores + h * choice.pages + live, scores + h * choice.pages + stop, kNothing);
  });
}

void page_tokens(const Kernels& kernels, const float* scores, int64_t query_heads, const PageChoice& choice,
                 int64_t room, int32_t* tokens, int64_t* counts, int threads) {
  run_parallel(threads, choice.batch * choice.heads, [&](int, int64_t n) {
    Reader reader(kernels, choice, scores, query_heads / choice.heads);
    counts[n] = reader.read(n / choice.heads, n % choice.heads, room, tokens + n * room);
  });
}

}  // namespace gossamer
