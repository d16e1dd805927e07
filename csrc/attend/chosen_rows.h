// Attention of some query rows, anywhere in the call: what a plan would give them, without running all of it.
#pragma once

#include "attend/operands.h"

namespace gossamer {

// For a plan without orders and attributes. Rows of the call that are dead, or no rows at all, attend nothing.
void run_chosen_rows(const Operands& operands);

}  // namespace gossamer
