// One value between float32 and a storage type: widen (exact), nearest (ties to even), stochastic.
//
// nearest() and widen() give the bits that F16C hardware gives, NaNs included, so builds with and
// without it agree. stochastic() takes 16 random bits r and rounds up with the probability that the
// dropped part has of reaching r: exact for bfloat16 and for normal float16, within 2^-16 of a unit
// in the last place for subnormal float16. Infinities and NaNs pass through unrounded.
//
// On a device, widen() and nearest() are the hardware's conversions: the same values, one instruction
// instead of ten; a NaN stays a NaN, of the hardware's own bits (as after any arithmetic there).
#pragma once

#include "math.hpp"
#include "types.hpp"

COLDROW_BEGIN

template <Numeric T>
struct Convert;

template <>
struct Convert<float> {
  static COLDROW_HD float widen(float x) { return x; }
  static COLDROW_HD float nearest(float x) { return x; }
  static COLDROW_HD float stochastic(float x, std::uint32_t) { return x; }  // nothing is dropped
};

template <>
struct Convert<bfloat16> {
  static COLDROW_HD float widen(bfloat16 x) {
    return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
  }
  static COLDROW_HD bfloat16 nearest(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    std::uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
#else
    const auto b = bit_cast<std::uint32_t>(x);
    return add_and_cut(b, 0x7fffu + ((b >> 16) & 1u));
#endif
  }
  static COLDROW_HD bfloat16 stochastic(float x, std::uint32_t random16) {
    return add_and_cut(bit_cast<std::uint32_t>(x), random16);
  }

 private:
  static COLDROW_HD bfloat16 add_and_cut(std::uint32_t b, std::uint32_t addend) {
    const std::uint32_t rounded = (b + addend) >> 16;
    const std::uint32_t quiet_nan = (b >> 16) | 0x40u;
    const bool nan = (b & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>(nan ? quiet_nan : rounded)};
  }
};

template <>
struct Convert<half> {
  static COLDROW_HD float widen(half x) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    const std::uint32_t sign = (x.bits & 0x8000u) << 16;
    const std::uint32_t rest = x.bits & 0x7fffu;
    const std::uint32_t normal = (rest << 13) + (112u << 23);
    const std::uint32_t subnormal = bit_cast<std::uint32_t>(static_cast<float>(rest) * 0x1p-24f);
    const std::uint32_t special = 0x7f800000u | (rest << 13) | (rest > 0x7c00u ? 0x00400000u : 0u);
    const std::uint32_t value = rest >= 0x7c00u ? special : rest < 0x0400u ? subnormal : normal;
    return bit_cast<float>(sign | value);
#endif
  }
  static COLDROW_HD half nearest(float x) {
#if defined(__CUDA_ARCH__)
    std::uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
#else
    const auto b = bit_cast<std::uint32_t>(x);
    const std::uint32_t a = b & 0x7fffffffu;
    const std::uint32_t normal = ((a + 0x0fffu + ((a >> 13) & 1u)) >> 13) - (112u << 10);
    // Below 2^-14 the spacing is 2^-24, that of [0.5, 1): adding 0.5 lets the adder round.
    const std::uint32_t subnormal =
        bit_cast<std::uint32_t>(bit_cast<float>(a < kFirstNormal ? a : 0u) + 0.5f) - 0x3f000000u;
    return assemble(b, a, a < kFirstNormal ? subnormal : normal);
#endif
  }
  static COLDROW_HD half stochastic(float x, std::uint32_t random16) {
    const auto b = bit_cast<std::uint32_t>(x);
    const std::uint32_t a = b & 0x7fffffffu;
    const std::uint32_t normal = ((a + (random16 & 0x1fffu)) >> 13) - (112u << 10);
    const float tiny = bit_cast<float>(a < kFirstNormal ? a : 0u);
    const std::uint32_t subnormal =
        (static_cast<std::uint32_t>(static_cast<std::int32_t>(tiny * 0x1p40f)) + random16) >> 16;
    return assemble(b, a, a < kFirstNormal ? subnormal : normal);
  }

 private:
  static constexpr std::uint32_t kFirstNormal = 0x38800000u;  // 2^-14
  static COLDROW_HD half assemble(std::uint32_t b, std::uint32_t a, std::uint32_t rounded) {
    const std::uint32_t nan = 0x7e00u | ((a >> 13) & 0x03ffu);
    std::uint32_t value = rounded < 0x7c00u ? rounded : 0x7c00u;
    value = a >= 0x47800000u ? 0x7c00u : value;  // 65536 and above
    value = a > 0x7f800000u ? nan : value;
    return {static_cast<std::uint16_t>(((b >> 16) & 0x8000u) | value)};
  }
};

COLDROW_END
