#include <algorithm>
#include <vector>

#include "planning/antidiagonal_job.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {

void antidiagonal(const Kernels& kernels, const ScoreCall& call, const Grid& grid, int64_t stride, const Part& part,
                  int64_t key_blocks, float* out) {
  const AntidiagonalSetting setting(kernels, call, grid, stride, part, key_blocks);
  std::vector<AntidiagonalScratch> scratch;
  scratch.reserve(call.threads);
  for (int t = 0; t < call.threads; ++t) scratch.emplace_back(setting);
  const int64_t groups = call.q.batch * call.k.heads, pieces = ceil_div(part.size(), setting.blocks_a_job);
  run_parallel(call.threads, groups * pieces, [&](int thread, int64_t n) {
    // The longest rows first.
    const int64_t first = part.first + (pieces - 1 - n / groups) * setting.blocks_a_job;
    const int64_t stop = std::min(part.stop, first + setting.blocks_a_job);
    AntidiagonalJob(setting, scratch[thread], n % groups, first, stop).score(out);
  });
}

}  // namespace gossamer
