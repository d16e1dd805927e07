// Products of pooled queries and pooled keys: each sum is taken in one order, whatever the shape of the batch.
#include <algorithm>
#include <limits>
#include <vector>

#include "planning/panels.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

class Products {
 public:
  // factor: of the products as logits in powers of two, whose shares of a row are written; 0: the products are.
  Products(const Kernels& kernels, const TensorView& queries, const TensorView& keys, const Grid& grid,
           const Part& part, float factor, int threads)
      : queries_(queries),
        key_means_(keys),
        grid_(grid),
        part_(part),
        factor_(factor),
        kernels_(*kernels.scores),
        threads_(threads),
        padded_(padded(kernels, keys.dim)),
        share_(queries.heads / keys.heads),
        width_(keys.tokens),
        tiles_(ceil_div(width_, kChunk)),
        scratch_(scratch_for(threads, padded_)),
        keys_(keys.batch * keys.heads * tiles_ * kChunk * padded_) {}

  void run(float* out) {
    const int64_t groups = key_means_.batch * key_means_.heads, rows = share_ * part_.size();
    run_parallel(threads_, groups * tiles_, [&](int, int64_t n) {
      const int64_t group = n / tiles_;
      const void* pointers[kChunk];
      kernels_.pack_keys(list_pooled(key_means_, group / key_means_.heads, group % key_means_.heads,
                                     n % tiles_ * kChunk, width_, padded_, pointers),
                         keys(n));
    });
    const int64_t panels = ceil_div(rows, kScoreRows);
    run_parallel(threads_, groups * panels, [&](int thread, int64_t n) {
      const int64_t first = n % panels * kScoreRows;
      multiply(scratch_[thread], n / panels, first, std::min(rows, first + kScoreRows), out);
    });
  }

 private:
  float* keys(int64_t tile) { return keys_.data() + tile * kChunk * padded_; }

  // Rows [first, stop) of a group, by head and query block.
  void multiply(PanelScratch& scratch, int64_t group, int64_t first, int64_t stop, float* out) {
    const int64_t b = group / key_means_.heads, head = group % key_means_.heads * share_, size = part_.size();
    const void* pointers[kScoreRows];
    const int count = static_cast<int>(stop - first);
    for (int r = 0; r < count; ++r)
      pointers[r] = queries_.row(b, head + (first + r) / size, part_.first + (first + r) % size);
    kernels_.pack_queries({pointers, count, queries_.dim, padded_, queries_.dtype}, scratch.queries);
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      kernels_.products({scratch.queries, keys(group * tiles_ + tile), count, padded_, 1.0f, nullptr, scratch.logits});
      const int64_t begin = tile * kChunk, end = std::min(width_, begin + kChunk);
      for (int r = 0; r < count; ++r) {
        const int64_t m = part_.first + (first + r) % size;
        const Range seen = grid_.seen(b, m);
        const float* row = scratch.logits + int64_t{r} * kScorePitch;
        float* to = row_of(out, b, head, first + r);
        for (int64_t j = begin; j < end; ++j) to[j] = j >= seen.begin && j < seen.end ? row[j - begin] : 0.0f;
      }
    }
    if (factor_ == 0.0f) return;
    for (int r = 0; r < count; ++r) {
      const Range seen = grid_.seen(b, part_.first + (first + r) % size);
      if (!seen.empty()) kernels_.softmax(row_of(out, b, head, first + r) + seen.begin, seen.size(), factor_);
    }
  }

  float* row_of(float* out, int64_t b, int64_t head, int64_t r) const {
    return out + ((b * queries_.heads + head) * part_.size() + r) * width_;
  }

  const TensorView &queries_, &key_means_;
  const Grid& grid_;
  const Part& part_;
  const float factor_;
  const ScoreKernels& kernels_;
  const int threads_, padded_;
  const int64_t share_, width_, tiles_;
  std::vector<PanelScratch> scratch_;
  Aligned keys_;
};

}  // namespace

void pooled_products(const Kernels& kernels, const TensorView& queries, const TensorView& keys, const Grid& grid,
                     const Part& part, float* out, int threads) {
  Products(kernels, queries, keys, grid, part, 0.0f, threads).run(out);
}

void pooled_shares(const Kernels& kernels, const TensorView& queries, const TensorView& keys, const Grid& grid,
                   const Part& part, float scale, float* out, int threads) {
  // Under a scale of 0 all that is seen shares alike, as it does under the smallest.
  const float factor = scale == 0.0f ? std::numeric_limits<float>::denorm_min() : scale * kLog2E;
  Products(kernels, queries, keys, grid, part, factor, threads).run(out);
}

}  // namespace gossamer
