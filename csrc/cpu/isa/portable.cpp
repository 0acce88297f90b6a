#include "attend.h"

namespace trimix {
const Kernel kPortableKernel = kernel_of<VectorProducts<float>>(false);
}  // namespace trimix
