// Python's view: pointers, strides and index arrays in, nothing of torch linked. The GIL is released while it runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/isa.h"
#include "python/bindings.h"
#include "runtime/workspace.h"

namespace nb = nanobind;
using namespace gossamer;

namespace {

void attend(const std::string& isa, int dtype, uintptr_t q, const std::vector<int64_t>& q_strides, uintptr_t k,
            const std::vector<int64_t>& k_strides, uintptr_t v, const std::vector<int64_t>& v_strides, uintptr_t out,
            const std::vector<int64_t>& out_strides, uintptr_t lse, uintptr_t sinks,
            const std::vector<int64_t>& sizes, const std::vector<uintptr_t>& arrays, int64_t limit, bool causal,
            float scale, float softcap, int threads) {
  const Kernels& kernels = kernels_for(isa);
  if (kernels.bf16_tiles && static_cast<DType>(dtype) != DType::kBFloat16)
    throw std::invalid_argument(isa + " computes in bf16 and takes nothing else");
  if (sizes.size() != 11 || arrays.size() != 11) throw std::invalid_argument("11 sizes and 11 arrays");
  const PlanView plan{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                      at<int64_t>(arrays[0]), at<int32_t>(arrays[1]), at<int64_t>(arrays[2]),
                      at<int32_t>(arrays[3]), at<int32_t>(arrays[4]), at<int32_t>(arrays[5]),
                      at<int32_t>(arrays[6]), at<int32_t>(arrays[7]), at<int64_t>(arrays[8]),
                      at<int64_t>(arrays[9]), at<int64_t>(arrays[10]), limit < 0 ? kUnlimited : limit, causal};
  const Call call{view(q, q_strides), view(k, k_strides), view(v, v_strides), view(out, out_strides),
                  reinterpret_cast<float*>(lse), at<float>(sinks), sizes[7], sizes[8],
                  static_cast<int>(sizes[9]), static_cast<int>(sizes[10]), static_cast<DType>(dtype), scale, softcap,
                  threads};
  nb::gil_scoped_release release;
  execute(kernels, plan, call);
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "Sparse attention kernels for CPUs; see gossamer.backends.cpu";
  m.def("attend", &attend);
  m.def("prefer_huge_pages", [](uintptr_t begin, int64_t bytes) {
    prefer_huge_pages(reinterpret_cast<void*>(begin), bytes);
  });
  bind_planning(m);
  m.def("supported", &supported_isas,
        "Instruction sets of this build that this machine runs: the oldest first, and last amx_emulated, for tests");
  m.def("prefers_bf16_dot", &prefers_bf16_dot, "Whether vdpbf16ps beats fp32 FMA here (AMD)");
  m.def("has_openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  });
}
