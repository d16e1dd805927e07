// Random calls through every kernel of this machine, from several threads at once, compared with the definition. Built
// by test_sanitizers.py with AddressSanitizer or ThreadSanitizer, and with small budgets, so that small inputs take many
// passes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "encoded.h"
#include "pages.h"
#include "problem.h"
#include "runtime/cpu_features.h"
#include "weights.h"

using namespace gossamer;

namespace {

int failures = 0;

void expect(bool right, const std::string& isa, unsigned seed, const char* what) {
  if (right) return;
  std::printf("%s, seed %u: %s\n", isa.c_str(), seed, what);
  ++failures;
}

double sum_of(const std::vector<float>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

// Both sums of the probe hold what its rows hold, but for distances beyond the last.
bool probe_is_right(Problem& problem, const Kernels& kernels, int threads) {
  const int64_t width = problem.longest();
  std::vector<float> columns(kBatch * kQueryHeads * width), diagonals(columns.size());
  probe(kernels, problem.score_call(threads), 64, width, columns.data(), diagonals.data());
  double rows = 0.0;
  for (int64_t b = 0; b < kBatch; ++b) {
    const int64_t first = problem.extent().first_position(b) + problem.query_count[b];
    for (int64_t query = first - std::min<int64_t>(64, problem.query_count[b]); query < first; ++query)
      rows += problem.extent().keys_of(b, {query, query + 1}).empty() ? 0 : kQueryHeads;
  }
  const double slack = 1e-2 * std::max(1.0, rows);
  return std::abs(sum_of(columns) - rows) < slack && sum_of(diagonals) < rows + slack;
}

// Means, their products, and energies of a part: those of a row lie between 0 and the number of its queries.
bool pooled_scores_are_right(Problem& problem, const Kernels& kernels, int threads) {
  const Grid grid = problem.grid();
  ScoreCall call = problem.score_call(threads);
  int64_t rows = 0;
  for (int64_t b = 0; b < kBatch; ++b) rows = std::max(rows, grid.row_blocks(b));
  const int64_t blocks = ceil_div(problem.longest(), grid.block_k);
  const Part part{rows / 2, rows};
  std::vector<float> keys(kBatch * kGroups * blocks * problem.dim), queries(kBatch * kQueryHeads * rows * problem.dim);
  pool_keys(kernels, call.k, grid, blocks, keys.data(), threads);
  pool_queries(kernels, call.q, grid, rows, queries.data(), threads);
  const auto means = [&](std::vector<float>& x, int64_t heads, int64_t count) {
    const int64_t row = problem.dim * 4;
    return TensorView{reinterpret_cast<char*>(x.data()), kBatch, heads, count, problem.dim, heads * count * row,
                      count * row, row, DType::kFloat32};
  };
  std::vector<float> products(kBatch * kQueryHeads * part.size() * blocks);
  const Kernels& wide = kernels.bf16_tiles ? *kernels_of("portable") : kernels;
  pooled_products(wide, means(queries, kQueryHeads, rows), means(keys, kGroups, blocks), grid, part, products.data(),
                  threads);
  std::vector<char> pooled((keys.size() + problem.offset) * element_size(problem.dtype));
  for (size_t n = 0; n < keys.size(); ++n) problem.write(pooled, n, keys[n]);
  call.k = problem.view(pooled, kGroups, blocks);
  std::vector<float> energies(kBatch * kGroups * part.size() * blocks);
  block_energy(kernels, call, grid, part, {false, false}, energies.data());
  const float most = 1.001f * static_cast<float>(grid.block_q * kQueryHeads / kGroups);
  return std::all_of(products.begin(), products.end(), [](float x) { return std::abs(x) < 1e3f; }) &&
         std::all_of(energies.begin(), energies.end(), [&](float x) { return x >= 0 && x <= most; });
}

// Masses of a part under an LSE that is NaN in dead rows: finite, and none in rows that attend nothing.
bool masses_are_right(Problem& problem, const Kernels& kernels, int threads) {
  const Grid grid = problem.grid();
  int64_t rows = 0;
  for (int64_t b = 0; b < kBatch; ++b) rows = std::max(rows, grid.row_blocks(b));
  const int64_t blocks = ceil_div(problem.longest(), grid.block_k);
  const Part part{rows / 2, rows};
  std::vector<float> lse(kBatch * kQueryHeads * problem.query_len, std::numeric_limits<float>::quiet_NaN());
  const Extent extent = problem.extent();
  for (int64_t row = 0; row < kBatch * kQueryHeads; ++row) {
    const int64_t b = row / kQueryHeads, first = extent.first_position(b);
    for (int64_t i = first; i < first + extent.query_count[b]; ++i)
      lse[row * problem.query_len + extent.query_row(b, i)] = i % 5 == 0 ? -kNoSkip : 3.0f;
  }
  std::vector<float> masses(kBatch * kQueryHeads * part.size() * blocks, std::numeric_limits<float>::quiet_NaN());
  block_mass(kernels, problem.score_call(threads), grid, part, blocks, lse.data(), masses.data());
  return std::all_of(masses.begin(), masses.end(), [](float x) { return x >= 0 && x < 1e9f; });
}

// Antidiagonal scores: as many whole cells as see any key; and what each kind of top-p chooses of them.
bool choices_are_right(Problem& problem, const Kernels& kernels, int threads) {
  const Grid grid{problem.extent(), 48, 80};
  const int64_t stride = problem.random.one_of({1, 4, 16}), width = ceil_div(problem.longest(), grid.block_k);
  int64_t rows = 0;
  for (int64_t b = 0; b < kBatch; ++b) rows = std::max(rows, grid.row_blocks(b));
  std::vector<float> scores(kBatch * kQueryHeads * rows * width);
  antidiagonal(kernels, problem.score_call(threads), grid, stride, {0, rows}, width, scores.data());
  const std::vector<Range> seen(kBatch * rows, {0, width}), nothing(kBatch * rows, {0, 0});
  const std::vector<double> shares(kQueryHeads, 1.0);
  const std::vector<uint8_t> early(scores.size(), 1);
  bool right = true;
  for (const Rule rule :
       {Rule::kTopP, Rule::kTopPForced, Rule::kTopPReaching, Rule::kTopPBelow, Rule::kTopPOfAllRows,
        Rule::kTopPInTiers}) {
    Choice choice{};
    choice.batch = kBatch, choice.heads = kQueryHeads, choice.rows = rows, choice.width = width;
    choice.rule = rule, choice.scores = scores.data(), choice.shares = shares.data();
    choice.seen = seen.data(), choice.forced = nothing.data(), choice.early = early.data();
    std::vector<int64_t> counts(kBatch * kQueryHeads * rows);
    std::vector<uint64_t> bits(counts.size() * words_of(width));
    choose(choice, {bits.data(), counts.data()}, threads);
    for (size_t row = 0; row < counts.size(); ++row) {
      const float* own = scores.data() + row * width;
      const double mass = std::accumulate(own, own + width, 0.0);
      const int64_t held = width - std::count(own, own + width, 0.0f);  // a share of 1 is all that holds any
      right = right && std::abs(mass - std::round(mass)) < 1e-3 && mass < grid.block_q / stride + 0.5;
      if (rule == Rule::kTopP) right = right && counts[row] <= held;
      if (rule == Rule::kTopPBelow || rule == Rule::kTopPInTiers) right = right && counts[row] == width;
    }
  }
  return right;
}

// Every key of a chosen diagonal is in a block or a column, columns are kept, and nothing counts twice.
bool slashes_are_right(Problem& problem, int threads) {
  const Extent extent = problem.extent();
  const Grid grid{extent, 64, 64};
  const int64_t width = problem.longest(), words = words_of(width), block_words = words_of(words);
  std::vector<uint8_t> columns(kBatch * problem.heads * width), distances(columns.size());
  for (uint8_t& chosen : columns) chosen = problem.random.chance(0.02);
  for (uint8_t& chosen : distances) chosen = problem.random.chance(0.05);
  int64_t rows = 0;
  for (int64_t b = 0; b < kBatch; ++b) rows = std::max(rows, grid.row_blocks(b));
  const int64_t lists = kBatch * problem.heads * rows;
  std::vector<uint64_t> block_bits(lists * block_words), column_bits(lists * words);
  std::vector<int64_t> block_counts(lists), column_counts(lists);
  slashes({extent, problem.heads, width, {0, rows}, columns.data(), distances.data()},
          {block_bits.data(), block_counts.data()}, {column_bits.data(), column_counts.data()}, threads);
  const auto holds = [](const std::vector<uint64_t>& bits, int64_t from, int64_t n) {
    return (bits[from + n / 64] >> (n % 64)) & 1;
  };
  for (int64_t n = 0; n < lists; ++n) {
    const int64_t head = n / rows, b = head / problem.heads, m = n % rows;
    const int64_t end = m < grid.row_blocks(b) ? (grid.first_block(b) + m + 1) * 64 : 0;
    int64_t found_blocks = 0, found_columns = 0;
    for (int64_t key = 0; key < width; ++key) {
      bool wanted = columns[head * width + key];
      for (int64_t d = 0; d < std::min(width, end) && !wanted; ++d) {
        const int64_t top = std::max<int64_t>(end - d, 64);
        wanted = distances[head * width + d] && key >= top - 64 && key < top;
      }
      const bool block = holds(block_bits, n * block_words, key / 64), column = holds(column_bits, n * words, key);
      if (block && column) return false;
      if (key < std::min(end, extent.key_count[b]) && wanted && !block && !column) return false;
      found_columns += column;
      found_blocks += block && key % 64 == 0;
    }
    if (found_blocks != block_counts[n] || found_columns != column_counts[n]) return false;
  }
  return true;
}

bool counts_are_right(const Problem& problem, int threads) {
  if (problem.is_permuted()) return true;
  std::vector<int64_t> counts(kBatch * problem.heads);
  count_pairs(problem.plan(), counts.data(), threads);
  for (int64_t b = 0; b < kBatch; ++b)
    for (int64_t head = 0; head < problem.heads; ++head)
      if (counts[b * problem.heads + head] != problem.pairs(b, head)) return false;
  return true;
}

// Those of queries are what the definition has, and all are the same on any number of threads, which strips of keys
// that wait for one another decide.
bool gradients_are_right(Problem& problem, const Kernels& kernels, int threads) {
  if (!problem.has_gradients()) return true;
  const Problem::Gradients found = problem.gradients(kernels, threads);
  if (!(found == problem.gradients(kernels, 5 - threads))) return false;
  return problem.gradient_error(found) <= (problem.dtype == DType::kFloat32 ? 0.005 : 0.1);
}

// A plan whose lists were written after it was checked: whatever comes out, nothing is read or written outside.
void run_spoiled(Problem& problem, const Kernels& kernels, int threads) {
  problem.spoil_lists();
  problem.attend(kernels, threads);
  if (problem.has_gradients()) problem.gradients(kernels, threads);
  std::vector<int64_t> counts(kBatch * problem.heads);
  if (!problem.is_permuted()) count_pairs(problem.plan(), counts.data(), threads);
}

void check(const std::string& isa, unsigned seed, int threads) {
  const Kernels& kernels = *kernels_of(isa);
  Problem problem(seed, kernels.bf16_tiles);
  problem.attend(kernels, threads);
  expect(problem.error() <= (problem.dtype == DType::kBFloat16 ? 0.06 : 0.005), isa, seed, "attention is wrong");
  expect(gradients_are_right(problem, kernels, threads), isa, seed, "gradients are wrong");
  expect(probe_is_right(problem, kernels, threads), isa, seed, "the probe is wrong");
  expect(pooled_scores_are_right(problem, kernels, threads), isa, seed, "pooled scores are wrong");
  expect(masses_are_right(problem, kernels, threads), isa, seed, "masses are wrong");
  expect(choices_are_right(problem, kernels, threads), isa, seed, "choices are wrong");
  expect(slashes_are_right(problem, threads), isa, seed, "slashes are wrong");
  expect(counts_are_right(problem, threads), isa, seed, "counted pairs are wrong");
  expect(PagedProblem(seed).is_read_right(*kernels.scores), isa, seed, "pages are read wrong");
  expect(EncodedProblem(seed).is_read_right(*kernels.scores), isa, seed, "encoded tokens are read wrong");
  run_spoiled(problem, kernels, threads);
  WeightProblem weights(seed);
  expect(weights.is_multiplied_right(kernels, threads), isa, seed, "packed weights are multiplied wrong");
  weights.run_spoiled(kernels, threads);
}

// They share the kept workspace.
void check_calls_at_once(const std::string& isa) {
  const Kernels& kernels = *kernels_of(isa);
  std::vector<std::unique_ptr<Problem>> problems;
  for (unsigned n = 0; n < 4; ++n) problems.push_back(std::make_unique<Problem>(1000 + n, kernels.bf16_tiles));
  std::vector<std::thread> callers;
  for (auto& problem : problems)
    callers.emplace_back([&problem, &kernels] {
      for (int n = 0; n < 5; ++n) problem->attend(kernels, 2);
    });
  for (auto& caller : callers) caller.join();
  for (unsigned n = 0; n < problems.size(); ++n)
    expect(problems[n]->error() <= 0.06, isa, 1000 + n, "calls at once disturb each other");
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seeds = argc > 1 ? static_cast<unsigned>(std::stoi(argv[1])) : 30;
  for (const std::string& isa : supported_isas())
    for (unsigned seed = 0; seed < seeds; ++seed) check(isa, seed, 1 + static_cast<int>(seed % 4));
  for (const std::string& isa : supported_isas()) check_calls_at_once(isa);
  std::printf("%u plans for each of %zu instruction sets: %d wrong\n", seeds, supported_isas().size(), failures);
  return failures == 0 ? 0 : 1;
}
