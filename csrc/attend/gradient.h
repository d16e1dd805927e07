// Gradients of attention over the pairs that a plan names.
#pragma once

#include "attend/executor.h"

namespace gossamer {

struct GradientCall {
  AttentionCall attended;    // with its output and LSE
  TensorView reaching;       // what reaches the output
  const float* reaching_lse;  // [batch, query heads, queries], or null: nothing
  // Zeros, where the gradients go; without data where none is asked for.
  TensorView queries, keys, values;
  float* sinks;  // [query heads], or null
};

// Of plans whose keys are not ordered and that have no attributes. Sums are taken in an order that the plan fixes, so
// that they do not depend on the threads: each strip of keys is summed up by one thread, over queries in their order;
// and strips add to the sums of a query in theirs, each after the one before it.
void find_gradients(const Kernels& kernels, const Plan& plan, const GradientCall& call);

}  // namespace gossamer
