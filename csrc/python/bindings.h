// What the binding files share: addresses from Python as pointers, instruction sets by name.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/cpu_features.h"

void bind_views(nanobind::module_& m);
void bind_quantised(nanobind::module_& m);
void bind_planning(nanobind::module_& m);
void bind_tokens(nanobind::module_& m);
void bind_linear(nanobind::module_& m);

namespace gossamer {

// The caller keeps what the address names alive for as long as a call runs. 0 is null.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// An array: its address, and how many elements it has.
using Given = std::pair<uintptr_t, int64_t>;

template <class T>
T* pointer(const Given& array) {
  if (array.second == 0) return nullptr;
  // A tensor whose storage was taken away has its elements, and no address.
  if (array.first == 0) throw std::invalid_argument("a tensor has lost its memory; make a new plan");
  return pointer<T>(array.first);
}

inline const Kernels& kernels_for(const std::string& isa) {
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) throw std::invalid_argument("this build has no kernels for " + isa);
  return *kernels;
}

}  // namespace gossamer
