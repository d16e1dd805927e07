#include "attend/executor.h"

#include <algorithm>
#include <vector>

#include "attend/chosen_rows.h"
#include "attend/operands.h"
#include "attend/packed.h"
#include "attend/streamed.h"
#include "runtime/parallel.h"

namespace gossamer {
namespace {

// Their memory is never read.
void clear_dead_rows(const Operands& operands) {
  const Plan& plan = operands.plan;
  const Extent& extent = plan.extent();
  const int64_t heads = operands.call.q.heads;
  bool any = false;
  for (int64_t b = 0; b < plan.batch(); ++b) any = any || extent.query_count[b] < plan.query_len;
  if (!any) return;
  run_parallel(operands.call.threads, plan.batch() * heads, [&](int, int64_t n) {
    const int64_t b = n / heads, first = extent.first_query(b), past = first + extent.query_count[b];
    for (int64_t row = 0; row < std::min(first, plan.query_len); ++row) operands.clear_row(b, n % heads, row);
    for (int64_t row = past; row < plan.query_len; ++row) operands.clear_row(b, n % heads, row);
  });
}

}  // namespace

void execute(const Kernels& kernels, const Plan& plan, const AttentionCall& call) {
  if (plan.batch() == 0 || plan.query_len == 0 || plan.heads == 0) return;
  const Operands operands(kernels, plan, call);
  if (call.rows != nullptr) return run_chosen_rows(operands);
  clear_dead_rows(operands);
  // Each batch row decides by itself, for the two differ in the order of their sums.
  std::vector<int64_t> streamed, packed;
  for (int64_t b = 0; b < plan.batch(); ++b) {
    if (plan.extent().query_count[b] == 0) continue;
    (fits_streamed(operands, b) ? streamed : packed).push_back(b);
  }
  if (!streamed.empty()) run_streamed(operands, streamed);
  if (!packed.empty()) PackedExecution(operands, packed).run();
}

}  // namespace gossamer
