#include <algorithm>

#include "kernels/score_job.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

// tokens_of(b, m): the tokens of block m of a batch row.
template <class TokensOf>
void pool(const Kernels& kernels, const TensorView& x, int64_t blocks, float* out, int threads,
          const TokensOf& tokens_of) {
  run_parallel(threads, x.batch * x.heads * blocks, [&](int, int64_t n) {
    const int64_t b = n / blocks / x.heads;
    const Range tokens = tokens_of(b, n % blocks);
    float* mean = out + n * x.dim;
    if (tokens.empty())
      std::fill(mean, mean + x.dim, 0.0f);
    else
      kernels.scores->mean(x.row(b, n / blocks % x.heads, tokens.begin), x.token_stride, tokens.size(), x.dim, x.dtype,
                           mean);
  });
}

}  // namespace

void turn(const Kernels& kernels, const TensorView& x, int64_t pairs, const float* cos, const float* sin,
          const TensorView& out, int threads) {
  constexpr int64_t kTokensAJob = 256;
  const int64_t stretches = ceil_div(x.tokens, kTokensAJob);
  run_parallel(threads, x.batch * x.heads * stretches, [&](int, int64_t n) {
    const int64_t b = n / stretches / x.heads, head = n / stretches % x.heads, first = n % stretches * kTokensAJob;
    for (int64_t t = first; t < std::min(x.tokens, first + kTokensAJob); ++t) {
      const int64_t angle = (b * x.tokens + t) * pairs;
      kernels.scores->turn(x.row(b, head, t), x.dim, static_cast<int>(pairs), x.dtype, cos + angle, sin + angle,
                           out.row(b, head, t));
    }
  });
}

void pool_keys(const Kernels& kernels, const TensorView& k, const Grid& grid, int64_t blocks, float* out,
               int threads) {
  pool(kernels, k, blocks, out, threads, [&](int64_t b, int64_t n) {
    const int64_t past = std::min((n + 1) * grid.block_k, grid.extent.key_count[b]);
    return Range{grid.extent.key_slot(b, n * grid.block_k), grid.extent.key_slot(b, past)};
  });
}

void pool_queries(const Kernels& kernels, const TensorView& q, const Grid& grid, int64_t blocks, float* out,
                  int threads) {
  pool(kernels, q, blocks, out, threads, [&](int64_t b, int64_t m) {
    const Range queries = grid.queries(b, m);
    return Range{grid.extent.query_row(b, queries.begin), grid.extent.query_row(b, queries.end)};
  });
}

}  // namespace gossamer
