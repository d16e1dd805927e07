// Scores of tokens by labels and hashes, for Python. The GIL is released while they are computed.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <new>
#include <vector>

#include "plan/checks.h"
#include "planning/token_scores.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;

namespace {

using Sizes = std::vector<int64_t>;

// Of [batch, heads, rows, tokens] with strides of the first three, in elements.
void make_labels(LabelView* self, uintptr_t codes, const Sizes& shape, const Sizes& strides, LabelType type) {
  if (shape.size() != 4 || strides.size() != 3) throw std::invalid_argument("labels have four dimensions");
  for (const int64_t size : shape) check_range("a dimension of labels", size, 0, std::numeric_limits<int32_t>::max());
  const int64_t size = type == LabelType::kFloat32 ? 4 : type == LabelType::kBFloat16 || type == LabelType::kFloat16 ? 2 : 1;
  new (self) LabelView{pointer<char>(codes), shape[0],          shape[1],          shape[2],         shape[3],
                       strides[0] * size,    strides[1] * size, strides[2] * size, type};
}

void check_side(const LabelView& labels, const TensorView& side) {
  check_count("steps' batch", side.batch, labels.batch);
  check_count("heads of steps", side.heads, labels.heads);
  check_count("steps", side.tokens, labels.tokens);
  const bool behind = side.tokens < 2 || side.token_stride == element_size(side.dtype);
  if (side.dtype != DType::kBFloat16 || side.dim != 1 || !behind)
    throw std::invalid_argument("steps of labels are bf16, one behind the other");
}

void score_by_labels(const std::string& isa, const TensorView& queries, const LabelView& labels, const TensorView* low,
                     const TensorView* step, const Given& keys, uintptr_t out, int threads) {
  const bool coded = labels.type == LabelType::kUint8 || labels.type == LabelType::kUint4;
  check_count("the labels' batch", labels.batch, queries.batch);
  check_count("live keys", keys.second, queries.batch);
  check_range("heads of labels", labels.heads, 1, queries.heads);
  check_range("channels of a label", queries.dim, 1, 256);
  check_count("rows of labels", labels.rows, labels.type == LabelType::kUint4 ? ceil_div(queries.dim, 2) : queries.dim);
  if (queries.heads % labels.heads != 0) throw std::invalid_argument("query heads must share labels evenly");
  if (queries.dtype != DType::kFloat32 || queries.tokens != 1)
    throw std::invalid_argument("scores of tokens are of one query in fp32");
  if (coded != (low != nullptr) || coded != (step != nullptr))
    throw std::invalid_argument("labels in codes, and they alone, have lows and steps");
  if (coded) {
    check_side(labels, *low);
    check_side(labels, *step);
  }
  label_scores(kernels_for(isa), queries, labels, low, step, pointer<int64_t>(keys), pointer<float>(out), threads);
}

void count_equal_codes(const std::string& isa, const Given& queries, const Sizes& heads, uintptr_t codes,
                       const Sizes& shape, const Sizes& strides, const Given& out, int threads) {
  if (heads.size() != 2 || shape.size() != 3 || strides.size() != 2)
    throw std::invalid_argument("hashes are of query heads and heads, in tiles of tables");
  const int64_t batch = shape[0], tiles = shape[1], tables = shape[2];
  check_range("heads of hashes", heads[1], 1, heads[0]);
  check_range("tables", tables, 1, std::numeric_limits<int16_t>::max());
  if (heads[0] % heads[1] != 0) throw std::invalid_argument("query heads must share hashes evenly");
  check_count("codes of queries", queries.second, checked_product({batch, heads[0], tables}));
  check_count("counts", out.second, checked_product({batch, heads[0], tiles, kHashTile}));
  collisions(kernels_for(isa),
             {pointer<int16_t>(queries), batch, heads[0], tables, pointer<int16_t>(codes), heads[1], tiles, strides[0],
              strides[1]},
             pointer<int16_t>(out), threads);
}

}  // namespace

void bind_tokens(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::enum_<LabelType>(m, "LabelType")
      .value("float32", LabelType::kFloat32)
      .value("bfloat16", LabelType::kBFloat16)
      .value("float16", LabelType::kFloat16)
      .value("uint8", LabelType::kUint8)
      .value("uint4", LabelType::kUint4);
  nb::class_<LabelView>(m, "Labels")
      .def("__init__", &make_labels, nb::kw_only(), "codes"_a, "shape"_a, "strides"_a, "type"_a);
  m.def("label_scores", &score_by_labels, "isa"_a, "queries"_a, "labels"_a, nb::kw_only(), "low"_a.none(),
        "step"_a.none(), "keys"_a, "out"_a, "threads"_a, Release());
  m.def("collisions", &count_equal_codes, "isa"_a, nb::kw_only(), "queries"_a, "heads"_a, "codes"_a, "shape"_a,
        "strides"_a, "out"_a, "threads"_a, Release());
}
