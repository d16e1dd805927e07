// What both binding files share: addresses and strides from Python as pointers and views.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "attend/executor.h"
#include "runtime/cpu_features.h"

void bind_planning(nanobind::module_& m);

namespace gossamer {

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline TensorView view(uintptr_t data, const Sizes& strides) {
  if (strides.size() != 4 || strides[3] != 1) throw std::invalid_argument("four strides, the last of them 1");
  return {at<char>(data), {strides[0], strides[1], strides[2]}};
}

inline const Kernels& kernels_for(const std::string& isa) {
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) throw std::invalid_argument("this build has no kernels for " + isa);
  return *kernels;
}

}  // namespace gossamer
