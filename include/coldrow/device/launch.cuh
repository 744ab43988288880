// What the device drivers need of CUDA beyond the language: launches, dynamic shared memory,
// prefetching. Under COLDROW_SIMT the tests' stand-in for a device provides the same names on the
// host (tests/cpp/device/simt.hpp), so that the kernels can be run without one.
#pragma once

#include "../numeric/math.hpp"
#include "tuning.hpp"

#if !defined(COLDROW_SIMT)
#include <cuda_runtime.h>
#endif

// Before a loop whose body already has as many loads under way as it should.
#if defined(__CUDACC__)
#define COLDROW_ROLLED _Pragma("unroll 1")
#else
#define COLDROW_ROLLED
#endif

COLDROW_BEGIN

namespace device {

// Launches kernels one after another on a stream and keeps the first error. It neither waits nor
// allocates, so what is put on it may be captured in a graph.
struct Queue {
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaSuccess;

  explicit Queue(cudaStream_t s) : stream(s) {}

  template <class... Params, class... Args>
  void run(void (*kernel)(Params...), const Launch& launch, const Args&... args) {
    if (error != cudaSuccess) return;
#if defined(COLDROW_SIMT)
    simt::launch(launch.blocks, launch.threads, static_cast<std::size_t>(launch.shared_bytes),
                 [=] { kernel(args...); });
#else
    // clang-format off
    kernel<<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(args...);
    // clang-format on
#endif
    error = cudaGetLastError();
  }
  // What a call of the runtime returned. The runtime remembers an error until it is asked for, which
  // the next launch would do: it is forgotten here.
  void add(cudaError_t e) {
    if (e != cudaSuccess) static_cast<void>(cudaGetLastError());
    if (error == cudaSuccess) error = e;
  }
};

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* shared_memory() {
#if defined(COLDROW_SIMT)
  return simt::shared_memory();
#else
  extern __shared__ uint4 coldrow_shared_memory[];
  return reinterpret_cast<unsigned char*>(coldrow_shared_memory);
#endif
}

// Brings the line at `p` nearer: what a group will need next should be on its way while the present
// row is worked on.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Tells the compiler that p is in device memory, not in a block's, where it cannot see that (it came
// through a shuffle, or lies in shared memory itself): its accesses need not find out.
template <class T>
__device__ __forceinline__ T* in_global_memory(T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Number of this thread in the grid, and of threads in it.
__device__ __forceinline__ std::int64_t global_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ std::int64_t global_threads() {
  return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

// The last i in [0, n) with first(i) <= x; first must not decrease, and first(0) <= x.
template <class Int, class First, class T>
__device__ __forceinline__ Int last_at_or_before(Int n, const First& first, T x) {
  Int lo = 0;
  while (n > 1) {
    const Int half = n / 2;
    if (first(lo + half) <= x) lo += half;
    n -= half;
  }
  return lo;
}

}  // namespace device

COLDROW_END
