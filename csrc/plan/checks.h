// Whether what Python hands over fits together. A plan and an extent were validated when they were made, but a tensor
// can be written afterwards, also by ways that leave no trace in it (an alias in numpy). So every call looks again at
// what costs nothing: sizes, the numbers of each batch row and head, both ends of the lists, and orders, which name
// rows of the output. What lies inside the lists is bounded where it is read (Lists::row, Worklist, Operands::pack).
// All throw std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "plan/plan.h"
#include "plan/tensor.h"
#include "plan/tokens.h"

namespace gossamer {

constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1;  // MOST of plan/integers.py

// The product of sizes that are not negative, where it fits 64 bits.
int64_t checked_product(std::initializer_list<int64_t> sizes);
void check_count(const char* name, int64_t given, int64_t expected);
void check_range(const char* name, int64_t given, int64_t least, int64_t most);

// Queries and keys (or pooled ones) of one call.
void check_heads(const TensorView& q, const Tokens& k);
// Numbers alone: what is counted is not negative, and sums stay far below 64 bits.
void check_numbers(const Extent& extent);
// Live queries and keys lie within tensors of so many tokens.
void check_queries(const Extent& extent, int64_t query_len);
void check_keys(const Extent& extent, int64_t key_len);
// The key blocks of all batch rows are at most `most`.
void check_key_blocks(const Grid& grid, int64_t most);

// Numbers of elements of a plan's arrays; 0 for an order that is absent.
struct PlanSizes {
  int64_t block_rows, column_rows;  // entries of the row pointers
  int64_t sink, window, q_order, k_order;
};
// All but the orders' numbers. Its extent was checked.
void check_plan(const Plan& plan, const PlanSizes& sizes);
// Orders are permutations: else a query row would be left unwritten. As long as one head's queries or keys, so that
// attention itself takes far longer.
void check_orders(const Plan& plan, int threads);

}  // namespace gossamer
