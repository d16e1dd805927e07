// Which pairs of query and key the model allows.
#pragma once

#include <cstdint>

namespace gossamer {

// Arrays hold a number for each batch row; see Extent in plan/plan.py.
struct Extent {
  int64_t batch;
  const int64_t* query_start;
  const int64_t* key_start;
  const int64_t* key_count;
  bool causal;
  int64_t limit;  // kUnlimited: none
};

}  // namespace gossamer
