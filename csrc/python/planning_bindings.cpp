// Planning for Python: pointers, strides and sizes in. The GIL is released while it runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "planning/planning.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace gossamer;

namespace {

void expect(const Sizes& sizes, size_t size_count, const Addresses& arrays, size_t array_count) {
  if (sizes.size() != size_count || arrays.size() != array_count)
    throw std::invalid_argument("another number of sizes or arrays");
}

// sizes: batch, heads, groups, query_len, key_len, dim; arrays: query_start, key_start, key_count.
ScoreCall score_call(uintptr_t q, const Sizes& q_strides, uintptr_t k, const Sizes& k_strides, const Sizes& sizes,
                     const Addresses& arrays, int dtype, float scale, int threads) {
  return {view(q, q_strides), view(k, k_strides), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
          static_cast<int>(sizes[5]), static_cast<DType>(dtype), scale,
          {at<int64_t>(arrays[0]), at<int64_t>(arrays[1]), at<int64_t>(arrays[2])}, threads};
}

void bind_probe(const std::string& isa, int dtype, uintptr_t q, const Sizes& q_strides, uintptr_t k,
                const Sizes& k_strides, const Sizes& sizes, const Addresses& arrays, int64_t last, float scale,
                uintptr_t columns, uintptr_t diagonals, int threads) {
  expect(sizes, 6, arrays, 3);
  const ScoreCall call = score_call(q, q_strides, k, k_strides, sizes, arrays, dtype, scale, threads);
  const Kernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  probe(kernels, call, last, at<float>(columns), at<float>(diagonals));
}

void bind_energy(const std::string& isa, int dtype, uintptr_t q, const Sizes& q_strides, uintptr_t pooled,
                 const Sizes& pooled_strides, const Sizes& sizes, const Addresses& arrays, const Sizes& blocks,
                 float scale, uintptr_t out, int threads) {
  expect(sizes, 6, arrays, 3);
  const ScoreCall call = score_call(q, q_strides, pooled, pooled_strides, sizes, arrays, dtype, scale, threads);
  const Kernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  block_energy(kernels, call, blocks.at(0), blocks.at(1), blocks.at(2), blocks.at(3), at<float>(out));
}

// blocks: in the order of Antidiagonal.
void bind_antidiagonal(const std::string& isa, int dtype, uintptr_t q, const Sizes& q_strides, uintptr_t k,
                       const Sizes& k_strides, const Sizes& sizes, const Addresses& arrays, const Sizes& blocks,
                       float scale, uintptr_t out, int threads) {
  expect(sizes, 6, arrays, 3);
  const ScoreCall call = score_call(q, q_strides, k, k_strides, sizes, arrays, dtype, scale, threads);
  const Antidiagonal cells{blocks.at(0), blocks.at(1), blocks.at(2), blocks.at(3), blocks.at(4)};
  const Kernels& kernels = kernels_for(isa);
  nb::gil_scoped_release release;
  antidiagonal(kernels, call, cells, at<float>(out));
}

// sizes: batch, heads, tokens, dim, block.
void bind_pool(const std::string& isa, int dtype, uintptr_t x, const Sizes& strides, const Sizes& sizes,
               uintptr_t live, uintptr_t out, int threads) {
  expect(sizes, 5, {}, 0);
  const Kernels& kernels = kernels_for(isa);
  const TensorView rows = view(x, strides);
  nb::gil_scoped_release release;
  pool(kernels, rows, sizes[0], sizes[1], sizes[2], static_cast<int>(sizes[3]), static_cast<DType>(dtype), sizes[4],
       at<int64_t>(live), at<float>(out), threads);
}

// sizes: batch, heads, blocks, width, band_count; arrays in the order of Choice.
void bind_choose(const Sizes& sizes, int rule, float alpha, const Addresses& arrays, uintptr_t bits,
                 uintptr_t counts, int threads) {
  expect(sizes, 5, arrays, 9);
  const Choice choice{sizes[0],
                      sizes[1],
                      sizes[2],
                      sizes[3],
                      static_cast<Rule>(rule),
                      alpha,
                      at<float>(arrays[0]),
                      at<int64_t>(arrays[1]),
                      at<double>(arrays[2]),
                      at<uint8_t>(arrays[3]),
                      sizes[4],
                      at<int64_t>(arrays[4]),
                      at<uint8_t>(arrays[5]),
                      at<int64_t>(arrays[6]),
                      at<int64_t>(arrays[7]),
                      at<int64_t>(arrays[8])};
  nb::gil_scoped_release release;
  choose(choice, at<uint64_t>(bits), at<int64_t>(counts), threads);
}

void bind_list(uintptr_t bits, int64_t rows, int64_t width, uintptr_t indptr, uintptr_t indices, int threads) {
  nb::gil_scoped_release release;
  list_bits(at<uint64_t>(bits), rows, width, at<int64_t>(indptr), at<int32_t>(indices), threads);
}

// sizes and arrays in the order of Slashes; out: bits and counts of blocks, then of columns.
void bind_slashes(const Sizes& sizes, const Addresses& arrays, const Addresses& out, int threads) {
  expect(sizes, 5, arrays, 5);
  expect({}, 0, out, 4);
  const Slashes call{sizes[0],
                     sizes[1],
                     sizes[2],
                     sizes[3],
                     sizes[4],
                     at<int64_t>(arrays[0]),
                     at<int32_t>(arrays[1]),
                     at<uint64_t>(arrays[2]),
                     at<int64_t>(arrays[3]),
                     at<int64_t>(arrays[4])};
  nb::gil_scoped_release release;
  slashes(call, at<uint64_t>(out[0]), at<int64_t>(out[1]), at<uint64_t>(out[2]), at<int64_t>(out[3]), threads);
}

// sizes and arrays in the order of PlanView, without the orders.
void bind_count(const Sizes& sizes, const Addresses& arrays, int64_t limit, bool causal, uintptr_t counts,
                int threads) {
  expect(sizes, 7, arrays, 9);
  const PlanView plan{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                      at<int64_t>(arrays[0]), at<int32_t>(arrays[1]), at<int64_t>(arrays[2]), at<int32_t>(arrays[3]),
                      at<int32_t>(arrays[4]), at<int32_t>(arrays[5]), nullptr, nullptr, at<int64_t>(arrays[6]),
                      at<int64_t>(arrays[7]), at<int64_t>(arrays[8]), limit < 0 ? kUnlimited : limit, causal};
  nb::gil_scoped_release release;
  count_pairs(plan, at<int64_t>(counts), threads);
}

}  // namespace

void bind_planning(nb::module_& m) {
  m.def("probe", &bind_probe);
  m.def("block_energy", &bind_energy);
  m.def("antidiagonal", &bind_antidiagonal);
  m.def("pool", &bind_pool);
  m.def("choose", &bind_choose);
  m.def("list_bits", &bind_list);
  m.def("slashes", &bind_slashes);
  m.def("count_pairs", &bind_count);
}
