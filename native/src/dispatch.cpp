// Which kernels this machine can run.

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <cstring>

#include "model.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pp {

namespace {

#if defined(POCKETPHI_AMX)
constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // CPUID 7, EDX
#endif
constexpr int kMostChoices = 5;

struct Choice {
  const Kernels* kernels;
  bool supported;
};

int choices(Choice* out) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Asked of the processor itself: not every compiler's __builtin_cpu_supports knows f16c.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
#if defined(POCKETPHI_AMX)
  // Asked of the processor first, then of the system, which may refuse.
  const bool amx = avx512 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxTile) && (d & kAmxInt8) && amx_permitted();
  out[count++] = {&kernels_amx(), amx};
#endif
  out[count++] = {&kernels_avx512vnni, avx512};
  out[count++] = {&kernels_avx2, avx2};
#endif
#if defined(__aarch64__)
#if defined(__linux__)
  const bool dot_products = getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#else
  const bool dot_products = true;
#endif
  out[count++] = {&kernels_neon, dot_products};
#endif
  out[count++] = {&kernels_generic, true};
  return count;
}

}  // namespace

const Kernels* select_kernels(const char* name) {
  Choice all[kMostChoices];
  const int count = choices(all);
  for (int i = 0; i < count; ++i) {
    if (name && strcmp(name, all[i].kernels->name) != 0) continue;
    if (all[i].supported) return all[i].kernels;
    if (name) {
      fail("kernels '%s' need instructions that this processor does not have", name);
      return nullptr;
    }
  }
  fail("unknown kernels '%s' (this build has: %s)", name ? name : "", kernels_available());
  return nullptr;
}

const char* kernels_available() {
  static char text[128];
  Choice all[kMostChoices];
  const int count = choices(all);
  char built[128] = "";
  for (int i = 0; i < count; ++i) {
    if (!all[i].supported) continue;
    if (built[0]) strcat(built, ",");
    strcat(built, all[i].kernels->name);
  }
  strcpy(text, built);
  return text;
}

}  // namespace pp
