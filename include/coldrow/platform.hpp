// What the rest of coldrow assumes of the compiler: C++20, and one name for "host and device".
#pragma once

#if !defined(__cplusplus) || __cplusplus < 202002L
#error "coldrow needs C++20 or later: compile with -std=c++20"
#endif

#if defined(__CUDACC_RTC__)
#include "nvrtc_std.hpp"
#else
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#endif

#define COLDROW_VERSION_MAJOR 0
#define COLDROW_VERSION_MINOR 1
#define COLDROW_VERSION_PATCH 0

#if defined(__CUDACC__)
#define COLDROW_HD __host__ __device__ __forceinline__
#else
#define COLDROW_HD inline
#endif

// Code as a device runs it: in nvcc's device pass, and in the tests' stand-in for one on the host.
#if defined(__CUDA_ARCH__) || defined(COLDROW_SIMT)
#define COLDROW_ON_DEVICE
#endif

// A function of a few instructions that must not become a call (vectors would go through memory).
#define COLDROW_HOST_INLINE inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define COLDROW_INLINE COLDROW_HD
#else
#define COLDROW_INLINE COLDROW_HOST_INLINE
#endif

// Before a loop over the values of a block. It keeps gcc from unrolling the loop before its
// vectoriser has seen it; without it policies on bfloat16 come out scalar. (The host compiler behind
// nvcc is given the text as nvcc rewrote it, and knows no "unroll".)
#if defined(__CUDA_ARCH__)
#define COLDROW_LANES _Pragma("unroll")
#elif defined(__CUDACC__) || defined(__clang__)
#define COLDROW_LANES
#elif defined(__GNUC__)
#define COLDROW_LANES _Pragma("GCC unroll 1") _Pragma("GCC ivdep")
#else
#define COLDROW_LANES
#endif

// A binary that compiles these headers for several instruction sets gives each build a name of its
// own. Without it the linker would merge the inline functions of all builds into any one of them,
// and a machine without AVX-512 would run AVX-512 code.
#ifndef COLDROW_ABI
#define COLDROW_ABI v0
#endif
#define COLDROW_BEGIN \
  namespace coldrow { \
  inline namespace COLDROW_ABI {
#define COLDROW_END \
  }                 \
  }
