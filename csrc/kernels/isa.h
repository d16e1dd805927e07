// The kernels of each instruction set, and which of them this machine runs.
#pragma once

#include "kernels/job.h"

namespace gossamer {

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();
const Kernels* amx_emulated_kernels();  // for tests: the AMX code over emulated tile operations

}  // namespace gossamer
