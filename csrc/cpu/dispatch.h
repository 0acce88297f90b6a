// Which kernels this CPU can run.
#pragma once

#include <string>

#include "problem.h"

namespace trimix {

// The named kernel, or null where it isn't built in, the CPU lacks its instructions or the system withholds them.
const Kernel* find_kernel(const std::string& isa);

// The fastest kernel for these inputs.
const Kernel& fastest_kernel(Dtype dtype, int64_t block_size);

// Names of the kernels that run here, fastest first, separated by commas. The emulation is last.
std::string available_isas();

}  // namespace trimix
