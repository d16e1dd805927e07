// Planning for Python. The GIL is released while it runs.
#include <nanobind/stl/string.h>

#include <new>

#include "planning/planning.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;

namespace {

void make_score_call(ScoreCall* self, const TensorView& q, const TensorView& k, const Extent& extent, float scale,
                     int threads) {
  new (self) ScoreCall{q, k, extent, scale, threads};
}

void make_part(Part* self, int64_t block_q, int64_t block_k, int64_t first, int64_t stop) {
  new (self) Part{block_q, block_k, first, stop};
}

void make_choice(Choice* self, int64_t batch, int64_t heads, int64_t blocks, int64_t width, Rule rule, float alpha,
                 uintptr_t scores, uintptr_t budgets, uintptr_t shares, uintptr_t diagonals, int64_t diagonal_count,
                 uintptr_t main_diagonal, uintptr_t heads_that_force, uintptr_t forced, uintptr_t forced_everywhere,
                 uintptr_t seen) {
  new (self) Choice{batch,
                    heads,
                    blocks,
                    width,
                    rule,
                    alpha,
                    pointer<float>(scores),
                    pointer<int64_t>(budgets),
                    pointer<double>(shares),
                    pointer<uint8_t>(diagonals),
                    diagonal_count,
                    pointer<int64_t>(main_diagonal),
                    pointer<uint8_t>(heads_that_force),
                    pointer<int64_t>(forced),
                    pointer<int64_t>(forced_everywhere),
                    pointer<int64_t>(seen)};
}

void make_slashes(Slashes* self, const Extent& extent, int64_t heads, int64_t key_len, int64_t first, int64_t stop,
                  uintptr_t distance_indptr, uintptr_t distances, uintptr_t columns) {
  new (self) Slashes{extent,
                     heads,
                     key_len,
                     first,
                     stop,
                     {pointer<int64_t>(distance_indptr), pointer<int32_t>(distances)},
                     pointer<uint64_t>(columns)};
}

void make_chosen_bits(ChosenBits* self, uintptr_t bits, uintptr_t counts) {
  new (self) ChosenBits{pointer<uint64_t>(bits), pointer<int64_t>(counts)};
}

void probe_mass(const std::string& isa, const ScoreCall& call, int64_t last, uintptr_t columns, uintptr_t diagonals) {
  const Kernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  probe(kernels, call, last, pointer<float>(columns), pointer<float>(diagonals));
}

void pool_blocks(const std::string& isa, const TensorView& x, int64_t block, uintptr_t live, uintptr_t out,
                 int threads) {
  const Kernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  pool(kernels, x, block, pointer<int64_t>(live), pointer<float>(out), threads);
}

void energies(const std::string& isa, const ScoreCall& call, const Part& part, uintptr_t out) {
  const Kernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  block_energy(kernels, call, part, pointer<float>(out));
}

void antidiagonals(const std::string& isa, const ScoreCall& call, const Part& part, int64_t stride, uintptr_t out) {
  const Kernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  antidiagonal(kernels, call, part, stride, pointer<float>(out));
}

void choose_bits(const Choice& choice, const ChosenBits& chosen, int threads) {
  nb::gil_scoped_release release;
  choose(choice, chosen.bits, chosen.counts, threads);
}

void list_indices(uintptr_t bits, int64_t rows, int64_t width, uintptr_t indptr, uintptr_t indices, int threads) {
  nb::gil_scoped_release release;
  list_bits(pointer<uint64_t>(bits), rows, width, pointer<int64_t>(indptr), pointer<int32_t>(indices), threads);
}

void cover_slashes(const Slashes& call, const ChosenBits& blocks, const ChosenBits& columns, int threads) {
  nb::gil_scoped_release release;
  slashes(call, blocks, columns, threads);
}

void pairs_of_plan(const Plan& plan, uintptr_t counts, int threads) {
  nb::gil_scoped_release release;
  count_pairs(plan, pointer<int64_t>(counts), threads);
}

void bind_views_of_planning(nb::module_& m) {
  nb::enum_<Rule>(m, "Rule")
      .value("none", Rule::kNone)
      .value("relative_to_max", Rule::kRelative)
      .value("top_k", Rule::kTopK)
      .value("top_p", Rule::kTopP)
      .value("top_p_forced", Rule::kTopPForced)
      .value("top_p_reaching", Rule::kTopPReaching)
      .value("top_p_below", Rule::kTopPBelow)
      .value("top_p_of_all_rows", Rule::kTopPAllRows);
  nb::class_<ScoreCall>(m, "ScoreCall")
      .def("__init__", &make_score_call, nb::kw_only(), "q"_a, "k"_a, "extent"_a, "scale"_a, "threads"_a);
  nb::class_<Part>(m, "Part")
      .def("__init__", &make_part, nb::kw_only(), "block_q"_a, "block_k"_a, "first"_a, "stop"_a);
  nb::class_<Choice>(m, "Choice")
      .def("__init__", &make_choice, nb::kw_only(), "batch"_a, "heads"_a, "blocks"_a, "width"_a, "rule"_a, "alpha"_a,
           "scores"_a, "budgets"_a, "shares"_a, "diagonals"_a, "diagonal_count"_a, "main_diagonal"_a,
           "heads_that_force"_a, "forced"_a, "forced_everywhere"_a, "seen"_a);
  nb::class_<Slashes>(m, "Slashes")
      .def("__init__", &make_slashes, nb::kw_only(), "extent"_a, "heads"_a, "key_len"_a, "first"_a, "stop"_a,
           "distance_indptr"_a, "distances"_a, "columns"_a);
  nb::class_<ChosenBits>(m, "ChosenBits").def("__init__", &make_chosen_bits, nb::kw_only(), "bits"_a, "counts"_a);
}

}  // namespace

void bind_planning(nb::module_& m) {
  bind_views_of_planning(m);
  m.def("probe", &probe_mass, "isa"_a, "call"_a, nb::kw_only(), "last"_a, "columns"_a, "diagonals"_a);
  m.def("pool", &pool_blocks, "isa"_a, "x"_a, nb::kw_only(), "block"_a, "live"_a, "out"_a, "threads"_a);
  m.def("block_energy", &energies, "isa"_a, "call"_a, "part"_a, nb::kw_only(), "out"_a);
  m.def("antidiagonal", &antidiagonals, "isa"_a, "call"_a, "part"_a, nb::kw_only(), "stride"_a, "out"_a);
  m.def("choose", &choose_bits, "choice"_a, "chosen"_a, nb::kw_only(), "threads"_a);
  m.def("list_bits", &list_indices, nb::kw_only(), "bits"_a, "rows"_a, "width"_a, "indptr"_a, "indices"_a,
        "threads"_a);
  m.def("slashes", &cover_slashes, "call"_a, nb::kw_only(), "blocks"_a, "columns"_a, "threads"_a);
  m.def("count_pairs", &pairs_of_plan, "plan"_a, nb::kw_only(), "counts"_a, "threads"_a);
}
