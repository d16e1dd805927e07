// Inputs of linear layers in int8, for Python. The GIL is released while they are worked on.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "linear/quantised.h"
#include "plan/checks.h"
#include "plan/tensor.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;

namespace {

using Sizes = std::vector<int64_t>;

// [rows, columns] at an address, with the stride of rows in elements.
MatrixView matrix(uintptr_t address, const Sizes& shape, int64_t stride, DType dtype) {
  if (shape.size() != 2) throw std::invalid_argument("a matrix has two dimensions");
  check_range("rows", shape[0], 0, std::numeric_limits<int32_t>::max());
  check_range("columns", shape[1], 1, std::numeric_limits<int32_t>::max());
  return {pointer<char>(address), shape[0], shape[1], stride * element_size(dtype), dtype};
}

void make_quantised(QuantisedInputs* self, const std::string& isa, uintptr_t x, const Sizes& shape, int64_t stride, DType dtype,
                 float scale, const Given& out, int threads) {
  if (!(scale > 0.0f) || !std::isfinite(scale)) throw std::invalid_argument("a scale is above 0 and finite");
  const MatrixView view = matrix(x, shape, stride, dtype);
  check_count("numbers in uint8", out.second, checked_product({view.rows, view.columns}));
  new (self) QuantisedInputs(kernels_for(isa), view, scale, pointer<uint8_t>(out), threads);
}

void add_beyond(const QuantisedInputs& self, const Given& weight, const Given& by_row, uintptr_t out, const Sizes& shape,
                int64_t stride, DType dtype, int threads) {
  const MatrixView view = matrix(out, shape, stride, dtype);
  check_count("rows of outputs", view.rows, self.rows());
  check_count("numbers of the weight", weight.second, checked_product({view.columns, self.columns()}));
  check_count("scales of the weight", by_row.second, view.columns);
  self.add(pointer<int8_t>(weight), pointer<float>(by_row), view, threads);
}

}  // namespace

void bind_quantised(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<QuantisedInputs>(m, "QuantisedInputs")
      .def("__init__", &make_quantised, "isa"_a, "x"_a, nb::kw_only(), "shape"_a, "stride"_a, "dtype"_a, "scale"_a, "out"_a,
           "threads"_a, Release())
      .def_prop_ro("beyond", &QuantisedInputs::beyond)
      .def_prop_ro("lost", &QuantisedInputs::lost)
      .def("add", &add_beyond, nb::kw_only(), "weight"_a, "by_row"_a, "out"_a, "shape"_a, "stride"_a, "dtype"_a, "threads"_a,
          Release());
}
