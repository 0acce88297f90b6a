#include "attend.h"

namespace trimix {
const Kernel kAvx2Kernel = kernel_of<VectorProducts<float>>(false);
}  // namespace trimix
