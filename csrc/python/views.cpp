// Tensors, extents, plans and calls as Python makes them: of addresses and sizes, all by name. Each is checked as it is
// made, so that no kernel sees one that does not fit together.
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <array>
#include <limits>
#include <new>

#include "attend/executor.h"
#include "attend/gradient.h"
#include "plan/checks.h"
#include "plan/plan.h"
#include "plan/tokens.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;

namespace {

using Four = std::array<int64_t, 4>;

void make_tensor(TensorView* self, uintptr_t data, const Four& shape, const Four& strides, DType dtype) {
  // Where a dimension has one element, torch gives it any stride.
  if (strides[3] != 1 && shape[3] > 1) throw std::invalid_argument("the last dimension must be contiguous");
  check_range("the head dimension", shape[3], 1, kMaxHeadDim);
  const int64_t element = element_size(dtype);
  new (self) TensorView{pointer<char>(data),  shape[0],
                        shape[1],             shape[2],
                        static_cast<int>(shape[3]), strides[0] * element,
                        strides[1] * element, strides[2] * element,
                        dtype};
}

// A sequence in the pages of a cache [pages, heads, ...], of which strides are given, in elements.
void make_paged(Tokens* self, uintptr_t data, const std::array<int64_t, 2>& shape,
                const std::array<int64_t, 2>& strides, PageForm form, int64_t page, int64_t dim, DType dtype,
                int64_t tokens, const Given& table) {
  const int element = element_size(dtype);
  const bool tiles = form == PageForm::kKeyTiles || form == PageForm::kValueTiles;
  check_range("the head dimension", dim, 1, kMaxHeadDim);
  check_range("tokens of a page", page, 1, kMostTokens);
  check_range("tokens", tokens, 0, kMostTokens);
  if (tiles && (element != 2 || page % kTileTokens != 0 || dim % kTileTokens != 0))
    throw std::invalid_argument("tiles are of 16 bits, and of 16 tokens and channels, got pages of " +
                                std::to_string(page) + " tokens of " + std::to_string(dim) + " channels");
  if (ceil_div(tokens, page) > table.second)
    throw std::invalid_argument(std::to_string(table.second) + " pages of " + std::to_string(page) +
                                " tokens cannot hold " + std::to_string(tokens) + " tokens");
  if (data == 0 && tokens > 0) throw std::invalid_argument("the cache has lost its memory");
  const int32_t* pages = pointer<int32_t>(table);
  for (int64_t n = 0; n < ceil_div(tokens, page); ++n) check_range("a page of the block table", pages[n], 0, shape[0] - 1);
  // An empty table has no address, by which pages are told from a tensor.
  static const int32_t none = 0;
  new (self) Tokens({pointer<char>(data), strides[0] * element, strides[1] * element, page, form,
                     pages == nullptr ? &none : pages},
                    shape[1], tokens, static_cast<int>(dim), dtype);
}

void make_extent(Extent* self, const Given& query_start, const Given& query_count, const Given& key_start,
                 const Given& key_count, bool causal, std::optional<int64_t> limit) {
  const int64_t batch = query_start.second;
  check_count("Extent.query_count", query_count.second, batch);
  check_count("Extent.key_start", key_start.second, batch);
  check_count("Extent.key_count", key_count.second, batch);
  if (limit) check_range("Extent.limit", *limit, 1, kMostTokens);
  new (self) Extent{batch,
                    pointer<int64_t>(query_start),
                    pointer<int64_t>(query_count),
                    pointer<int64_t>(key_start),
                    pointer<int64_t>(key_count),
                    causal,
                    limit.value_or(kUnlimited)};
  check_numbers(*self);
}

void make_grid(Grid* self, const Extent& extent, int64_t block_q, int64_t block_k) {
  check_range("block_q", block_q, 1, kMostTokens);
  check_range("block_k", block_k, 1, kMostTokens);
  new (self) Grid{extent, block_q, block_k};
}

Lists lists_of(const Given& indptr, const Given& indices, int64_t most) {
  return {pointer<int64_t>(indptr), pointer<int32_t>(indices), indices.second, most};
}

void make_plan(Plan* self, const Grid& grid, int64_t heads, int64_t query_len, int64_t key_len, int64_t query_blocks,
               int64_t column_group, const Given& block_indptr, const Given& block_indices, const Given& column_indptr,
               const Given& column_indices, const Given& sink, const Given& window, const Given& q_order,
               const Given& k_order, bool pruned_mean, std::optional<float> skip) {
  int64_t longest = 0;
  for (int64_t b = 0; b < grid.extent.batch; ++b) longest = std::max(longest, grid.extent.key_count[b]);
  const int64_t key_blocks = ceil_div(k_order.second != 0 ? key_len : longest, grid.block_k);
  new (self) Plan{grid,
                  heads,
                  query_len,
                  key_len,
                  query_blocks,
                  column_group,
                  lists_of(block_indptr, block_indices, key_blocks),
                  lists_of(column_indptr, column_indices, longest),
                  pointer<int32_t>(sink),
                  pointer<int32_t>(window),
                  pointer<int32_t>(q_order),
                  pointer<int32_t>(k_order),
                  pruned_mean,
                  skip.value_or(std::numeric_limits<float>::infinity())};
  check_plan(*self, {block_indptr.second, column_indptr.second, sink.second, window.second, q_order.second,
                     k_order.second});
}

void make_attention_call(AttentionCall* self, const TensorView& q, const Tokens& k, const Tokens& v,
                         const TensorView& out, const Given& lse, const Given& sinks, float scale, float softcap,
                         int threads, const Given& rows) {
  check_heads(q, k);
  check_count("v's batch", v.batch, k.batch);
  check_count("v's heads", v.heads, k.heads);
  check_count("v's tokens", v.tokens, k.tokens);
  check_count("the output's batch", out.batch, q.batch);
  check_count("the output's heads", out.heads, q.heads);
  if (rows.second != 0) check_count("rows", rows.second, checked_product({q.batch, out.tokens}));
  if (rows.second == 0) check_count("the output's tokens", out.tokens, q.tokens);
  check_count("the output's dimensions", out.dim, v.dim);
  if (v.dtype != q.dtype || (rows.second == 0 && out.dtype != q.dtype))
    throw std::invalid_argument("v and the output must have q's dtype; convert them");
  check_count("lse", lse.second, checked_product({q.batch, q.heads, out.tokens}));
  if (sinks.second != 0) check_count("sinks", sinks.second, q.heads);
  new (self) AttentionCall{q, k, v, out, pointer<float>(lse), pointer<float>(sinks), scale, softcap, threads,
                           pointer<int64_t>(rows)};
}

// A tensor like another, or one without data.
void check_like(const char* name, const TensorView& x, const Tokens& like) {
  const bool same = x.batch == like.batch && x.heads == like.heads && x.tokens == like.tokens && x.dim == like.dim;
  if (!same || x.dtype != like.dtype) throw std::invalid_argument(std::string(name) + " must be like its tensor");
}

void make_gradient_call(GradientCall* self, const AttentionCall& attended, const TensorView& reaching,
                        const Given& reaching_lse, std::optional<TensorView> queries, std::optional<TensorView> keys,
                        std::optional<TensorView> values, const Given& sinks) {
  if (attended.rows != nullptr) throw std::invalid_argument("gradients are of all rows");
  check_like("what reaches the output", reaching, attended.out);
  if (queries) check_like("the gradient of q", *queries, attended.q);
  if (keys) check_like("the gradient of k", *keys, attended.k);
  if (values) check_like("the gradient of v", *values, attended.v);
  if (reaching_lse.second != 0)
    check_count("what reaches the lse", reaching_lse.second,
                checked_product({attended.q.batch, attended.q.heads, attended.q.tokens}));
  if (sinks.second != 0) check_count("the gradient of sinks", sinks.second, attended.q.heads);
  if (sinks.second != 0 && attended.sinks == nullptr) throw std::invalid_argument("the call has no sinks");
  new (self) GradientCall{attended, reaching, pointer<float>(reaching_lse), queries.value_or(TensorView{}),
                          keys.value_or(TensorView{}), values.value_or(TensorView{}), pointer<float>(sinks)};
}

}  // namespace

void bind_views(nb::module_& m) {
  nb::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  nb::class_<TensorView>(m, "Tensor")
      .def("__init__", &make_tensor, "data"_a, "shape"_a, "strides"_a, "dtype"_a);
  nb::enum_<PageForm>(m, "PageForm")
      .value("rows", PageForm::kRows)
      .value("columns", PageForm::kColumns)
      .value("key_tiles", PageForm::kKeyTiles)
      .value("value_tiles", PageForm::kValueTiles);
  nb::class_<Tokens>(m, "Tokens")
      .def(nb::init_implicit<const TensorView&>())
      .def("__init__", &make_paged, nb::kw_only(), "data"_a, "shape"_a, "strides"_a, "form"_a, "page"_a, "dim"_a,
           "dtype"_a, "tokens"_a, "table"_a);
  nb::class_<Extent>(m, "Extent")
      .def("__init__", &make_extent, nb::kw_only(), "query_start"_a, "query_count"_a, "key_start"_a, "key_count"_a,
           "causal"_a, "limit"_a.none());
  nb::class_<Grid>(m, "Grid").def("__init__", &make_grid, "extent"_a, nb::kw_only(), "block_q"_a, "block_k"_a);
  nb::class_<Plan>(m, "Plan")
      .def("__init__", &make_plan, "grid"_a, nb::kw_only(), "heads"_a, "query_len"_a, "key_len"_a, "query_blocks"_a,
           "column_group"_a, "block_indptr"_a, "block_indices"_a, "column_indptr"_a, "column_indices"_a, "sink"_a,
           "window"_a, "q_order"_a, "k_order"_a, "pruned_mean"_a, "skip"_a.none());
  nb::class_<AttentionCall>(m, "AttentionCall")
      .def("__init__", &make_attention_call, nb::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "sinks"_a,
           "scale"_a, "softcap"_a, "threads"_a, "rows"_a);
  nb::class_<GradientCall>(m, "GradientCall")
      .def("__init__", &make_gradient_call, nb::kw_only(), "attended"_a, "reaching"_a, "reaching_lse"_a,
           "queries"_a.none(), "keys"_a.none(), "values"_a.none(), "sinks"_a);
}
