// Tensors, extents, plans and calls as Python makes them: of addresses and sizes, all by name.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>

#include <array>
#include <new>

#include "attend/executor.h"
#include "plan/plan.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;

namespace {

using Four = std::array<int64_t, 4>;

void make_tensor(TensorView* self, uintptr_t data, const Four& shape, const Four& strides, DType dtype) {
  // Where a dimension has one element, torch gives it any stride.
  if (strides[3] != 1 && shape[3] > 1) throw std::invalid_argument("the last dimension must be contiguous");
  const int64_t element = element_size(dtype);
  new (self) TensorView{pointer<char>(data),  shape[0],
                        shape[1],             shape[2],
                        static_cast<int>(shape[3]), strides[0] * element,
                        strides[1] * element, strides[2] * element,
                        dtype};
}

void make_extent(Extent* self, int64_t batch, uintptr_t query_start, uintptr_t query_count, uintptr_t key_start,
                 uintptr_t key_count, bool causal, std::optional<int64_t> limit) {
  new (self) Extent{batch,
                    pointer<int64_t>(query_start),
                    pointer<int64_t>(query_count),
                    pointer<int64_t>(key_start),
                    pointer<int64_t>(key_count),
                    causal,
                    limit.value_or(kUnlimited)};
}

void make_grid(Grid* self, const Extent& extent, int64_t block_q, int64_t block_k) {
  new (self) Grid{extent, block_q, block_k};
}

void make_plan(Plan* self, const Grid& grid, int64_t heads, int64_t query_len, int64_t key_len, int64_t query_blocks,
               int64_t column_group, uintptr_t block_indptr, uintptr_t block_indices, uintptr_t column_indptr,
               uintptr_t column_indices, uintptr_t sink, uintptr_t window, uintptr_t q_order, uintptr_t k_order) {
  new (self) Plan{grid,
                  heads,
                  query_len,
                  key_len,
                  query_blocks,
                  column_group,
                  {pointer<int64_t>(block_indptr), pointer<int32_t>(block_indices)},
                  {pointer<int64_t>(column_indptr), pointer<int32_t>(column_indices)},
                  pointer<int32_t>(sink),
                  pointer<int32_t>(window),
                  pointer<int32_t>(q_order),
                  pointer<int32_t>(k_order)};
}

void make_attention_call(AttentionCall* self, const TensorView& q, const TensorView& k, const TensorView& v,
                         const TensorView& out, uintptr_t lse, uintptr_t sinks, float scale, float softcap,
                         int threads) {
  new (self) AttentionCall{q, k, v, out, pointer<float>(lse), pointer<float>(sinks), scale, softcap, threads};
}

}  // namespace

void bind_views(nb::module_& m) {
  nb::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  nb::class_<TensorView>(m, "Tensor")
      .def("__init__", &make_tensor, "data"_a, "shape"_a, "strides"_a, "dtype"_a);
  nb::class_<Extent>(m, "Extent")
      .def("__init__", &make_extent, nb::kw_only(), "batch"_a, "query_start"_a, "query_count"_a, "key_start"_a,
           "key_count"_a, "causal"_a, "limit"_a.none());
  nb::class_<Grid>(m, "Grid").def("__init__", &make_grid, "extent"_a, nb::kw_only(), "block_q"_a, "block_k"_a);
  nb::class_<Plan>(m, "Plan")
      .def("__init__", &make_plan, "grid"_a, nb::kw_only(), "heads"_a, "query_len"_a, "key_len"_a, "query_blocks"_a,
           "column_group"_a, "block_indptr"_a, "block_indices"_a, "column_indptr"_a, "column_indices"_a, "sink"_a,
           "window"_a, "q_order"_a, "k_order"_a);
  nb::class_<AttentionCall>(m, "AttentionCall")
      .def("__init__", &make_attention_call, nb::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "sinks"_a,
           "scale"_a, "softcap"_a, "threads"_a);
}
