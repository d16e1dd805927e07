// Packed weights of linear layers, for Python. The GIL is released while a product is computed.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <new>
#include <vector>

#include "linear/linear.h"
#include "plan/checks.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;

namespace {

using Sizes = std::vector<int64_t>;

void check_shape(const Sizes& shape) {
  check_count("dimensions of a weight", static_cast<int64_t>(shape.size()), 2);
  for (const int64_t size : shape) check_range("a dimension of a weight", size, 1, std::numeric_limits<int32_t>::max() - 256);
}

void make_sparse(SparseWeight* self, const Sizes& shape, const Given& bitmap, const Given& values, ValueType type,
                 const Given& starts, const Given& scale) {
  check_shape(shape);
  const int64_t rows = shape[0], columns = shape[1];
  check_count("bytes of a bitmap", bitmap.second, checked_product({rows, (columns + 7) / 8}));
  check_count("starts of rows", starts.second, rows + 1);
  check_range("numbers of a sparse weight", values.second, 0, checked_product({rows, columns}));
  if (scale.second != 0) check_count("scales of rows", scale.second, rows);
  if ((type == ValueType::kInt8) != (scale.second != 0))
    throw std::invalid_argument("numbers in int8, and they alone, have a scale a row");
  new (self) SparseWeight{rows, columns, pointer<uint8_t>(bitmap), pointer<char>(values), type,
                          values.second, pointer<int64_t>(starts), pointer<float>(scale)};
}

void make_levels(LevelWeight* self, const Sizes& shape, int64_t block, const Given& codes, const Given& levels,
                 const Given& salient, bool rounded) {
  check_shape(shape);
  const int64_t rows = shape[0], columns = shape[1];
  check_range("columns of a block", block, 1, std::numeric_limits<int32_t>::max() - 256);
  const LevelWeight made{rows, columns, block, pointer<uint8_t>(codes), pointer<uint16_t>(levels),
                         pointer<uint8_t>(salient), rounded};
  check_range("slots of a row", made.slots(), 1, std::numeric_limits<int32_t>::max());
  check_count("bytes of codes", codes.second, checked_product({rows, made.slots() / 4}));
  check_count("levels", levels.second, checked_product({rows, made.blocks(), kLevels}));
  check_count("bytes of salient columns", salient.second, made.slots() / 8);
  new (self) LevelWeight(made);
}

Matrix matrix(uintptr_t data, int64_t rows, int64_t columns, int64_t stride, DType dtype) {
  return {pointer<char>(data), rows, columns, stride * (dtype == DType::kFloat32 ? 4 : 2), dtype};
}

// inputs [n, columns] with a stride from row to row, in elements; out [n, rows] and bias [rows], contiguous.
template <class Weight>
void product(const std::string& isa, const Weight& weight, const Given& inputs, int64_t stride, const Given& bias,
             const Given& out, DType dtype, int threads) {
  const Kernels& kernels = kernels_for(isa);
  const int64_t count = inputs.second / weight.columns;
  check_count("inputs", inputs.second, checked_product({count, weight.columns}));
  check_count("outputs", out.second, checked_product({count, weight.rows}));
  check_range("rows of inputs", count, 0, 4096);
  if (count > 1) check_range("stride of inputs", stride, 0, std::numeric_limits<int64_t>::max() / 8192);
  if (bias.second != 0) check_count("numbers of a bias", bias.second, weight.rows);
  if (count == 0) return;
  const nb::gil_scoped_release release;
  multiply(kernels, weight, matrix(inputs.first, count, weight.columns, stride, dtype), pointer<char>(bias),
           matrix(out.first, count, weight.rows, weight.rows, dtype), threads);
}

// Rows of the weight from `first` on, as many as out [n, columns] has.
template <class Weight>
void whole(const std::string& isa, const Weight& weight, int64_t first, const Given& out, DType dtype, int threads) {
  const Kernels& kernels = kernels_for(isa);
  const int64_t count = out.second / weight.columns;
  check_count("numbers of whole rows", out.second, checked_product({count, weight.columns}));
  check_range("the first row", first, 0, weight.rows);
  check_range("whole rows", count, 0, weight.rows - first);
  if (count == 0) return;
  const nb::gil_scoped_release release;
  make_whole(kernels, weight, first, matrix(out.first, count, weight.columns, weight.columns, dtype), threads);
}

template <class Weight>
void bind_weight(nb::module_& m) {
  m.def("multiply", &product<Weight>, "isa"_a, "weight"_a, nb::kw_only(), "inputs"_a, "stride"_a, "bias"_a, "out"_a,
        "dtype"_a, "threads"_a);
  m.def("make_whole", &whole<Weight>, "isa"_a, "weight"_a, nb::kw_only(), "first"_a, "out"_a, "dtype"_a, "threads"_a);
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::enum_<ValueType>(m, "ValueType")
      .value("float32", ValueType::kFloat32)
      .value("bfloat16", ValueType::kBFloat16)
      .value("float16", ValueType::kFloat16)
      .value("int8", ValueType::kInt8);
  nb::class_<SparseWeight>(m, "SparseWeight")
      .def("__init__", &make_sparse, nb::kw_only(), "shape"_a, "bitmap"_a, "values"_a, "type"_a, "starts"_a, "scale"_a);
  nb::class_<LevelWeight>(m, "LevelWeight")
      .def("__init__", &make_levels, nb::kw_only(), "shape"_a, "block"_a, "codes"_a, "levels"_a, "salient"_a,
           "rounded"_a);
  bind_weight<SparseWeight>(m);
  bind_weight<LevelWeight>(m);
}
