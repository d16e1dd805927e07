// What this machine runs, by cpuid.
#pragma once

#include <string>
#include <vector>

#include "kernels/isa.h"

namespace gossamer {

std::vector<std::string> supported_isas();
const Kernels* kernels_of(const std::string& isa);  // null where the build or the machine lacks it
bool prefers_bf16_dot();

}  // namespace gossamer
