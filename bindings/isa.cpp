// Which builds of kernels.cpp this machine can run.
#include "kernels.hpp"

namespace coldrow_module {

#if defined(COLDROW_X86_64_BUILDS)
extern const Kernels kernels_x86_64_v2;
extern const Kernels kernels_x86_64_v3;
extern const Kernels kernels_x86_64_v4;

const Kernels* const* available_kernels() {
  static const Kernels* list[4] = {};
  if (list[0] == nullptr) {
    int n = 0;
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    // (F16C is not asked for: clang 14 cannot, and every processor with AVX2 has it.)
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) list[n++] = &kernels_x86_64_v4;
    if (v3) list[n++] = &kernels_x86_64_v3;
    list[n] = &kernels_x86_64_v2;
  }
  return list;
}
#else
extern const Kernels kernels_generic;

const Kernels* const* available_kernels() {
  static const Kernels* const list[2] = {&kernels_generic, nullptr};
  return list;
}
#endif

}  // namespace coldrow_module
