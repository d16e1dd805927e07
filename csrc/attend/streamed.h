// Few query rows against many keys, as in decoding: bound by reading the cache once.
#pragma once

#include <cstdint>
#include <vector>

#include "attend/operands.h"

namespace gossamer {

// Whether the live rows of each head of the plan make one panel, so that packed keys would not be used again.
bool fits_streamed(const Operands& operands, int64_t b);

// Each panel's tiles are dealt out in stretches; a stretch is packed into a small buffer, attended, and forgotten. The
// results of stretches are merged by their log-sum-exp, in order, so that they do not depend on the threads.
void run_streamed(const Operands& operands, const std::vector<int64_t>& batch_rows);

}  // namespace gossamer
