// Attention over the pairs that a plan names.
#pragma once

#include "kernels/job.h"
#include "plan/plan.h"
#include "plan/tensor.h"

namespace gossamer {

struct AttentionCall {
  TensorView q, k, v, out;
  float* lse;          // [batch, query heads, queries], contiguous
  const float* sinks;  // [query heads], or null
  float scale, softcap;  // softcap 0: none
  int threads;
};

void execute(const Kernels& kernels, const Plan& plan, const AttentionCall& call);

}  // namespace gossamer
