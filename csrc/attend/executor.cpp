#include "attend/executor.h"

#include "attend/operands.h"
#include "attend/packed.h"
#include "attend/streamed.h"

namespace gossamer {

void execute(const Kernels& kernels, const Plan& plan, const AttentionCall& call) {
  if (plan.batch() == 0 || plan.query_len == 0 || plan.heads == 0) return;
  const Operands operands(kernels, plan, call);
  if (fits_streamed(operands))
    run_streamed(operands);
  else
    PackedExecution(operands).run();
}

}  // namespace gossamer
