#include <algorithm>

#include "kernels/score_job.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {

void pool(const Kernels& kernels, const TensorView& x, int64_t block, const int64_t* live, float* out, int threads) {
  const int64_t blocks = ceil_div(x.tokens, block);
  run_parallel(threads, x.batch * x.heads * blocks, [&](int, int64_t n) {
    const int64_t m = n % blocks, h = n / blocks % x.heads, b = n / blocks / x.heads;
    const int64_t low = std::max(m * block, live[2 * b]);
    const int64_t high = std::min({(m + 1) * block, x.tokens, live[2 * b + 1]});
    if (low < high)
      kernels.scores->mean(x.row(b, h, low), x.token_stride, high - low, x.dim, x.dtype, out + n * x.dim);
  });
}

}  // namespace gossamer
