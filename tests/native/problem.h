// Random calls with random plans, and what the definition says of them in double precision. All tensors are allocated to
// the byte, so that an access beyond one is seen; dead tokens are NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "attend/executor.h"
#include "attend/gradient.h"
#include "kernels/half.h"
#include "planning/planning.h"

namespace gossamer {

struct Random {
  explicit Random(unsigned seed) : engine(seed) {}
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine); }
  int64_t one_of(std::initializer_list<int64_t> values) { return *(values.begin() + below(values.size())); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine); }
  float normal() { return std::normal_distribution<float>()(engine); }
  std::mt19937 engine;
};

constexpr int64_t kBatch = 2, kQueryHeads = 4, kGroups = 2;
constexpr float kScale = 0.2f;
constexpr float kNoSkip = std::numeric_limits<float>::infinity();

class Problem {
 public:
  explicit Problem(unsigned seed, bool bf16_alone) : random(seed) {
    heads = random.chance(0.5) ? kGroups : kQueryHeads;
    query_len = random.one_of({1, 3, 70, 130});
    key_len = query_len + random.one_of({0, 1, 60, 900});
    dim = static_cast<int>(random.one_of({64, 16, 40}));
    dtype = bf16_alone ? DType::kBFloat16 : static_cast<DType>(random.below(3));
    offset = random.below(2);
    causal = !random.chance(0.25);
    limit = random.chance(0.25) ? 50 : kUnlimited;
    block_q = random.chance(0.5) ? 64 : 40;
    block_k = random.chance(0.5) ? 64 : 48;
    place_tokens();
    permute_queries = random.chance(0.2);
    permute_keys = random.chance(0.2);
    if (!is_permuted() && random.chance(0.4)) {
      pruned_mean = random.chance(0.7);
      if (block_k == kChunk && (!pruned_mean || random.chance(0.5))) skip = 0.5f;
    }
    draw_lists();
    if (permute_queries) q_order = orders(query_len);
    if (permute_keys) k_order = orders(key_len);
    if (random.chance(0.3))
      for (int64_t h = 0; h < kQueryHeads; ++h) sinks.push_back(random.normal());
    fill(q, kQueryHeads, query_len, [&](int64_t b, int64_t row) { return is_live_query(b, row); });
    for (auto* keys : {&k, &v})
      fill(*keys, kGroups, key_len, [&](int64_t b, int64_t slot) { return is_live_key(b, slot - key_start[b]); });
    fill(reaching, kQueryHeads, query_len, [&](int64_t b, int64_t row) { return is_live_query(b, row); });
    out.resize(q.size());
    lse.resize(kBatch * kQueryHeads * query_len);
  }

  TensorView view(std::vector<char>& tensor, int64_t tensor_heads, int64_t tokens) const {
    const int64_t row = dim * element();
    return {tensor.data() + offset * element(), kBatch, tensor_heads, tokens, dim, tensor_heads * tokens * row,
            tokens * row, row, dtype};
  }
  Extent extent() const {
    return {kBatch, query_start.data(), query_count.data(), key_start.data(), key_count.data(), causal, limit};
  }
  Grid grid() const { return {extent(), block_q, block_k}; }
  Plan plan() const {
    return {grid(), heads, query_len, key_len, query_blocks, column_group,
            lists_of(block_indptr, block_indices, key_blocks()), lists_of(column_indptr, column_indices, longest()),
            sink.data(), window.data(), q_order.empty() ? nullptr : q_order.data(), k_order.empty() ? nullptr : k_order.data(),
            pruned_mean, skip};
  }
  ScoreCall score_call(int threads) {
    return {view(q, kQueryHeads, query_len), view(k, kGroups, key_len), extent(), kScale, threads};
  }
  void attend(const Kernels& kernels, int threads) {
    const AttentionCall call{view(q, kQueryHeads, query_len), view(k, kGroups, key_len), view(v, kGroups, key_len),
                             view(out, kQueryHeads, query_len), lse.data(), sinks.empty() ? nullptr : sinks.data(),
                             kScale, 0.0f, threads};
    execute(kernels, plan(), call);
  }

  bool has_gradients() const { return !permute_keys && !has_blocks_alone(); }
  // Of q, k and v, one behind the other, and of the sinks; after attend().
  struct Gradients {
    std::vector<char> q, k, v;
    std::vector<float> sinks;

    bool operator==(const Gradients& other) const {
      return q == other.q && k == other.k && v == other.v && sinks == other.sinks;
    }
  };
  Gradients gradients(const Kernels& kernels, int threads) {
    Gradients found{std::vector<char>(q.size()), std::vector<char>(k.size()), std::vector<char>(v.size()),
                    std::vector<float>(sinks.size())};
    const AttentionCall call{view(q, kQueryHeads, query_len), view(k, kGroups, key_len), view(v, kGroups, key_len),
                             view(out, kQueryHeads, query_len), lse.data(), sinks.empty() ? nullptr : sinks.data(),
                             kScale, 0.0f, threads};
    find_gradients(kernels, plan(),
                   {call, view(reaching, kQueryHeads, query_len), nullptr, view(found.q, kQueryHeads, query_len),
                    view(found.k, kGroups, key_len), view(found.v, kGroups, key_len),
                    sinks.empty() ? nullptr : found.sinks.data()});
    return found;
  }
  // The largest error of the gradient of a sample of queries.
  double gradient_error(const Gradients& found) const {
    double worst = 0.0;
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t h = 0; h < kQueryHeads; ++h)
        for (int64_t row = 0; row < query_len; row += 1 + query_len / 8)
          worst = std::max(worst, query_gradient_error(found, b, h, row));
    return worst;
  }

  // Writes numbers into the lists that no valid plan has there, but for the ends of the row pointers.
  void spoil_lists() {
    const auto wrong = [&](int64_t some) {
      return random.one_of({-1, 0, some, random.below(2 * some + 2), (int64_t{1} << 31) - 1, -(int64_t{1} << 31)});
    };
    for (auto* indptr : {&block_indptr, &column_indptr}) {
      const int64_t entries = static_cast<int64_t>(indptr->size()), count = indptr->back();
      for (int64_t n = 0; n < 3 && entries > 2; ++n) (*indptr)[1 + random.below(entries - 2)] = wrong(count);
      if (random.chance(0.3))
        for (int64_t n = 1; n < entries - 1; ++n) (*indptr)[n] = random.below(count + 1);
      if (entries > 2 && random.chance(0.3)) (*indptr)[1] = std::numeric_limits<int64_t>::min();
      if (entries > 2 && random.chance(0.3)) (*indptr)[1] = std::numeric_limits<int64_t>::max();
    }
    for (auto* indices : {&block_indices, &column_indices}) {
      const int64_t count = static_cast<int64_t>(indices->size());
      for (int64_t n = 0; n < 3 && count > 0; ++n)
        (*indices)[random.below(count)] = static_cast<int32_t>(wrong(key_len));
      if (random.chance(0.3)) std::shuffle(indices->begin(), indices->end(), random.engine);
    }
  }

  // The largest error of a sample of rows; dead ones attend nothing.
  double error() const {
    double worst = 0.0;
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t h = 0; h < kQueryHeads; ++h)
        for (int64_t row = 0; row < query_len; row += 1 + query_len / 8) worst = std::max(worst, row_error(b, h, row));
    return worst;
  }

  // Pairs of a head of a plan without orders.
  int64_t pairs(int64_t b, int64_t head) const {
    int64_t count = 0;
    for (int64_t row = 0; row < query_len; ++row)
      for (int64_t key = 0; is_live_query(b, row) && key < key_count[b]; ++key)
        count += attends(b, head, query_start[b] + row, key);
    return count;
  }

  int64_t key_blocks() const { return ceil_div(permute_keys ? key_len : longest(), block_k); }
  int64_t longest() const { return *std::max_element(key_count.begin(), key_count.end()); }
  bool is_permuted() const { return permute_queries || permute_keys; }
  bool has_blocks_alone() const { return pruned_mean || skip < kNoSkip; }

  Random random;
  int64_t heads, query_len, key_len, block_q, block_k, column_group, query_blocks;
  int64_t offset;  // of the tensors in their storage, in elements: bf16 may lie at any even address
  int dim;
  DType dtype;
  bool causal, permute_queries, permute_keys, pruned_mean = false;
  float skip = kNoSkip;
  int64_t limit;
  std::vector<int64_t> query_start, query_count, key_start, key_count;
  std::vector<int64_t> block_indptr{0}, column_indptr{0};
  std::vector<int32_t> block_indices, column_indices, sink, window, q_order, k_order;
  std::vector<float> sinks;
  std::vector<char> q, k, v, out;
  std::vector<char> reaching;  // what reaches the output, for gradients
  std::vector<float> lse;

 private:
  int64_t element() const { return element_size(dtype); }

  static Lists lists_of(const std::vector<int64_t>& indptr, const std::vector<int32_t>& indices, int64_t most) {
    return {indptr.data(), indices.data(), static_cast<int64_t>(indices.size()), most};
  }

  // Padding on both sides of both, and queries that start anywhere.
  void place_tokens() {
    for (int64_t b = 0; b < kBatch; ++b) {
      key_start.push_back(random.chance(0.5) ? random.below(key_len) : 0);
      key_count.push_back(random.chance(0.5) ? random.below(key_len - key_start[b] + 1) : key_len - key_start[b]);
      query_start.push_back(random.chance(0.7) ? key_count[b] - query_len : random.below(key_len + 1) - query_len / 2);
      const int64_t room = query_len - std::min(query_len, std::max<int64_t>(-query_start[b], 0));
      query_count.push_back(random.chance(0.5) ? random.below(room + 1) : room);
    }
  }

  void draw_lists() {
    query_blocks = permute_queries ? ceil_div(query_len, block_q) : 0;
    for (int64_t b = 0; b < kBatch && !permute_queries; ++b)
      query_blocks = std::max(query_blocks, grid().row_blocks(b));
    column_group = random.chance(0.5) ? 1 : std::max<int64_t>(1, query_blocks);
    lists(query_blocks, key_blocks(), 0.3, block_indptr, block_indices);
    const bool more = !has_blocks_alone();
    lists(ceil_div(query_blocks, column_group), longest(), more && random.chance(0.5) ? 0.2 : 0.0, column_indptr,
          column_indices);
    for (int64_t h = 0; h < heads; ++h) {
      sink.push_back(static_cast<int32_t>(more && random.chance(0.5) ? random.below(70) : 0));
      window.push_back(static_cast<int32_t>(more && random.chance(0.5) ? random.below(150) : 0));
    }
  }

  void lists(int64_t rows, int64_t width, double share, std::vector<int64_t>& indptr, std::vector<int32_t>& indices) {
    for (int64_t r = 0; r < kBatch * heads * rows; ++r) {
      for (int64_t n = 0; n < width; ++n)
        if (random.chance(share)) indices.push_back(static_cast<int32_t>(n));
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
  }

  std::vector<int32_t> orders(int64_t length) {
    std::vector<int32_t> all;
    for (int64_t n = 0; n < kBatch * heads; ++n) {
      std::vector<int32_t> one(length);
      std::iota(one.begin(), one.end(), 0);
      // Everywhere, or nearby: then some chunks are attended whole.
      const int64_t segment = random.chance(0.5) ? std::max<int64_t>(1, length) : 100;
      for (int64_t begin = 0; begin < length; begin += segment)
        std::shuffle(one.begin() + begin, one.begin() + std::min(length, begin + segment), random.engine);
      all.insert(all.end(), one.begin(), one.end());
    }
    return all;
  }

  template <class IsLive>
  void fill(std::vector<char>& tensor, int64_t tensor_heads, int64_t tokens, const IsLive& is_live) {
    tensor.resize((kBatch * tensor_heads * tokens * dim + offset) * element());
    for (int64_t row = 0; row < kBatch * tensor_heads * tokens; ++row)
      for (int64_t d = 0; d < dim; ++d) {
        const bool live = is_live(row / tokens / tensor_heads, row % tokens);
        write(tensor, row * dim + d, live ? random.normal() : std::numeric_limits<float>::quiet_NaN());
      }
    tensor.shrink_to_fit();
  }

 public:
  void write(std::vector<char>& tensor, size_t n, float x) const {
    const uint16_t half = dtype == DType::kBFloat16 ? float_to_bf16(x) : float_to_fp16(x);
    if (dtype == DType::kFloat32)
      std::memcpy(&tensor[(n + offset) * 4], &x, 4);
    else
      std::memcpy(&tensor[(n + offset) * 2], &half, 2);
  }

 private:
  double read(const std::vector<char>& tensor, int64_t row, int64_t d) const {
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

  bool is_live_query(int64_t b, int64_t row) const {
    const int64_t query = row - extent().first_query(b);
    return query >= 0 && query < query_count[b];
  }
  bool is_live_key(int64_t b, int64_t position) const { return position >= 0 && position < key_count[b]; }

  static int64_t rank(const std::vector<int32_t>& order, int64_t head, int64_t length, int64_t n) {
    const auto begin = order.begin() + head * length;
    return std::find(begin, begin + length, static_cast<int32_t>(n)) - begin;
  }

  // Of live positions.
  bool attends(int64_t b, int64_t head, int64_t query, int64_t key) const {
    const int64_t distance = std::abs(query - key), plan_head = b * heads + head;
    if ((causal && key > query) || distance >= limit) return false;
    if (key < sink[head] || distance < window[head]) return true;
    const int64_t ordinal = query - extent().first_position(b);
    const int64_t m = permute_queries ? rank(q_order, plan_head, query_len, ordinal) / block_q
                                      : query / block_q - grid().first_block(b);
    const int64_t key_rank = permute_keys ? rank(k_order, plan_head, key_len, key) : key;
    const Plan own = plan();
    const Row blocks = own.blocks.row(own.block_list(b, head, m));
    const Row columns = own.columns.row(own.column_list(b, head, m));
    return std::binary_search(blocks.begin(), blocks.end(), static_cast<int32_t>(key_rank / block_k)) ||
           std::binary_search(columns.begin(), columns.end(), static_cast<int32_t>(key));
  }

  // Whether each query of a query block may attend each live key of a block: its first and last query, and the first
  // and last key, decide for all.
  bool sees_whole(int64_t b, int64_t query, int64_t block) const {
    const int64_t first_position = extent().first_position(b), begin = query / block_q * block_q;
    const int64_t first = std::max(begin, first_position);
    const int64_t last = std::min(begin + block_q, first_position + query_count[b]) - 1;
    const int64_t low = block * block_k, high = std::min(low + block_k, key_count[b]) - 1;
    const int64_t farthest = std::max(last - low, high - first);
    return farthest < limit && (!causal || high <= first);
  }

  double logit(int64_t query_row, const std::vector<double>& key) const {
    double sum = 0.0;
    for (int d = 0; d < dim; ++d) sum += read(q, query_row, d) * key[d] * kScale;
    return sum;
  }

  // Mean of the rows [first, first + count) of keys or values.
  std::vector<double> mean(const std::vector<char>& tensor, int64_t first, int64_t count) const {
    std::vector<double> sums(dim);
    for (int64_t n = 0; n < count; ++n)
      for (int d = 0; d < dim; ++d) sums[d] += read(tensor, first + n, d) / static_cast<double>(count);
    return sums;
  }

  // Logits of a live query and the rows of keys and values that they are for, some of which are means.
  struct Term {
    double logit;
    int64_t first_row, count;
  };

  // False where rounding decides whether a tile is left out.
  bool list_terms(int64_t b, int64_t plan_head, int64_t query_row, int64_t query, int64_t first_row,
                  std::vector<Term>& terms) const {
    double running = -std::numeric_limits<double>::infinity();
    for (int64_t tile = 0; tile * kChunk < key_count[b]; ++tile) {
      std::vector<Term> own;
      double largest = -std::numeric_limits<double>::infinity();
      for (int64_t key = tile * kChunk; key < std::min((tile + 1) * kChunk, key_count[b]); ++key) {
        if (!attends(b, plan_head, query, key)) continue;
        own.push_back({logit(query_row, mean(k, first_row + key, 1)), first_row + key, 1});
        largest = std::max(largest, own.back().logit);
      }
      if (skip < kNoSkip && std::abs(largest - (running - skip)) < 1e-3) return false;
      if (largest < running - skip) continue;
      running = std::max(running, largest);
      terms.insert(terms.end(), own.begin(), own.end());
    }
    const Plan own = plan();
    const Row listed = own.blocks.row(own.block_list(b, plan_head, query / block_q - grid().first_block(b)));
    for (int64_t block = 0; pruned_mean && block * block_k < key_count[b]; ++block) {
      if (std::binary_search(listed.begin(), listed.end(), static_cast<int32_t>(block)) || !sees_whole(b, query, block))
        continue;
      const int64_t first = first_row + block * block_k, count = std::min(block_k, key_count[b] - block * block_k);
      terms.push_back({logit(query_row, mean(k, first, count)) + std::log(static_cast<double>(count)), first, count});
    }
    return true;
  }

  double row_error(int64_t b, int64_t h, int64_t row) const {
    const int64_t plan_head = h * heads / kQueryHeads, group = h * kGroups / kQueryHeads;
    const int64_t query_row = (b * kQueryHeads + h) * query_len + row;
    const int64_t first_row = (b * kGroups + group) * key_len + key_start[b];
    std::vector<Term> terms;
    if (is_live_query(b, row) && !list_terms(b, plan_head, query_row, query_start[b] + row, first_row, terms))
      return 0.0;
    std::vector<double> sums(dim);
    double total = sinks.empty() ? 0.0 : std::exp(double{sinks[h]});
    for (const Term& term : terms) {
      total += std::exp(term.logit);
      const std::vector<double> value = mean(v, term.first_row, term.count);
      for (int d = 0; d < dim; ++d) sums[d] += std::exp(term.logit) * value[d];
    }
    if (total == 0.0) {
      bool nothing = lse[query_row] == -std::numeric_limits<float>::infinity();
      for (int d = 0; d < dim; ++d) nothing = nothing && read(out, query_row, d) == 0.0;
      return nothing ? 0.0 : 1e9;
    }
    double worst = std::abs(lse[query_row] - std::log(total));
    for (int d = 0; d < dim; ++d) worst = std::max(worst, std::abs(read(out, query_row, d) - sums[d] / total));
    return worst == worst ? worst : 1e9;
  }

  double query_gradient_error(const Gradients& found, int64_t b, int64_t h, int64_t row) const {
    const int64_t plan_head = h * heads / kQueryHeads, group = h * kGroups / kQueryHeads;
    const int64_t query_row = (b * kQueryHeads + h) * query_len + row;
    const int64_t first_row = (b * kGroups + group) * key_len + key_start[b];
    std::vector<Term> terms;
    if (is_live_query(b, row)) list_terms(b, plan_head, query_row, query_start[b] + row, first_row, terms);
    double total = sinks.empty() ? 0.0 : std::exp(double{sinks[h]}), level = 0.0;
    for (const Term& term : terms) total += std::exp(term.logit);
    std::vector<double> slopes, expected(dim);
    for (const Term& term : terms) {
      double slope = 0.0;
      for (int d = 0; d < dim; ++d) slope += read(reaching, query_row, d) * read(v, term.first_row, d);
      slopes.push_back(slope);
      level += std::exp(term.logit) / total * slope;
    }
    for (size_t n = 0; n < terms.size(); ++n)
      for (int d = 0; d < dim; ++d)
        expected[d] += kScale * std::exp(terms[n].logit) / total * (slopes[n] - level) * read(k, terms[n].first_row, d);
    double worst = 0.0;
    for (int d = 0; d < dim; ++d) worst = std::max(worst, std::abs(read(found.q, query_row, d) - expected[d]));
    return worst == worst ? worst : 1e9;
  }
};

}  // namespace gossamer
