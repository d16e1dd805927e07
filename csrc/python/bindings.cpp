// The module: nothing of torch is linked. The GIL is released while a kernel runs.
#include "python/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "attend/executor.h"
#include "attend/gradient.h"
#include "plan/checks.h"
#include "runtime/workspace.h"

namespace nb = nanobind;
using namespace gossamer;

namespace {

// Kernels for a call that fits a plan.
const Kernels& fitting(const std::string& isa, const Plan& plan, const AttentionCall& call) {
  const Kernels& kernels = kernels_for(isa);
  if (kernels.bf16_tiles && call.q.dtype != DType::kBFloat16)
    throw std::invalid_argument(isa + " computes in bf16 and takes nothing else");
  check_count("the plan's batch", plan.batch(), call.q.batch);
  check_count("the plan's queries", plan.query_len, call.q.tokens);
  check_count("the plan's keys", plan.key_len, call.k.tokens);
  if (plan.heads != call.q.heads && plan.heads != call.k.heads)
    throw std::invalid_argument("the plan's heads must be q's or k's, got " + std::to_string(plan.heads));
  return kernels;
}

void attend(const std::string& isa, const Plan& plan, const AttentionCall& call) {
  const Kernels& kernels = fitting(isa, plan, call);
  if (call.rows != nullptr && (plan.permuted() || plan.pruned_mean || plan.skips()))
    throw std::invalid_argument("some rows are attended by plans without orders and attributes");
  nb::gil_scoped_release release;
  check_orders(plan, call.threads);
  execute(kernels, plan, call);
}

void attend_backward(const std::string& isa, const Plan& plan, const GradientCall& call) {
  const Kernels& kernels = fitting(isa, plan, call.attended);
  if (plan.k_order != nullptr || plan.pruned_mean || plan.skips())
    throw std::invalid_argument("gradients are of plans without an order of keys and attributes");
  nb::gil_scoped_release release;
  check_orders(plan, call.attended.threads);
  find_gradients(kernels, plan, call);
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "Sparse attention kernels for CPUs; see gossamer.backends.cpu";
  bind_views(m);
  bind_planning(m);
  bind_tokens(m);
  bind_quantised(m);
  bind_linear(m);
  m.def("attend", &attend);
  m.def("attend_backward", &attend_backward);
  m.def("prefer_huge_pages",
        [](uintptr_t begin, int64_t bytes) { prefer_huge_pages(pointer<void>(begin), bytes); });
  m.def("supported", &supported_isas,
        "Instruction sets of this build that this machine runs: the oldest first, and last amx_emulated, for tests");
  m.def("prefers_bf16_dot", &prefers_bf16_dot, "Whether vdpbf16ps beats fp32 FMA here (AMD)");
  m.def("has_openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  });
}
