#include "dispatch.h"

#ifdef TRIMIX_WITH_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace trimix {
namespace {

#ifdef TRIMIX_WITH_X86
bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// AMX tiles are off in every process until it asks for them.
bool has_amx() {
  constexpr unsigned kTileBf16 = 1u << 22, kTile = 1u << 24, kOsXsave = 1u << 27;
  constexpr unsigned kTileState = 3u << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTileBf16 | kTile)) != (kTileBf16 | kTile)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool always() { return true; }

struct Candidate {
  const char* name;
  bool (*runs_here)();
  const Kernel* kernel;
};

// Fastest first; what stands after the portable kernel is never chosen by itself.
const Candidate kCandidates[] = {
#ifdef TRIMIX_WITH_X86
    {"amx", has_amx, &kAmxKernel},
    {"avx512_bf16", has_avx512_bf16, &kAvx512Bf16Kernel},
    {"avx512", has_avx512, &kAvx512Kernel},
    {"avx2", has_avx2, &kAvx2Kernel},
#endif
    {"portable", always, &kPortableKernel},
#ifdef TRIMIX_WITH_X86
    {"amx_emulated", has_avx512_bf16, &kAmxEmulatedKernel},
#endif
};

}  // namespace

const Kernel* find_kernel(const std::string& isa) {
  for (const Candidate& candidate : kCandidates)
    if (isa == candidate.name) return candidate.runs_here() ? candidate.kernel : nullptr;
  return nullptr;
}

const Kernel& fastest_kernel(Dtype dtype, int64_t block_size) {
  for (const Candidate& candidate : kCandidates) {
    const Kernel& kernel = *candidate.kernel;
    const bool fits = (dtype == Dtype::kBFloat16 || !kernel.bf16_only) && block_size % kernel.block_multiple == 0;
    if (fits && candidate.runs_here()) return kernel;
  }
  return kPortableKernel;
}

std::string available_isas() {
  std::string names;
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs_here()) names += (names.empty() ? "" : ",") + std::string(candidate.name);
  return names;
}

}  // namespace trimix
