#include "planning/token_scores.h"

#include <algorithm>
#include <vector>

#include "planning/panels.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kTokensAJob = 4096;
constexpr int64_t kTilesAJob = 16;

int64_t bytes_of(LabelType type, int64_t tokens) {
  if (type == LabelType::kFloat32) return 4 * tokens;
  return type == LabelType::kBFloat16 || type == LabelType::kFloat16 ? 2 * tokens : tokens;
}

}  // namespace

void label_scores(const Kernels& kernels, const TensorView& queries, const LabelView& labels, const TensorView* low,
                  const TensorView* step, const int64_t* keys, float* out, int threads) {
  const int64_t share = queries.heads / labels.heads, parts = ceil_div(labels.tokens, kTokensAJob);
  // A thread's queries lie side by side, whatever the strides of the tensor.
  std::vector<float> rows(queries.batch * queries.heads * queries.dim);
  for (int64_t n = 0; n < queries.batch * queries.heads; ++n)
    std::copy_n(reinterpret_cast<const float*>(queries.row(n / queries.heads, n % queries.heads, 0)), queries.dim,
                rows.data() + n * queries.dim);
  const auto side = [](const TensorView* of, int64_t b, int64_t head, int64_t first) {
    return of == nullptr ? nullptr : reinterpret_cast<const uint16_t*>(of->row(b, head, first));
  };
  run_parallel(threads, labels.batch * labels.heads * parts, [&](int, int64_t n) {
    const int64_t b = n / parts / labels.heads, label_head = n / parts % labels.heads;
    const int64_t head = b * queries.heads + label_head * share;
    const int64_t first = n % parts * kTokensAJob, stop = std::min(labels.tokens, first + kTokensAJob);
    const int64_t live = std::clamp(keys[b], first, stop);
    float* scores = out + head * labels.tokens;
    const char* codes = labels.codes + b * labels.batch_stride + label_head * labels.head_stride;
    if (live > first)
      kernels.scores->label_scores({rows.data() + head * queries.dim, static_cast<int>(share), queries.dim,
                                    codes + bytes_of(labels.type, first), labels.row_stride, labels.type,
                                    side(low, b, label_head, first), side(step, b, label_head, first), live - first,
                                    scores + first, labels.tokens});
    for (int64_t h = 0; h < share; ++h)
      std::fill(scores + h * labels.tokens + live, scores + h * labels.tokens + stop, kNothing);
  });
}

void collisions(const Kernels& kernels, const HashView& hashes, int16_t* out, int threads) {
  const int64_t share = hashes.query_heads / hashes.heads, parts = ceil_div(hashes.tiles, kTilesAJob);
  const int64_t tokens = hashes.tiles * kHashTile;
  run_parallel(threads, hashes.batch * hashes.heads * parts, [&](int, int64_t n) {
    const int64_t b = n / parts / hashes.heads, group = n / parts % hashes.heads;
    const int64_t head = b * hashes.query_heads + group * share, first = n % parts * kTilesAJob;
    const int64_t tiles = std::min(hashes.tiles - first, kTilesAJob);
    const int16_t* codes = hashes.codes + b * hashes.batch_stride + group * hashes.head_stride;
    kernels.scores->collisions({hashes.queries + head * hashes.tables, static_cast<int>(share),
                                static_cast<int>(hashes.tables), codes + first * hashes.tables * kHashTile, tiles,
                                out + head * tokens + first * kHashTile, tokens});
  });
}

}  // namespace gossamer
