// Attention over the pairs that a plan names.
#pragma once

#include "kernels/job.h"
#include "plan/plan.h"
#include "plan/tensor.h"
#include "plan/tokens.h"

namespace gossamer {

struct AttentionCall {
  TensorView q;
  Tokens k, v;
  TensorView out;
  float* lse;          // [batch, query heads, rows of out], contiguous
  const float* sinks;  // [query heads], or null
  float scale, softcap;  // softcap 0: none
  int threads;
  const int64_t* rows = nullptr;  // [batch, rows of out]: query rows; null: all of them, one after the other
};

void execute(const Kernels& kernels, const Plan& plan, const AttentionCall& call);

}  // namespace gossamer
