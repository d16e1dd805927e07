#include "plan/checks.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/parallel.h"

namespace gossamer {
namespace {

// What whoever wrote a plan's tensors has to do.
constexpr char kRemedy[] = "; make a new plan instead of writing to the tensors of one";

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string in_batch_row(int64_t b) { return " in batch row " + std::to_string(b); }

void check_lists(const char* name, const Lists& lists, int64_t entries, int64_t rows) {
  const std::string indptr = std::string("SparsePlan.") + name + "_indptr";
  check_count(indptr.c_str(), entries, rows + 1);
  if (lists.indptr[0] != 0 || lists.indptr[rows] != lists.count)
    refuse(indptr + " must rise from 0 to the number of indices (" + std::to_string(lists.count) + "), got first " +
           std::to_string(lists.indptr[0]) + ", last " + std::to_string(lists.indptr[rows]) + kRemedy);
}

void check_bands(const char* name, const int32_t* band, int64_t given, int64_t heads) {
  check_count(name, given, heads);
  for (int64_t h = 0; h < heads; ++h) check_range(name, band[h], 0, kMostTokens);
}

void check_order(const char* name, const int32_t* order, int64_t rows, int64_t length, int threads) {
  run_parallel(threads, rows, [&](int, int64_t row) {
    std::vector<bool> named(static_cast<size_t>(length));
    for (int64_t n = 0; n < length; ++n) {
      const int64_t number = order[row * length + n];
      if (number < 0 || number >= length || named[static_cast<size_t>(number)])
        refuse(std::string(name) + " must be a permutation of 0.." + std::to_string(length - 1) +
               " in every row, got " + std::to_string(number) + " at rank " + std::to_string(n) + kRemedy);
      named[static_cast<size_t>(number)] = true;
    }
  });
}

// Attributes are for plans of blocks alone.
void check_attributes(const Plan& plan) {
  const std::string name = plan.pruned_mean ? "SparsePlan.pruned_mean" : "SparsePlan.skip";
  if (!plan.pruned_mean && !plan.skips()) return;
  if (!(plan.skip >= 0)) refuse("SparsePlan.skip must be at least 0, got " + std::to_string(plan.skip));
  if (plan.skips() && plan.grid.block_k % kChunk != 0)
    refuse("SparsePlan.skip needs a block_k that is a multiple of " + std::to_string(kChunk) + ", got " +
           std::to_string(plan.grid.block_k));
  bool alone = !plan.permuted() && plan.columns.count == 0;
  for (int64_t h = 0; h < plan.heads; ++h) alone = alone && plan.sink[h] == 0 && plan.window[h] == 0;
  if (!alone) refuse(name + " is for plans of blocks alone, and this one has columns, bands or an order" + kRemedy);
}

}  // namespace

int64_t checked_product(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (size < 0 || __builtin_mul_overflow(product, size, &product)) refuse("the sizes of a tensor overflow 64 bits");
  return product;
}

void check_count(const char* name, int64_t given, int64_t expected) {
  if (given != expected)
    refuse(std::string(name) + " must have " + std::to_string(expected) + " elements here, got " +
           std::to_string(given));
}

void check_range(const char* name, int64_t given, int64_t least, int64_t most) {
  if (given < least || given > most)
    refuse(std::string(name) + " must be at least " + std::to_string(least) + " and at most " + std::to_string(most) +
           ", got " + std::to_string(given));
}

void check_heads(const TensorView& q, const Tokens& k) {
  check_count("k's batch", k.batch, q.batch);
  check_count("k's dimensions", k.dim, q.dim);
  if (k.heads == 0 || q.heads % k.heads != 0)
    refuse("the " + std::to_string(q.heads) + " query heads must be a multiple of the " + std::to_string(k.heads) +
           " key/value heads");
  if (k.dtype != q.dtype) refuse("k must have q's dtype; convert one of them");
}

void check_numbers(const Extent& extent) {
  for (int64_t b = 0; b < extent.batch; ++b) {
    check_range("Extent.query_start", extent.query_start[b], -kMostTokens, kMostTokens);
    check_range("Extent.query_count", extent.query_count[b], 0, kMostTokens - extent.first_position(b));
    check_range("Extent.key_start", extent.key_start[b], 0, kMostTokens);
    check_range("Extent.key_count", extent.key_count[b], 0, kMostTokens);
  }
}

void check_queries(const Extent& extent, int64_t query_len) {
  for (int64_t b = 0; b < extent.batch; ++b) {
    const int64_t past = extent.first_query(b) + extent.query_count[b];
    if (extent.query_count[b] > 0 && past > query_len)
      refuse("the extent names " + std::to_string(past) + " queries" + in_batch_row(b) +
             ", dead ones before them included, but there are " + std::to_string(query_len));
  }
}

void check_keys(const Extent& extent, int64_t key_len) {
  for (int64_t b = 0; b < extent.batch; ++b) {
    const int64_t past = extent.key_start[b] + extent.key_count[b];
    if (extent.key_count[b] > 0 && past > key_len)
      refuse("the extent names " + std::to_string(past) + " keys" + in_batch_row(b) +
             ", dead ones before them included, but there are " + std::to_string(key_len));
  }
}

void check_key_blocks(const Grid& grid, int64_t most) {
  for (int64_t b = 0; b < grid.extent.batch; ++b)
    if (ceil_div(grid.extent.key_count[b], grid.block_k) > most)
      refuse("the extent has " + std::to_string(grid.extent.key_count[b]) + " keys" + in_batch_row(b) +
             ", more than " + std::to_string(most) + " blocks of " + std::to_string(grid.block_k));
}

void check_plan(const Plan& plan, const PlanSizes& sizes) {
  check_range("SparsePlan.heads", plan.heads, 1, kMostTokens);
  check_range("SparsePlan.query_len", plan.query_len, 0, kMostTokens);
  check_range("SparsePlan.key_len", plan.key_len, 0, kMostTokens);
  check_range("SparsePlan.num_query_blocks", plan.query_blocks, 0, kMostTokens);
  check_range("SparsePlan.column_group", plan.column_group, 1, kMostTokens);
  check_queries(plan.extent(), plan.query_len);
  check_keys(plan.extent(), plan.key_len);
  int64_t most_blocks = plan.q_order != nullptr ? ceil_div(plan.query_len, plan.grid.block_q) : 0;
  if (plan.q_order == nullptr)
    for (int64_t b = 0; b < plan.batch(); ++b) most_blocks = std::max(most_blocks, plan.row_blocks(b));
  if (plan.query_blocks < most_blocks)
    refuse("the plan has lists for " + std::to_string(plan.query_blocks) + " query blocks, but its extent has " +
           std::to_string(most_blocks) + kRemedy);
  const int64_t rows = checked_product({plan.batch(), plan.heads});
  check_lists("block", plan.blocks, sizes.block_rows, checked_product({rows, plan.query_blocks}));
  check_lists("column", plan.columns, sizes.column_rows, checked_product({rows, plan.column_groups()}));
  check_bands("SparsePlan.sink", plan.sink, sizes.sink, plan.heads);
  check_bands("SparsePlan.window", plan.window, sizes.window, plan.heads);
  if (plan.q_order != nullptr)
    check_count("SparsePlan.q_order", sizes.q_order, checked_product({rows, plan.query_len}));
  if (plan.k_order != nullptr) check_count("SparsePlan.k_order", sizes.k_order, checked_product({rows, plan.key_len}));
  check_attributes(plan);
}

void check_orders(const Plan& plan, int threads) {
  const int64_t rows = plan.batch() * plan.heads;
  if (plan.q_order != nullptr) check_order("SparsePlan.q_order", plan.q_order, rows, plan.query_len, threads);
  if (plan.k_order != nullptr) check_order("SparsePlan.k_order", plan.k_order, rows, plan.key_len, threads);
}

}  // namespace gossamer
