#include <algorithm>
#include <vector>

#include "planning/antidiagonal_job.h"
#include "planning/planning.h"
#include "runtime/budgets.h"
#include "runtime/parallel.h"
#include "runtime/workspace.h"

namespace gossamer {
namespace {

// Keys are packed once for all query blocks, of as many key/value heads at once as fit; of a head whose keys do not,
// each job packs those that it sees. run(job) for each stretch of query blocks.
template <class Run>
void for_each_job(const AntidiagonalSetting& setting, const Run& run) {
  const ScoreCall& call = setting.call;
  std::vector<AntidiagonalScratch> scratch;
  scratch.reserve(call.threads);
  for (int t = 0; t < call.threads; ++t) scratch.emplace_back(setting);
  const int64_t heads = call.k.heads, groups = call.q.batch * heads, tiles = setting.tiling.count;
  const int64_t bytes = tiles * setting.tile_floats() * static_cast<int64_t>(sizeof(float));
  const int64_t packed = bytes == 0 ? 0 : std::min(groups, kPackBytes / bytes), at_once = packed == 0 ? groups : packed;
  std::vector<Range> seen;
  for (int64_t b = 0; b < call.q.batch; ++b) seen.push_back(setting.tiles_seen(b));
  KeptBuffer buffer;
  float* keys = packed == 0 ? nullptr : reinterpret_cast<float*>(buffer.reserve(packed * bytes));
  const auto keys_of = [&](int64_t n) { return keys == nullptr ? nullptr : keys + n * tiles * setting.tile_floats(); };
  const int64_t pieces = ceil_div(setting.part.size(), setting.blocks_a_job);
  for (int64_t first = 0; first < groups; first += at_once) {
    const int64_t count = std::min(at_once, groups - first);
    if (keys != nullptr)
      run_parallel(call.threads, count * tiles, [&](int thread, int64_t n) {
        const int64_t group = first + n / tiles, tile = n % tiles;
        if (tile >= seen[group / heads].begin && tile < seen[group / heads].end)
          setting.pack_keys(group / heads, group % heads, tile, scratch[thread],
                            keys_of(n / tiles) + tile * setting.tile_floats());
      });
    run_parallel(call.threads, count * pieces, [&](int thread, int64_t n) {
      // The longest rows first.
      const int64_t begin = setting.part.first + (pieces - 1 - n / count) * setting.blocks_a_job;
      const int64_t stop = std::min(setting.part.stop, begin + setting.blocks_a_job);
      AntidiagonalJob job(setting, scratch[thread], first + n % count, begin, stop, keys_of(n % count));
      run(job);
    });
  }
}

}  // namespace

void antidiagonal(const Kernels& kernels, const ScoreCall& call, const Grid& grid, int64_t stride, const Part& part,
                  int64_t key_blocks, float* out) {
  for_each_job({kernels, call, grid, stride, part, key_blocks}, [&](AntidiagonalJob& job) { job.score(out); });
}

void antidiagonal_peaks(const Kernels& kernels, const ScoreCall& call, const Grid& grid, int64_t stride,
                        const Part& part, int64_t key_blocks, const PeakScores& out) {
  for_each_job({kernels, call, grid, stride, part, key_blocks}, [&](AntidiagonalJob& job) { job.score_peaks(out); });
}

}  // namespace gossamer
