// Rows that enter a linear layer in int8: structures that the baseline code hands to the kernels in quantise.h.
#pragma once

#include <cstdint>

#include "kernels/job.h"

namespace gossamer {

constexpr int kTop = 127;    // the largest number of int8 that is used, so that signs are alike
constexpr int kZeroAt = 128;  // what stands for 0 in uint8

// What of a number is beyond the scale: x = clip(x) + value.
struct Beyond {
  int32_t feature;
  float value;
};

struct QuantiseJob {
  const void* row;
  DType dtype;
  int features;
  float scale;
  uint8_t* out;
};

// out[n] += by_row[n] * sum over the list of value * columns[feature * outputs + n].
struct BeyondJob {
  const Beyond* beyond;  // features as the columns have them
  int64_t count;
  const int8_t* columns;
  const float* by_row;
  int64_t outputs;
  void* out;
  DType dtype;
};

struct QuantiseKernels {
  // A row in uint8; lists what is beyond the scale and returns how many, or -1 where a number is not finite.
  int64_t (*quantise)(const QuantiseJob&, Beyond*);
  void (*add_beyond)(const BeyondJob&);
};

}  // namespace gossamer
