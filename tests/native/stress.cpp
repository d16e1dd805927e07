// Random plans through every kernel of this machine, from several threads at once, compared with the definition in
// double precision. Built by test_sanitizers.py with AddressSanitizer or ThreadSanitizer; all tensors are allocated to
// the byte, so that an access beyond one is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attend/executor.h"
#include "kernels/half.h"
#include "planning/planning.h"
#include "runtime/cpu_features.h"

using namespace gossamer;

namespace {

struct Random {
  explicit Random(unsigned seed) : engine(seed) {}
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine); }
  float normal() { return std::normal_distribution<float>()(engine); }
  std::mt19937 engine;
};

constexpr int64_t kBatch = 2, kQueryHeads = 4, kGroups = 2;

struct Problem {
  Random random;
  int64_t heads, query_len, key_len, block_q, block_k, column_group;
  int64_t offset;  // of the tensors in their storage, in elements: bf16 may lie at any even address
  int dim;
  DType dtype;
  bool causal;
  int64_t limit;
  std::vector<int64_t> block_indptr{0}, column_indptr{0}, query_start, key_start, key_count;
  std::vector<int32_t> block_indices, column_indices, sink, window, q_order, k_order;
  std::vector<float> sinks;
  std::vector<char> q, k, v, out;
  std::vector<float> lse;

  explicit Problem(unsigned seed) : random(seed) {
    heads = random.chance(0.5) ? kGroups : kQueryHeads;
    query_len = std::vector<int64_t>{1, 3, 70, 130}[random.below(4)];
    key_len = query_len + std::vector<int64_t>{0, 1, 60, 900}[random.below(4)];
    block_q = random.chance(0.5) ? 64 : 40;
    block_k = random.chance(0.5) ? 64 : 48;
    dim = std::vector<int>{64, 16, 40}[random.below(3)];
    dtype = static_cast<DType>(random.below(3));
    offset = random.below(2);
    causal = !random.chance(0.2);
    limit = random.chance(0.2) ? 50 : kUnlimited;
    const int64_t blocks = (query_len + block_q - 1) / block_q;
    column_group = random.chance(0.5) ? 1 : blocks;
    lists(kBatch * heads * blocks, (key_len + block_k - 1) / block_k, 0.3, block_indptr, block_indices);
    lists(kBatch * heads * ((blocks + column_group - 1) / column_group), key_len, random.chance(0.5) ? 0.2 : 0.0,
          column_indptr, column_indices);
    for (int64_t h = 0; h < heads; ++h) {
      sink.push_back(static_cast<int32_t>(random.chance(0.5) ? random.below(70) : 0));
      window.push_back(static_cast<int32_t>(random.chance(0.5) ? random.below(150) : 0));
    }
    for (int64_t b = 0; b < kBatch; ++b) {
      key_start.push_back(random.chance(0.5) ? random.below(key_len) : 0);
      key_count.push_back(key_len - key_start[b]);
      query_start.push_back(key_count[b] - query_len);
    }
    if (random.chance(0.2)) q_order = orders(query_len);
    if (random.chance(0.2)) k_order = orders(key_len);
    if (random.chance(0.3))
      for (int64_t h = 0; h < kQueryHeads; ++h) sinks.push_back(random.normal());
    fill(q, kBatch * kQueryHeads * query_len);
    fill(k, kBatch * kGroups * key_len);
    fill(v, kBatch * kGroups * key_len);
    out.resize(q.size());
    lse.resize(kBatch * kQueryHeads * query_len);
  }

  void lists(int64_t rows, int64_t columns, double share, std::vector<int64_t>& indptr, std::vector<int32_t>& indices) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c)
        if (random.chance(share)) indices.push_back(static_cast<int32_t>(c));
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
  }

  std::vector<int32_t> orders(int64_t length) {
    std::vector<int32_t> all;
    for (int64_t n = 0; n < kBatch * heads; ++n) {
      std::vector<int32_t> one(length);
      std::iota(one.begin(), one.end(), 0);
      std::shuffle(one.begin(), one.end(), random.engine);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }

  // Draws the tensors anew.
  void convert(DType wanted) {
    dtype = wanted;
    fill(q, kBatch * kQueryHeads * query_len);
    fill(k, kBatch * kGroups * key_len);
    fill(v, kBatch * kGroups * key_len);
    out.assign(q.size(), 0);
    for (auto* tensor : {&q, &k, &v, &out}) tensor->shrink_to_fit();
  }

  int64_t element() const { return dtype == DType::kFloat32 ? 4 : 2; }

  void fill(std::vector<char>& tensor, int64_t rows) {
    tensor.resize((rows * dim + offset) * element());
    for (int64_t n = 0; n < rows * dim; ++n) write(tensor, n, random.normal());
  }

  void write(std::vector<char>& tensor, size_t n, float x) const {
    const uint16_t half = dtype == DType::kBFloat16 ? float_to_bf16(x) : float_to_fp16(x);
    if (dtype == DType::kFloat32)
      std::memcpy(&tensor[(n + offset) * 4], &x, 4);
    else
      std::memcpy(&tensor[(n + offset) * 2], &half, 2);
  }

  double at(const std::vector<char>& tensor, int64_t row, int64_t d) const {
    const char* p = &tensor[(row * dim + d + offset) * element()];
    float wide;
    uint16_t half;
    if (dtype == DType::kFloat32) {
      std::memcpy(&wide, p, 4);
      return wide;
    }
    std::memcpy(&half, p, 2);
    return dtype == DType::kBFloat16 ? bf16_to_float(half) : fp16_to_float(half);
  }

  TensorView view(std::vector<char>& tensor, int64_t tensor_heads, int64_t tokens) const {
    const int64_t row = dim * element();
    return {tensor.data() + offset * element(), kBatch, tensor_heads, tokens, dim, tensor_heads * tokens * row,
            tokens * row, row, dtype};
  }

  Extent extent() const {
    return {kBatch, query_start.data(), key_start.data(), key_count.data(), causal, limit};
  }

  Plan plan() const {
    return {extent(), heads, query_len, key_len, block_q, block_k, column_group,
            {block_indptr.data(), block_indices.data()}, {column_indptr.data(), column_indices.data()}, sink.data(),
            window.data(), q_order.empty() ? nullptr : q_order.data(), k_order.empty() ? nullptr : k_order.data()};
  }

  void run(const Kernels& kernels, int threads) {
    const AttentionCall call{view(q, kQueryHeads, query_len), view(k, kGroups, key_len), view(v, kGroups, key_len),
                             view(out, kQueryHeads, query_len), lse.data(), sinks.empty() ? nullptr : sinks.data(),
                             0.2f, 0.0f, threads};
    execute(kernels, plan(), call);
  }

  // Scores of all kinds, into buffers of the exact size; the sums are known.
  bool plan_is_right(const Kernels& kernels, int threads) {
    ScoreCall call{view(q, kQueryHeads, query_len), view(k, kGroups, key_len), extent(), 0.2f, threads};
    std::vector<float> columns(kBatch * kQueryHeads * key_len), diagonals(columns.size());
    probe(kernels, call, 64, columns.data(), diagonals.data());
    const double by_column = std::accumulate(columns.begin(), columns.end(), 0.0);
    const double by_diagonal = std::accumulate(diagonals.begin(), diagonals.end(), 0.0);

    const int64_t key_blocks = (key_len + 63) / 64, query_blocks = (query_len + 63) / 64;
    std::vector<int64_t> live;
    for (int64_t b = 0; b < kBatch; ++b) live.insert(live.end(), {key_start[b], key_start[b] + key_count[b]});
    std::vector<float> means(kBatch * kGroups * key_blocks * dim);
    pool(kernels, call.k, 64, live.data(), means.data(), threads);
    std::vector<char> pooled((means.size() + offset) * element());
    for (size_t n = 0; n < means.size(); ++n) write(pooled, n, means[n]);
    call.k = view(pooled, kGroups, key_blocks);
    std::vector<float> energies(kBatch * kGroups * query_blocks * key_blocks);
    block_energy(kernels, call, {64, 64, 0, query_blocks}, energies.data());
    bool right = std::abs(by_column - by_diagonal) < 1e-2 * std::max(1.0, by_column);
    for (float energy : energies) right = right && energy >= 0 && energy <= 64.01f * kQueryHeads / kGroups;
    return right && choices_are_right(kernels, threads) && counts_are_right(threads);
  }

  // Antidiagonal scores of a buffer of the exact size, and what each kind of top-p chooses of them.
  bool choices_are_right(const Kernels& kernels, int threads) {
    const ScoreCall call{view(q, kQueryHeads, query_len), view(k, kGroups, key_len), extent(), 0.2f, threads};
    const int64_t stride = std::vector<int64_t>{1, 4, 16}[random.below(3)];
    const int64_t block = 48, blocks = (query_len + block - 1) / block, width = (key_len + 79) / 80;
    std::vector<float> scores(kBatch * kQueryHeads * blocks * width);
    antidiagonal(kernels, call, {block, 80, 0, blocks}, stride, scores.data());
    std::vector<int64_t> seen, nothing(kBatch * blocks * 2);
    for (int64_t n = 0; n < kBatch * blocks; ++n) seen.insert(seen.end(), {0, width});
    const std::vector<double> shares(kQueryHeads, 1.0);
    const std::vector<uint8_t> forcing(kBatch * kQueryHeads);
    bool right = true;
    for (const Rule rule : {Rule::kTopP, Rule::kTopPForced, Rule::kTopPReaching, Rule::kTopPBelow, Rule::kTopPAllRows}) {
      const Choice choice{kBatch, kQueryHeads, blocks, width, rule, 0.0f, scores.data(), nullptr, shares.data(),
                          nullptr, 0, nullptr, forcing.data(), nothing.data(), nothing.data(), seen.data()};
      std::vector<int64_t> counts(kBatch * kQueryHeads * blocks);
      std::vector<uint64_t> bits(counts.size() * words_of(width));
      choose(choice, bits.data(), counts.data(), threads);
      for (size_t row = 0; row < counts.size(); ++row) {
        double mass = 0;
        int64_t held = 0;  // a share of 1 is all that holds any
        for (int64_t n = 0; n < width; ++n) {
          mass += scores[row * width + n];
          held += scores[row * width + n] > 0;
        }
        // Of whole cells: as many as see any key.
        right = right && std::abs(mass - std::round(mass)) < 1e-3 && mass < block / stride + 0.5;
        if (rule == Rule::kTopP) right = right && counts[row] <= held;
        if (rule == Rule::kTopPBelow) right = right && counts[row] == width;
      }
    }
    return right;
  }

  // Every key of a chosen diagonal is in a block or a column, columns are kept, and nothing counts twice.
  bool slashes_are_right(int threads) {
    std::vector<int64_t> indptr{0};
    std::vector<int32_t> distances;
    const int64_t words = words_of(key_len), block_words = words_of(words), blocks = (query_len + 63) / 64;
    std::vector<uint64_t> columns(kBatch * heads * words);
    for (int64_t row = 0; row < kBatch * heads; ++row) {
      for (int64_t d = key_len - 1; d >= 0; --d)
        if (random.chance(0.05)) distances.push_back(static_cast<int32_t>(d));
      indptr.push_back(static_cast<int64_t>(distances.size()));
      for (int64_t j = 0; j < key_len; ++j)
        if (random.chance(0.02)) columns[row * words + j / 64] |= uint64_t{1} << (j % 64);
    }
    const int64_t rows = kBatch * heads * blocks;
    std::vector<uint64_t> block_bits(rows * block_words), column_bits(rows * words);
    std::vector<int64_t> block_counts(rows), column_counts(rows);
    slashes({extent(), heads, key_len, 0, blocks, {indptr.data(), distances.data()}, columns.data()},
            {block_bits.data(), block_counts.data()}, {column_bits.data(), column_counts.data()}, threads);
    const auto holds = [](const std::vector<uint64_t>& bits, int64_t from, int64_t n) {
      return (bits[from + n / 64] >> (n % 64)) & 1;
    };
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t row = n / blocks, b = row / heads, end = (n % blocks + 1) * 64 + query_start[b];
      const auto wanted = [&](int64_t j) {
        if (holds(columns, row * words, j)) return true;
        const int64_t position = j - key_start[b];
        return std::any_of(distances.begin() + indptr[row], distances.begin() + indptr[row + 1], [&](int64_t d) {
          const int64_t top = std::max<int64_t>(end - d, 64);
          return d < end && position >= top - 64 && position < top;
        });
      };
      int64_t found_blocks = 0, found_columns = 0;
      for (int64_t j = 0; j < key_len; ++j) {
        const bool block = holds(block_bits, n * block_words, j / 64), column = holds(column_bits, n * words, j);
        if (block && column) return false;
        if (j < end + key_start[b] && wanted(j) && !block && !column) return false;
        found_columns += column;
        found_blocks += block && j % 64 == 0;
      }
      if (found_blocks != block_counts[n] || found_columns != column_counts[n]) return false;
    }
    return true;
  }

  bool counts_are_right(int threads) {
    if (!q_order.empty() || !k_order.empty()) return true;
    std::vector<int64_t> counts(kBatch * heads);
    count_pairs(plan(), counts.data(), threads);
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        int64_t pairs = 0;
        for (int64_t i = 0; i < query_len; ++i)
          for (int64_t j = 0; j < key_len; ++j) pairs += attends(b, h, i, j, i, j);
        if (pairs != counts[b * heads + h]) return false;
      }
    return true;
  }

  bool attends(int64_t b, int64_t h, int64_t i, int64_t j, int64_t q_rank, int64_t k_rank) const {
    const int64_t kpos = j - key_start[b], qpos = query_start[b] + i, distance = std::abs(qpos - kpos);
    if (kpos < 0 || kpos >= key_count[b] || (causal && kpos > qpos) || distance >= limit) return false;
    if (kpos < sink[h] || distance < window[h]) return true;
    const int64_t blocks = (query_len + block_q - 1) / block_q, block = q_rank / block_q;
    const int64_t row = (b * heads + h) * blocks + block;
    const int64_t list = (b * heads + h) * ((blocks + column_group - 1) / column_group) + block / column_group;
    return std::binary_search(block_indices.begin() + block_indptr[row], block_indices.begin() + block_indptr[row + 1],
                              static_cast<int32_t>(k_rank / block_k)) ||
           std::binary_search(column_indices.begin() + column_indptr[list],
                              column_indices.begin() + column_indptr[list + 1], static_cast<int32_t>(j));
  }

  static int64_t rank(const std::vector<int32_t>& order, int64_t head, int64_t length, int64_t n) {
    if (order.empty()) return n;
    const auto begin = order.begin() + head * length;
    return std::find(begin, begin + length, static_cast<int32_t>(n)) - begin;
  }

  // The largest error of a sample of rows.
  double error() const {
    double worst = 0.0;
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t h = 0; h < kQueryHeads; ++h)
        for (int64_t i = 0; i < query_len; i += 1 + query_len / 8) worst = std::max(worst, row_error(b, h, i));
    return worst;
  }

  double row_error(int64_t b, int64_t h, int64_t i) const {
    const int64_t plan_head = h * heads / kQueryHeads, group = h * kGroups / kQueryHeads;
    const int64_t row = (b * kQueryHeads + h) * query_len + i;
    const int64_t q_rank = rank(q_order, b * heads + plan_head, query_len, i);
    std::vector<double> sums(dim);
    double total = sinks.empty() ? 0.0 : std::exp(double{sinks[h]});
    for (int64_t j = 0; j < key_len; ++j) {
      if (!attends(b, plan_head, i, j, q_rank, rank(k_order, b * heads + plan_head, key_len, j))) continue;
      const int64_t key = (b * kGroups + group) * key_len + j;
      double logit = 0.0;
      for (int d = 0; d < dim; ++d) logit += at(q, row, d) * at(k, key, d) * 0.2;
      total += std::exp(logit);
      for (int d = 0; d < dim; ++d) sums[d] += std::exp(logit) * at(v, key, d);
    }
    if (total == 0.0) {
      bool nothing = lse[row] == -std::numeric_limits<float>::infinity();
      for (int d = 0; d < dim; ++d) nothing = nothing && at(out, row, d) == 0.0;
      return nothing ? 0.0 : 1e9;
    }
    double worst = std::abs(lse[row] - std::log(total));
    for (int d = 0; d < dim; ++d) worst = std::max(worst, std::abs(at(out, row, d) - sums[d] / total));
    return worst == worst ? worst : 1e9;
  }
};

int failures = 0;

void check(const std::string& isa, unsigned seed, int threads) {
  Problem problem(seed);
  if (kernels_of(isa)->bf16_tiles) problem.convert(DType::kBFloat16);
  problem.run(*kernels_of(isa), threads);
  const double error = problem.error(), allowed = problem.dtype == DType::kBFloat16 ? 0.06 : 0.005;
  if (error > allowed) {
    std::printf("%s, seed %u: error %g exceeds %g\n", isa.c_str(), seed, error, allowed);
    ++failures;
  }
  if (problem.plan_is_right(*kernels_of(isa), threads) && problem.slashes_are_right(threads)) return;
  std::printf("%s, seed %u: planning is wrong\n", isa.c_str(), seed);
  ++failures;
}

// They share the kept workspace.
void check_calls_at_once(const std::string& isa) {
  const Kernels& kernels = *kernels_of(isa);
  std::vector<std::unique_ptr<Problem>> problems;
  for (unsigned n = 0; n < 4; ++n) {
    problems.push_back(std::make_unique<Problem>(1000 + n));
    if (kernels.bf16_tiles) problems.back()->convert(DType::kBFloat16);
  }
  std::vector<std::thread> callers;
  for (auto& problem : problems)
    callers.emplace_back([&problem, &kernels] {
      for (int n = 0; n < 5; ++n) problem->run(kernels, 2);
    });
  for (auto& caller : callers) caller.join();
  for (auto& problem : problems) {
    if (problem->error() <= 0.06) continue;
    std::printf("%s: calls at once disturb each other\n", isa.c_str());
    ++failures;
  }
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
