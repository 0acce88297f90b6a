#include "attend.h"

namespace trimix {
const Kernel kAvx512Kernel = kernel_of<VectorProducts<float>>(false);
}  // namespace trimix
