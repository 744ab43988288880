// The few scalar functions the formulas use, each with one result on every target.
//
// No fusion is left to the compiler: where a*b+c is to be rounded once the code says fma(), and
// every build uses -ffp-contract=off (nvcc: -fmad=false). exp2_fixed() replaces libm's exp2, whose
// last bit differs between C libraries, instruction sets and devices.
#pragma once

#include "../platform.hpp"

COLDROW_BEGIN

template <class To, class From>
COLDROW_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

// In a namespace of their own: beside `using namespace coldrow` they would clash with C's.
namespace math {
#if defined(__CUDA_ARCH__)
COLDROW_HD float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
COLDROW_HD double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
COLDROW_HD float sqrt(float x) { return __fsqrt_rn(x); }
COLDROW_HD double log1p(double x) { return ::log1p(x); }
#else
COLDROW_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
COLDROW_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
COLDROW_HD float sqrt(float x) { return __builtin_sqrtf(x); }
COLDROW_HD double log1p(double x) { return __builtin_log1p(x); }
#endif
}  // namespace math

COLDROW_HD bool is_finite(float x) {
  return (bit_cast<std::uint32_t>(x) & 0x7f800000u) != 0x7f800000u;
}

template <class T>
COLDROW_HD constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
COLDROW_HD constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

COLDROW_HD constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

inline constexpr float kSmallestNormal = 1.17549435e-38f;
inline constexpr float kLargestFloat = 3.40282347e+38f;

// 2^x for x <= 0, relative error below 1e-13, 0 where the result is below the smallest normal
// float32; NaN for any other x (which only spoiled state leads to). Taylor series of 2^f on
// |f| <= 1/2; the coefficients are ln(2)^k / k!.
COLDROW_HD double exp2_fixed(double x) {
  if (x < -126.0) return 0.0;  // also x = -inf
  if (!(x <= 0.0)) return bit_cast<double>(std::uint64_t{0x7ff8} << 48);
  const int whole = static_cast<int>(x - 0.5);
  const double f = x - whole;
  double p = 4.445538271870811e-10;
  p = math::fma(p, f, 7.054911620801121e-09);
  p = math::fma(p, f, 1.0178086009239696e-07);
  p = math::fma(p, f, 1.3215486790144305e-06);
  p = math::fma(p, f, 1.5252733804059838e-05);
  p = math::fma(p, f, 0.00015403530393381606);
  p = math::fma(p, f, 0.0013333558146428441);
  p = math::fma(p, f, 0.009618129107628477);
  p = math::fma(p, f, 0.055504108664821576);
  p = math::fma(p, f, 0.2402265069591007);
  p = math::fma(p, f, 0.6931471805599453);
  p = math::fma(p, f, 1.0);
  const auto scale = static_cast<std::uint64_t>(1023 + whole) << 52;
  return p * bit_cast<double>(scale);
}

COLDROW_END
