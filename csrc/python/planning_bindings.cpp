// Planning for Python. The GIL is released while it runs.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <limits>
#include <new>

#include "plan/checks.h"
#include "planning/planning.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;

namespace {

// Live queries of a grid lie within a tensor of them, and its batch rows are the tensor's.
void check_grid(const Grid& grid, const TensorView& q) {
  check_count("the extent's batch", grid.extent.batch, q.batch);
  check_queries(grid.extent, q.tokens);
}

void make_score_call(ScoreCall* self, const TensorView& q, const Tokens& k, const Extent& extent, float scale,
                     int threads) {
  check_heads(q, k);
  check_count("the extent's batch", extent.batch, q.batch);
  check_queries(extent, q.tokens);
  new (self) ScoreCall{q, k, extent, scale, threads};
}

void make_part(Part* self, int64_t first, int64_t stop) { new (self) Part{first, stop}; }

void make_choice(Choice* self, int64_t batch, int64_t heads, int64_t rows, int64_t width, Rule rule, float alpha,
                 uintptr_t scores, uintptr_t counts, uintptr_t shares, uintptr_t seen, uintptr_t forced, int64_t first,
                 uintptr_t forced_heads, uintptr_t diagonals, int64_t diagonal_count, uintptr_t origin, bool mirrored,
                 uintptr_t everywhere, uintptr_t ruled_heads, uintptr_t early, uintptr_t taken, bool unite) {
  new (self) Choice{batch,
                    heads,
                    rows,
                    width,
                    rule,
                    alpha,
                    pointer<float>(scores),
                    pointer<int64_t>(counts),
                    pointer<double>(shares),
                    pointer<Range>(seen),
                    pointer<Range>(forced),
                    first,
                    pointer<uint8_t>(forced_heads),
                    pointer<uint8_t>(diagonals),
                    diagonal_count,
                    pointer<int64_t>(origin),
                    mirrored,
                    pointer<uint8_t>(everywhere),
                    pointer<uint8_t>(ruled_heads),
                    pointer<uint8_t>(early),
                    pointer<uint8_t>(taken),
                    unite};
}

void make_slashes(Slashes* self, const Extent& extent, int64_t heads, int64_t width, const Part& part,
                  uintptr_t columns, uintptr_t distances) {
  new (self) Slashes{extent, heads, width, part, pointer<uint8_t>(columns), pointer<uint8_t>(distances)};
}

void make_chosen_bits(ChosenBits* self, uintptr_t bits, uintptr_t counts) {
  new (self) ChosenBits{pointer<uint64_t>(bits), pointer<int64_t>(counts)};
}

void make_page_choice(PageChoice* self, int64_t heads, int64_t pages, int64_t size, const Given& keys, int64_t sinks,
                      int64_t recent, int64_t count) {
  check_range("tokens of a page", size, 1, std::numeric_limits<int32_t>::max());
  check_range("pages", pages, 0, std::numeric_limits<int32_t>::max());
  new (self) PageChoice{keys.second, heads, pages, size, pointer<int64_t>(keys), std::max<int64_t>(sinks, 0),
                        std::max<int64_t>(recent, 0), count};
}

// Of `KeptBounds`, whose sizes are those of the cache.
void check_bounds(const Tokens& keys, const Given& counts, const Given& bounds, DType dtype, int64_t size,
                  const Given& held) {
  const Pages& pages = keys.pages();
  check_range("tokens of a page's bounds", size, 1, pages.page);
  if (pages.page % size != 0) throw std::invalid_argument("the tokens of bounds must divide those of a page");
  if (dtype == DType::kFloat32 || (keys.dtype != DType::kFloat32 && keys.dtype != dtype))
    throw std::invalid_argument("bounds are of 16 bits, those of the keys where they have as many");
  check_count("counts", counts.second, keys.batch);
  for (int64_t b = 0; b < keys.batch; ++b) check_range("tokens of a sequence", pointer<int64_t>(counts)[b], 0, keys.tokens);
  check_count("bounds", bounds.second, checked_product({held.second, keys.heads, pages.page / size, 2 * keys.dim}));
  for (int64_t b = 0; b < keys.batch; ++b)
    for (int64_t t = 0; t < keys.tokens; t += pages.page)
      check_range("a page of the block table", pages.number(b, t), 0, held.second - 1);
}

void bind_views_of_planning(nb::module_& m) {
  nb::enum_<Rule>(m, "Rule")
      .value("none", Rule::kNone)
      .value("relative_to_max", Rule::kRelativeToMax)
      .value("top_k", Rule::kTopK)
      .value("top_p", Rule::kTopP)
      .value("top_p_forced_first", Rule::kTopPForced)
      .value("top_p_reaching", Rule::kTopPReaching)
      .value("top_p_below", Rule::kTopPBelow)
      .value("top_p_of_all_rows", Rule::kTopPOfAllRows)
      .value("at_least", Rule::kAtLeast)
      .value("above", Rule::kAbove)
      .value("top_p_in_tiers", Rule::kTopPInTiers);
  nb::class_<ScoreCall>(m, "ScoreCall")
      .def("__init__", &make_score_call, nb::kw_only(), "q"_a, "k"_a, "extent"_a, "scale"_a, "threads"_a);
  nb::class_<Part>(m, "Part").def("__init__", &make_part, "first"_a, "stop"_a);
  nb::class_<Choice>(m, "Choice")
      .def("__init__", &make_choice, nb::kw_only(), "batch"_a, "heads"_a, "rows"_a, "width"_a, "rule"_a, "alpha"_a,
           "scores"_a, "counts"_a, "shares"_a, "seen"_a, "forced"_a, "first"_a, "forced_heads"_a, "diagonals"_a,
           "diagonal_count"_a, "origin"_a, "mirrored"_a, "everywhere"_a, "ruled_heads"_a,
           "early"_a, "taken"_a, "unite"_a);
  nb::class_<Slashes>(m, "Slashes")
      .def("__init__", &make_slashes, nb::kw_only(), "extent"_a, "heads"_a, "width"_a, "part"_a, "columns"_a,
           "distances"_a);
  nb::class_<PageChoice>(m, "PageChoice")
      .def("__init__", &make_page_choice, nb::kw_only(), "heads"_a, "pages"_a, "size"_a, "keys"_a, "sinks"_a,
           "recent"_a, "count"_a);
  nb::class_<ChosenBits>(m, "ChosenBits").def("__init__", &make_chosen_bits, nb::kw_only(), "bits"_a, "counts"_a);
}

void bind_scores(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "probe",
      [](const std::string& isa, const ScoreCall& call, int64_t last, int64_t width, uintptr_t columns,
         uintptr_t diagonals) {
        check_keys(call.extent, call.k.tokens);
        check_key_blocks({call.extent, 1, 1}, width);
        probe(kernels_for(isa), call, last, width, pointer<float>(columns), pointer<float>(diagonals));
      },
      "isa"_a, "call"_a, nb::kw_only(), "last"_a, "width"_a, "columns"_a, "diagonals"_a, Release());
  m.def(
      "pool_keys",
      [](const std::string& isa, const Tokens& k, const Grid& grid, int64_t blocks, uintptr_t out, int threads) {
        check_count("the extent's batch", grid.extent.batch, k.batch);
        check_keys(grid.extent, k.tokens);
        pool_keys(kernels_for(isa), k, grid, blocks, pointer<float>(out), threads);
      },
      "isa"_a, "k"_a, "grid"_a, nb::kw_only(), "blocks"_a, "out"_a, "threads"_a, Release());
  m.def(
      "pool_queries",
      [](const std::string& isa, const TensorView& q, const Grid& grid, int64_t blocks, uintptr_t out, int threads) {
        check_grid(grid, q);
        pool_queries(kernels_for(isa), q, grid, blocks, pointer<float>(out), threads);
      },
      "isa"_a, "q"_a, "grid"_a, nb::kw_only(), "blocks"_a, "out"_a, "threads"_a, Release());
  m.def(
      "pool_turned",
      [](const std::string& isa, const Tokens& x, const Given& cos, const Given& sin, const Grid& grid, bool keys,
         int64_t blocks, uintptr_t mean, uintptr_t low, uintptr_t high, int threads) {
        const int64_t tokens = checked_product({x.batch, x.tokens}), pairs = tokens == 0 ? 0 : cos.second / tokens;
        check_range("pairs", pairs, 0, x.dim / 2);
        check_count("cosines", cos.second, checked_product({tokens, pairs}));
        check_count("sines", sin.second, cos.second);
        check_count("the extent's batch", grid.extent.batch, x.batch);
        if (keys)
          check_keys(grid.extent, x.tokens);
        else
          check_queries(grid.extent, x.tokens);
        pool_turned(kernels_for(isa), x, {pairs, pointer<float>(cos), pointer<float>(sin)}, grid, keys, blocks,
                    {pointer<float>(mean), pointer<float>(low), pointer<float>(high)}, threads);
      },
      "isa"_a, "x"_a, nb::kw_only(), "cos"_a, "sin"_a, "grid"_a, "keys"_a, "blocks"_a, "mean"_a, "low"_a, "high"_a,
      "threads"_a, Release());
  m.def(
      "pooled_products",
      [](const std::string& isa, const TensorView& queries, const TensorView& keys, const Grid& grid, const Part& part,
         uintptr_t out, int threads) {
        check_heads(queries, keys);
        check_count("the extent's batch", grid.extent.batch, queries.batch);
        check_range("the part's end", part.stop, part.first, queries.tokens);
        pooled_products(kernels_for(isa), queries, keys, grid, part, pointer<float>(out), threads);
      },
      "isa"_a, "queries"_a, "keys"_a, "grid"_a, "part"_a, nb::kw_only(), "out"_a, "threads"_a, Release());
  m.def(
      "pooled_shares",
      [](const std::string& isa, const TensorView& queries, const TensorView& keys, const Grid& grid, const Part& part,
         float scale, uintptr_t out, int threads) {
        check_heads(queries, keys);
        check_count("the extent's batch", grid.extent.batch, queries.batch);
        check_range("the part's end", part.stop, part.first, queries.tokens);
        pooled_shares(kernels_for(isa), queries, keys, grid, part, scale, pointer<float>(out), threads);
      },
      "isa"_a, "queries"_a, "keys"_a, "grid"_a, "part"_a, nb::kw_only(), "scale"_a, "out"_a, "threads"_a, Release());
  m.def(
      "block_mass",
      [](const std::string& isa, const ScoreCall& call, const Grid& grid, const Part& part, int64_t key_blocks,
         const Given& lse, uintptr_t out) {
        check_grid(grid, call.q);
        check_keys(call.extent, call.k.tokens);
        check_key_blocks(grid, key_blocks);
        check_count("lse", lse.second, checked_product({call.q.batch, call.q.heads, call.q.tokens}));
        block_mass(kernels_for(isa), call, grid, part, key_blocks, pointer<float>(lse), pointer<float>(out));
      },
      "isa"_a, "call"_a, "grid"_a, "part"_a, nb::kw_only(), "key_blocks"_a, "lse"_a, "out"_a, Release());
  m.def(
      "block_energy",
      [](const std::string& isa, const ScoreCall& call, const Grid& grid, const Part& part, bool per_head, bool ended,
         uintptr_t out) {
        check_grid(grid, call.q);
        check_key_blocks(grid, call.k.tokens);
        if (call.k.paged()) throw std::invalid_argument("energies take pooled keys, which lie in no pages");
        block_energy(kernels_for(isa), call, grid, part, {per_head, ended}, pointer<float>(out));
      },
      "isa"_a, "call"_a, "grid"_a, "part"_a, nb::kw_only(), "per_head"_a, "ended"_a, "out"_a, Release());
  m.def(
      "group_shares",
      [](const std::string& isa, const ScoreCall& call, const TensorView& means, const Grid& grid, int64_t group,
         const Part& part, int64_t width, uintptr_t out) {
        check_grid(grid, call.q);
        check_keys(call.extent, call.k.tokens);
        check_key_blocks({call.extent, 1, 1}, width);
        group_shares(kernels_for(isa), call, means, grid, group, part, width, pointer<float>(out));
      },
      "isa"_a, "call"_a, "means"_a, "grid"_a, "group"_a, "part"_a, nb::kw_only(), "width"_a, "out"_a, Release());
  m.def(
      "group_differences",
      [](const std::string& isa, const ScoreCall& call, const TensorView& means, const Grid& grid, uintptr_t anchors,
         int64_t group, const Part& part, int64_t width, uintptr_t out) {
        check_grid(grid, call.q);
        check_keys(call.extent, call.k.tokens);
        check_key_blocks({call.extent, 1, 1}, width);
        group_differences(kernels_for(isa), call, means, grid, pointer<float>(anchors), group, part, width,
                          pointer<float>(out));
      },
      "isa"_a, "call"_a, "means"_a, "grid"_a, nb::kw_only(), "anchors"_a, "group"_a, "part"_a, "width"_a, "out"_a,
      Release());
  m.def(
      "near_keys",
      [](const std::string& isa, const ScoreCall& call, const TensorView& means, const Grid& grid, uintptr_t anchors,
         int64_t group, const Part& part, int64_t width, uintptr_t bars, uintptr_t left_out, int64_t ranges,
         const ChosenBits& chosen) {
        check_grid(grid, call.q);
        check_keys(call.extent, call.k.tokens);
        check_key_blocks({call.extent, 1, 1}, width);
        near_keys(kernels_for(isa), call, means, grid, pointer<float>(anchors), group, part, width,
                  {pointer<float>(bars), pointer<Range>(left_out), ranges}, chosen);
      },
      "isa"_a, "call"_a, "means"_a, "grid"_a, nb::kw_only(), "anchors"_a, "group"_a, "part"_a, "width"_a, "bars"_a,
      "left_out"_a, "ranges"_a, "chosen"_a, Release());
  m.def(
      "antidiagonal",
      [](const std::string& isa, const ScoreCall& call, const Grid& grid, int64_t stride, const Part& part,
         int64_t key_blocks, uintptr_t out) {
        check_grid(grid, call.q);
        check_keys(call.extent, call.k.tokens);
        check_key_blocks(grid, key_blocks);
        antidiagonal(kernels_for(isa), call, grid, stride, part, key_blocks, pointer<float>(out));
      },
      "isa"_a, "call"_a, "grid"_a, "stride"_a, "part"_a, nb::kw_only(), "key_blocks"_a, "out"_a, Release());
  m.def(
      "antidiagonal_peaks",
      [](const std::string& isa, const ScoreCall& call, const Grid& grid, int64_t stride, const Part& part,
         int64_t key_blocks, float near, uintptr_t sums, uintptr_t attained) {
        check_grid(grid, call.q);
        check_keys(call.extent, call.k.tokens);
        check_key_blocks(grid, key_blocks);
        antidiagonal_peaks(kernels_for(isa), call, grid, stride, part, key_blocks,
                           {near, pointer<float>(sums), pointer<uint8_t>(attained)});
      },
      "isa"_a, "call"_a, "grid"_a, "stride"_a, "part"_a, nb::kw_only(), "key_blocks"_a, "near"_a, "sums"_a,
      "attained"_a, Release());
  m.def(
      "page_scores",
      [](const std::string& isa, const TensorView& queries, const Tokens& pages, const PageChoice& choice,
         uintptr_t out, int threads) {
        check_count("the choice's batch", choice.batch, queries.batch);
        check_count("the pages' batch", pages.batch, queries.batch);
        check_count("channels of a page", pages.dim, queries.dim);
        check_count("pages", choice.pages, pages.tokens);
        check_range("key heads", pages.heads, 1, queries.heads);
        if (!pages.in_rows()) throw std::invalid_argument("what is known of pages must lie in rows");
        if (queries.heads % pages.heads != 0) throw std::invalid_argument("query heads must share key heads evenly");
        if (queries.dtype != DType::kFloat32 || queries.tokens != 1)
          throw std::invalid_argument("scores of pages are of one query in fp32");
        page_scores(kernels_for(isa), queries, pages, choice, pointer<float>(out), threads);
      },
      "isa"_a, "queries"_a, "pages"_a, "choice"_a, nb::kw_only(), "out"_a, "threads"_a, Release());
  m.def(
      "page_tokens",
      [](const std::string& isa, const Given& scores, int64_t query_heads, const PageChoice& choice, int64_t room,
         const Given& tokens, const Given& counts, int threads) {
        check_range("heads that choose", choice.heads, 1, query_heads);
        if (query_heads % choice.heads != 0) throw std::invalid_argument("query heads must choose in equal parts");
        check_count("scores", scores.second, checked_product({choice.batch, query_heads, choice.pages}));
        check_count("tokens", tokens.second, checked_product({choice.batch, choice.heads, room}));
        check_count("counts", counts.second, checked_product({choice.batch, choice.heads}));
        page_tokens(kernels_for(isa), pointer<float>(scores), query_heads, choice, room, pointer<int32_t>(tokens),
                    pointer<int64_t>(counts), threads);
      },
      "isa"_a, "scores"_a, nb::kw_only(), "query_heads"_a, "choice"_a, "room"_a, "tokens"_a, "counts"_a, "threads"_a,
      Release());
  m.def(
      "keep_bounds",
      [](const std::string& isa, const Tokens& keys, const Given& counts, const Given& bounds, DType dtype,
         int64_t size, const Given& held, int threads) {
        if (!keys.paged()) throw std::invalid_argument("bounds are kept of the pages of a cache");
        check_bounds(keys, counts, bounds, dtype, size, held);
        keep_bounds(kernels_for(isa), keys, pointer<int64_t>(counts),
                    {pointer<char>(bounds), dtype, size, pointer<int32_t>(held)}, threads);
      },
      "isa"_a, "keys"_a, nb::kw_only(), "counts"_a, "bounds"_a, "dtype"_a, "size"_a, "held"_a, "threads"_a, Release());
  m.def(
      "forget_slots",
      [](const Given& slots, int64_t page, const Given& held) {
        check_range("tokens of a page", page, 1, kMostTokens);
        forget_slots(pointer<int64_t>(slots), slots.second, page, held.second, pointer<int32_t>(held));
      },
      "slots"_a, nb::kw_only(), "page"_a, "held"_a);
  m.def(
      "row_maxima",
      [](const std::string& isa, const ScoreCall& call, const Grid& grid, const Part& part, uintptr_t regions,
         int64_t region_count, uintptr_t out) {
        check_grid(grid, call.q);
        check_keys(call.extent, call.k.tokens);
        row_maxima(kernels_for(isa), call, grid, part, pointer<Range>(regions), region_count, pointer<float>(out));
      },
      "isa"_a, "call"_a, "grid"_a, "part"_a, nb::kw_only(), "regions"_a, "region_count"_a, "out"_a, Release());
}

void bind_lists(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  m.def("choose", &choose, "choice"_a, "chosen"_a, "threads"_a, Release());
  m.def(
      "count_top_p",
      [](uintptr_t scores, int64_t rows, int64_t width, uintptr_t shares, uintptr_t counts, int threads) {
        count_top_p(pointer<float>(scores), rows, width, pointer<double>(shares), pointer<int64_t>(counts), threads);
      },
      nb::kw_only(), "scores"_a, "rows"_a, "width"_a, "shares"_a, "counts"_a, "threads"_a, Release());
  m.def(
      "list_bits",
      [](uintptr_t bits, int64_t rows, int64_t width, uintptr_t starts, uintptr_t indices, int threads) {
        list_bits(pointer<uint64_t>(bits), rows, width, pointer<int64_t>(starts), pointer<int32_t>(indices), threads);
      },
      nb::kw_only(), "bits"_a, "rows"_a, "width"_a, "starts"_a, "indices"_a, "threads"_a, Release());
  m.def(
      "place_lists",
      [](uintptr_t lists, uintptr_t counts, int64_t rows, uintptr_t starts, uintptr_t indices, int threads) {
        place_lists(pointer<int32_t>(lists), pointer<int64_t>(counts), rows, pointer<int64_t>(starts),
                    pointer<int32_t>(indices), threads);
      },
      nb::kw_only(), "lists"_a, "counts"_a, "rows"_a, "starts"_a, "indices"_a, "threads"_a, Release());
  m.def("slashes", &slashes, "call"_a, nb::kw_only(), "blocks"_a, "columns"_a, "threads"_a, Release());
  m.def(
      "count_pairs", [](const Plan& plan, uintptr_t counts, int threads) {
        count_pairs(plan, pointer<int64_t>(counts), threads);
      },
      "plan"_a, nb::kw_only(), "counts"_a, "threads"_a, Release());
}

}  // namespace

void bind_planning(nb::module_& m) {
  bind_views_of_planning(m);
  bind_scores(m);
  bind_lists(m);
}
