#include "attend.h"

namespace trimix {
const Kernel kAvx512Bf16Kernel = kernel_of<VectorProducts<Pair>>(true);
}  // namespace trimix
