// The arithmetic that a machine can do, for benchmarks.
#pragma once

#include <string>

namespace gossamer {

// Flops a second of independent multiply-adds on registers, of the kind that an instruction set's kernels are made of:
// bf16 dot products for avx512_bf16 and amx, fp32 otherwise. On that many threads for about that long. Throws
// std::invalid_argument where the build or the machine lacks the instruction set, and for emulated ones.
double peak_flops(const std::string& isa, int threads, double seconds);

}  // namespace gossamer
