#include <algorithm>
#include <vector>

#include "kernels/score_job.h"
#include "planning/planning.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

// Where the live tokens of a block lie.
Range tokens_of_keys(const Grid& grid, int64_t b, int64_t n) {
  const int64_t past = std::min((n + 1) * grid.block_k, grid.extent.key_count[b]);
  return {grid.extent.key_slot(b, n * grid.block_k), grid.extent.key_slot(b, past)};
}

Range tokens_of_queries(const Grid& grid, int64_t b, int64_t m) {
  const Range queries = grid.queries(b, m);
  return {grid.extent.query_row(b, queries.begin), grid.extent.query_row(b, queries.end)};
}

// Room of each thread for a block of rows that have to be copied.
class BlockRooms {
 public:
  BlockRooms(int threads, int64_t block, const Tokens& x)
      : bytes_(x.paged() ? std::min(block, x.tokens) * x.row_bytes() : 0), rooms_(threads) {}
  char* of(int thread) {
    rooms_[thread].resize(bytes_);
    return rooms_[thread].data();
  }

 private:
  const int64_t bytes_;
  std::vector<std::vector<char>> rooms_;
};

// tokens_of(b, m): the tokens of block m of a batch row, `block` at most.
template <class TokensOf>
void pool(const Kernels& kernels, const Tokens& x, int64_t block, int64_t blocks, float* out, int threads,
          const TokensOf& tokens_of) {
  BlockRooms rooms(threads, block, x);
  run_parallel(threads, x.batch * x.heads * blocks, [&](int thread, int64_t n) {
    const int64_t b = n / blocks / x.heads;
    const Range tokens = tokens_of(b, n % blocks);
    float* mean = out + n * x.dim;
    if (tokens.empty()) {
      std::fill(mean, mean + x.dim, 0.0f);
      return;
    }
    const EvenRows rows = x.consecutive(*kernels.scores, b, n / blocks % x.heads, tokens.begin, tokens.size(),
                                        rooms.of(thread));
    kernels.scores->mean(rows.first, rows.stride, tokens.size(), x.dim, x.dtype, mean);
  });
}

}  // namespace

void pool_turned(const Kernels& kernels, const Tokens& x, const Turn& turn, const Grid& grid, bool keys,
                 int64_t blocks, const Pools& out, int threads) {
  const int64_t row_bytes = x.row_bytes(), most = keys ? grid.block_k : grid.block_q;
  std::vector<std::vector<char>> turned(threads);
  BlockRooms rooms(threads, most, x);
  run_parallel(threads, x.batch * x.heads * blocks, [&](int thread, int64_t n) {
    const int64_t b = n / blocks / x.heads, head = n / blocks % x.heads;
    const Range tokens = keys ? tokens_of_keys(grid, b, n % blocks) : tokens_of_queries(grid, b, n % blocks);
    float *mean = out.mean + n * x.dim, *low = keys ? out.low + n * x.dim : nullptr;
    float* high = keys ? out.high + n * x.dim : nullptr;
    if (tokens.empty()) {
      for (float* pool : {mean, low, high})
        if (pool != nullptr) std::fill(pool, pool + x.dim, 0.0f);
      return;
    }
    std::vector<char>& rows = turned[thread];
    rows.resize(std::min(most, x.tokens) * row_bytes);
    const EvenRows given = x.consecutive(*kernels.scores, b, head, tokens.begin, tokens.size(), rooms.of(thread));
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
      const int64_t angle = (b * x.tokens + t) * turn.pairs;
      kernels.scores->turn(given.first + (t - tokens.begin) * given.stride, x.dim, static_cast<int>(turn.pairs), x.dtype, turn.cos + angle,
                           turn.sin + angle, rows.data() + (t - tokens.begin) * row_bytes);
    }
    kernels.scores->mean(rows.data(), row_bytes, tokens.size(), x.dim, x.dtype, mean);
    if (keys) kernels.scores->bounds(rows.data(), row_bytes, tokens.size(), x.dim, x.dtype, low, high);
  });
}

void pool_keys(const Kernels& kernels, const Tokens& k, const Grid& grid, int64_t blocks, float* out,
               int threads) {
  pool(kernels, k, grid.block_k, blocks, out, threads, [&](int64_t b, int64_t n) { return tokens_of_keys(grid, b, n); });
}

void pool_queries(const Kernels& kernels, const TensorView& q, const Grid& grid, int64_t blocks, float* out,
                  int threads) {
  pool(kernels, q, grid.block_q, blocks, out, threads, [&](int64_t b, int64_t m) { return tokens_of_queries(grid, b, m); });
}

}  // namespace gossamer
