// What coldrow's headers for device code (numeric/, policy/, row/, table/table.hpp) take from the
// standard library, and a little that policies like to use, for NVRTC, which compiles at run time
// and has no standard library.
//
// The names are in namespace std, so that one policy header serves a host compiler, nvcc and NVRTC.
// A program that has given NVRTC a standard library of its own defines COLDROW_NVRTC_HAS_STD.
#pragma once

#if defined(__CUDACC_RTC__) && !defined(COLDROW_NVRTC_HAS_STD)

// nvcc and host compilers have this builtin; NVRTC has the function alone.
#define __builtin_memcpy memcpy

namespace std {

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;  // as in CUDA's own library, for NVRTC
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using size_t = decltype(sizeof(0));
using uintptr_t = unsigned long;
using ptrdiff_t = long;
using nullptr_t = decltype(nullptr);
static_assert(sizeof(int32_t) == 4 && sizeof(int64_t) == 8);

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  __host__ __device__ constexpr operator T() const noexcept { return v; }
};
template <bool v>
using bool_constant = integral_constant<bool, v>;

template <class, class>
inline constexpr bool is_same_v = false;
template <class T>
inline constexpr bool is_same_v<T, T> = true;
template <class T>
inline constexpr bool is_trivially_copyable_v = __is_trivially_copyable(T);
template <class From, class To>
inline constexpr bool is_convertible_v = __is_convertible_to(From, To);

template <bool, class T, class>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool choice, class T, class F>
using conditional_t = typename conditional<choice, T, F>::type;

template <class T>
__host__ __device__ T&& declval() noexcept;

template <class T, class U>
concept same_as = is_same_v<T, U> && is_same_v<U, T>;
template <class From, class To>
concept convertible_to =
    is_convertible_v<From, To> && requires { static_cast<To>(declval<From>()); };

}  // namespace std

// In the words of CUDA's own library, which defines them again if it is included later.
#ifndef INT_MAX
#define INT_MAX 0x7fffffff
#endif
#ifndef INT32_MAX
#define INT32_MAX INT_MAX
#endif

#endif
