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

// Sequences in the pages of a cache [pages, heads, ...], of which strides are given, in elements; a table for each, as
// long as one another.
void make_paged(Tokens* self, uintptr_t data, const std::array<int64_t, 2>& shape,
                const std::array<int64_t, 2>& strides, PageForm form, int64_t page, int64_t dim, DType dtype,
                int64_t tokens, const Given& table, int64_t batch) {
  const int element = element_size(dtype);
  const bool tiles = form == PageForm::kKeyTiles || form == PageForm::kValueTiles;
  check_range("the head dimension", dim, 1, kMaxHeadDim);
  check_range("tokens of a page", page, 1, kMostTokens);
  check_range("tokens", tokens, 0, kMostTokens);
  if (tiles && (element != 2 || page % kTileTokens != 0 || dim % kTileTokens != 0))
    throw std::invalid_argument("tiles are of 16 bits, and of 16 tokens and channels, got pages of " +
                                std::to_string(page) + " tokens of " + std::to_string(dim) + " channels");
  check_range("sequences", batch, 1, kMostTokens);
  const int64_t each = table.second / batch;
  if (each * batch != table.second) throw std::invalid_argument("the tables of sequences must be as long as one another");
  if (ceil_div(tokens, page) > each)
    throw std::invalid_argument(std::to_string(each) + " pages of " + std::to_string(page) +
                                " tokens cannot hold " + std::to_string(tokens) + " tokens");
  if (data == 0 && tokens > 0) throw std::invalid_argument("the cache has lost its memory");
  const int32_t* pages = pointer<int32_t>(table);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = b * each; n < b * each + ceil_div(tokens, page); ++n)
      check_range("a page of the block table", pages[n], 0, shape[0] - 1);
  // An empty table has no address, by which pages are told from a tensor.
  static const int32_t none = 0;
  new (self) Tokens({pointer<char>(data), strides[0] * element, strides[1] * element, page, form,
                     pages == nullptr ? &none : pages, each},
                    batch, shape[1], tokens, static_cast<int>(dim), dtype);
}

// A tensor of any numbers [batch, heads, rows, ...], with strides in elements.
struct Numbers {
  char* data;
  Four shape, strides;
};

void make_numbers(Numbers* self, uintptr_t data, const Four& shape, const Four& strides) {
  if (strides[3] != 1 && shape[3] > 1) throw std::invalid_argument("the last dimension must be contiguous");
  new (self) Numbers{pointer<char>(data), shape, strides};
}

// Of numbers of some bytes, which must be so many rows of so many each: where they lie, and their strides in bytes.
Encoded::Strides place(const char* name, const Numbers& given, const TensorView& tail, int64_t rows, int64_t each,
                       int bytes, const char** first, int64_t* row_stride) {
  const std::string what = std::string(name) + "' ";
  check_count((what + "batch").c_str(), given.shape[0], tail.batch);
  check_count((what + "heads").c_str(), given.shape[1], tail.heads);
  check_count((what + "rows").c_str(), given.shape[2], rows);
  check_count((what + "numbers").c_str(), given.shape[3], each);
  if (given.data == nullptr && tail.batch * tail.heads * rows * each > 0)
    throw std::invalid_argument(std::string(name) + " have lost their memory");
  *first = given.data;
  *row_stride = given.strides[2] * bytes;
  return {given.strides[0] * bytes, given.strides[1] * bytes};
}

Encoded encoded_before(const TensorView& tail, Coding coding, int64_t count) {
  check_range("encoded tokens", count, 0, kMostTokens);
  check_range("tokens", count + tail.tokens, 0, kMostTokens);
  if (tail.dim % 16 != 0) throw std::invalid_argument("encoded heads have dimensions that 16 divides");
  Encoded encoded{};
  encoded.rows.coding = coding;
  encoded.rows.dtype = tail.dtype;
  encoded.rows.dim = tail.dim;
  encoded.rows.sharers = 1;
  encoded.count = count;
  encoded.tail = tail;
  return encoded;
}

// `group` tokens of a channel, or channels of a token, share a scale and a zero.
void make_codes(Tokens* self, const TensorView& tail, const Numbers& codes, const Numbers& scale, const Numbers& zero,
                int64_t bits, int64_t group, bool over_tokens) {
  if (bits != 2 && bits != 4 && bits != 8) throw std::invalid_argument("codes have 2, 4 or 8 bits");
  check_range("the group", group, 1, kMostTokens);
  Encoded encoded = encoded_before(tail, Coding::kCodes, codes.shape[2]);
  StoredRows& rows = encoded.rows;
  const int64_t count = encoded.count, element = element_size(tail.dtype);
  if ((over_tokens ? count : tail.dim) % group != 0)
    throw std::invalid_argument("groups must divide what they are over");
  rows.bits = static_cast<int>(bits);
  rows.group = over_tokens ? 1 : static_cast<int>(group);
  rows.sharers = over_tokens ? group : 1;
  const int64_t owners = over_tokens ? count / group : count, each = tail.dim / rows.group;
  encoded.numbers = place("codes", codes, tail, count, tail.dim * bits / 8, 1, &rows.rows, &rows.row_stride);
  encoded.scales = place("scales", scale, tail, owners, each, element, &rows.scales, &rows.scale_stride);
  encoded.zeros = place("zeros", zero, tail, owners, each, element, &rows.zeros, &rows.zero_stride);
  new (self) Tokens(encoded);
}

void make_bitmaps(Tokens* self, const TensorView& tail, const Numbers& bitmap, const Numbers& packed) {
  Encoded encoded = encoded_before(tail, Coding::kBitmap, packed.shape[2]);
  StoredRows& rows = encoded.rows;
  check_range("packed elements", packed.shape[3], 0, tail.dim);
  rows.packed = static_cast<int>(packed.shape[3]);
  const char* bitmaps = nullptr;
  encoded.bitmaps = place("bitmaps", bitmap, tail, encoded.count, tail.dim / 8, 1, &bitmaps, &rows.bitmap_stride);
  rows.bitmaps = reinterpret_cast<const uint8_t*>(bitmaps);
  encoded.numbers = place("packed elements", packed, tail, encoded.count, packed.shape[3], element_size(tail.dtype),
                          &rows.rows, &rows.row_stride);
  new (self) Tokens(encoded);
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
  nb::class_<Numbers>(m, "Numbers").def("__init__", &make_numbers, "data"_a, "shape"_a, "strides"_a);
  nb::class_<Tokens>(m, "Tokens")
      .def(nb::init_implicit<const TensorView&>())
      .def("__init__", &make_paged, nb::kw_only(), "data"_a, "shape"_a, "strides"_a, "form"_a, "page"_a, "dim"_a,
           "dtype"_a, "tokens"_a, "table"_a, "batch"_a = 1)
      .def("__init__", &make_codes, nb::kw_only(), "tail"_a, "codes"_a, "scale"_a, "zero"_a, "bits"_a, "group"_a,
           "over_tokens"_a)
      .def("__init__", &make_bitmaps, nb::kw_only(), "tail"_a, "bitmap"_a, "packed"_a);
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
