// Compiled with -mf16c, so nothing that other files share is included.
#include "convert_hardware.hpp"

#if defined(__F16C__)
#include <immintrin.h>

namespace coldrow_test {

bool has_f16c() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");  // clang has no name for F16C; all with AVX2 have it
}

void hardware_widen(const std::uint16_t* from, float* to, int n) {
  for (int i = 0; i < n; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
  }
}

void hardware_nearest(const float* from, std::uint16_t* to, int n) {
  for (int i = 0; i < n; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
  }
}

}  // namespace coldrow_test
#else
namespace coldrow_test {
bool has_f16c() { return false; }
void hardware_widen(const std::uint16_t*, float*, int) {}
void hardware_nearest(const float*, std::uint16_t*, int) {}
}  // namespace coldrow_test
#endif
