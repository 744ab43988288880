// Who updates a row together: one thread, or the lanes of a warp.
//
// A group has
//     static constexpr int block;   // neighbouring columns a member handles at once
//     int rank() const, size() const;
//     float sum(float x) const;     // over members, the same value for all, in a fixed order; what
//                                   // members read from memory before, one may write after
// Member `rank` handles the blocks rank, rank + size, rank + 2*size, ...
#pragma once

#include "../platform.hpp"

COLDROW_BEGIN

// block is a power of two up to 16.
template <class G>
concept Group = requires(const G g, float x) {
  requires G::block >= 1 && G::block <= 16 && (G::block & (G::block - 1)) == 0;
  { G::block } -> std::convertible_to<int>;
  { g.rank() } -> std::same_as<int>;
  { g.size() } -> std::same_as<int>;
  { g.sum(x) } -> std::same_as<float>;
};

// One thread. The block of 16 is what a host compiler turns into vector registers.
struct Serial {
  static constexpr int block = 16;
  COLDROW_HD int rank() const { return 0; }
  COLDROW_HD int size() const { return 1; }
  COLDROW_HD float sum(float x) const { return x; }
};

#if defined(__CUDACC__)
// The 32 lanes of a warp, all of them active.
struct Warp {
  static constexpr int block = 4;
  __device__ int rank() const { return static_cast<int>(threadIdx.x & 31u); }
  __device__ int size() const { return 32; }
  // (Members read a row's state before they meet here, and the first writes it after: shuffles alone do
  // not order that.)
  __device__ float sum(float x) const {
    __syncwarp();
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
  }
};
#endif

COLDROW_END
