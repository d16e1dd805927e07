// The kernels of packed linear layers, of an instruction set.
#pragma once

#include "kernels/level_rows.h"
#include "kernels/sparse_rows.h"

namespace gossamer {
namespace {

template <class V, class Pairs = NoPairs>
const LinearKernels* linear_kernels() {
  static const LinearKernels kernels{Pairs::kThere,         Pairs::split,    sparse_sums<V, Pairs>,
                                     level_sums<V, Pairs>, sparse_whole<V>, level_whole<V>};
  return &kernels;
}

}  // namespace
}  // namespace gossamer
