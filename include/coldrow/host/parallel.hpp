// Threads and memory of the host drivers.
//
// OpenMP, because torch runs on it: sharing its runtime means one pool of threads and one setting
// (torch.set_num_threads). Without OpenMP everything runs in the calling thread. No driver's result
// depends on the number of threads.
#pragma once

#include "tuning.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

COLDROW_BEGIN

namespace host {

// Calls f(part) once for each part in [0, parts), in parallel.
template <class F>
void parallel(int parts, const F& f) {
  if (parts <= 1) {
    f(0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(parts)
  for (int part = omp_get_thread_num(); part < parts; part += omp_get_num_threads()) f(part);
#else
  for (int part = 0; part < parts; ++part) f(part);
#endif
}

// Calls f(part, thread) once for each part in [0, parts), each by whichever of `threads` threads is free.
template <class F>
void parallel_parts(int parts, int threads, const F& f) {
  if (parts <= 1 || threads <= 1) {
    for (int part = 0; part < parts; ++part) f(part, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int part = 0; part < parts; ++part) f(part, omp_get_thread_num());
#else
  for (int part = 0; part < parts; ++part) f(part, 0);
#endif
}

// The first item of `part` when n items are cut into `parts`.
inline std::int64_t part_begin(std::int64_t n, int part, int parts) {
  return static_cast<std::int64_t>(static_cast<double>(n) * part / parts);
}

// Hands out pieces of one block of memory. With a null base it only counts, so the same code first
// measures what it needs and then takes it.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class T>
  T* take(std::int64_t count) {
    used_ = (used_ + 63) / 64 * 64;
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += static_cast<std::size_t>(count) * sizeof(T);
    return piece;
  }
  std::size_t bytes() const { return used_; }

 private:
  unsigned char* base_;
  std::size_t used_ = 0;
};

// Fetches `bytes` bytes (known when compiling, or not) into the second-level cache. For what lies far
// apart that is much better than the first: it waits for many more lines at once (on Zen 4 a gather of
// rows of 256 bytes takes 0.64 of the time), and what reading from there costs is hidden.
// The empty asm is needed: gcc takes a function that does nothing but prefetch for one without any
// effect, and removes the calls to it.
COLDROW_HOST_INLINE void prefetch(const void* address, std::size_t bytes) {
  const char* const p = static_cast<const char*>(address);
  __asm__ volatile("");
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 1);
}
// Fetches on into the first-level cache what is written soon and lies in the second.
COLDROW_HOST_INLINE void prefetch_near(const void* address, std::size_t bytes) {
  const char* const p = static_cast<const char*>(address);
  __asm__ volatile("");
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 1, 3);
}

}  // namespace host

COLDROW_END
