// Integer arithmetic that the kernels and the baseline code share. In an anonymous namespace, so that each translation
// unit compiles its own; job.h says why.
#pragma once

#include <cstdint>

namespace gossamer {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Bits [begin, end) of 64; either may lie outside.
inline uint64_t bit_range(int64_t begin, int64_t end) {
  if (begin < 0) begin = 0;
  if (end > 64) end = 64;
  if (begin >= end) return 0;
  return (~uint64_t{0} >> (64 - (end - begin))) << begin;
}

}  // namespace
}  // namespace gossamer
