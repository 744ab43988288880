// The stand-in for a device (simt.hpp) with what test programs and the Python module call of CUDA's
// runtime: one device, whose memory is the host's; streams, in which all is done at once; graphs, whose
// capture keeps work to be done at each replay. As on a device, what would wait or allocate while a
// stream is captured is an error, and the last error is remembered until somebody asks.
#pragma once

#include <sys/mman.h>

#include <map>

#include "simt.hpp"

using cudaGraph_t = simt::Recording*;
using cudaGraphExec_t = simt::Recording*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal };
struct cudaDeviceProp {
  char name[16] = "a stand-in";
  int major = 0, minor = 0, multiProcessorCount = 2;
};

namespace simt {
// Does what a call is for, unless a stream is captured.
template <class F>
cudaError_t unless_captured(const F& f) {
  const cudaError_t error = device().recording != nullptr ? cudaErrorStreamCaptureUnsupported : f();
  if (error != cudaSuccess) device().last_error = error;
  return error;
}
inline std::map<void*, std::size_t>& memory() {
  static auto& all = *new std::map<void*, std::size_t>;
  return all;
}
}  // namespace simt

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "unknown error";
  }
}

// ---------------------------------------------------------------------------------------- devices

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int number) {
  return number == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cudaDeviceProp{}.multiProcessorCount;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return simt::unless_captured([] { return cudaSuccess; });
}

// ----------------------------------------------------------------------------------------- memory

inline cudaError_t cudaMemGetInfo(std::size_t* unused, std::size_t* total) {
  *unused = *total = std::size_t{1} << 40;
  return cudaSuccess;
}
// Only what is touched exists. What is small is full of NaNs.
inline cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  return simt::unless_captured([&] {
    *p = mmap(nullptr, bytes + 1, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
    if (bytes < (1u << 24)) std::memset(*p, 0xff, bytes);
    simt::memory()[*p] = bytes + 1;
    return cudaSuccess;
  });
}
inline cudaError_t cudaFree(void* p) {
  return simt::unless_captured([&] {
    if (p != nullptr) munmap(p, simt::memory().at(p));
    simt::memory().erase(p);
    return cudaSuccess;
  });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  return simt::unless_captured([&] {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return cudaSuccess;
  });
}
inline cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  return simt::unless_captured([&] {
    if (value == 0 && simt::memory().contains(to) && bytes >= (1u << 24)) {
      // Zeros that take no memory.
      return madvise(to, bytes, MADV_DONTNEED) == 0 ? cudaSuccess : cudaErrorUnknown;
    }
    if (bytes > 0) std::memset(to, value, bytes);
    return cudaSuccess;
  });
}
// (These could be captured on a device. Nothing here does.)
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                   cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}

// ---------------------------------------------------------------------------- streams and graphs

inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  simt::device().recording = new simt::Recording;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = simt::device().recording;
  simt::device().recording = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                        unsigned long long) {
  *exec = new simt::Recording(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const auto& work : *exec) work();
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
