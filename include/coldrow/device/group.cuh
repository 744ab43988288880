// Groups of device threads that update a row together. (Warp, all 32 lanes of one, is in
// row/group.hpp.)
#pragma once

#include "../row/group.hpp"
#include "launch.cuh"

COLDROW_BEGIN

namespace device {

// 1, 2, 4, ... or 32 neighbouring lanes of a warp; a short row needs no whole warp. The number is
// chosen at run time, so that tables of all widths share a kernel. Other tiles of the warp may be
// elsewhere in the code: every shuffle names this tile's lanes alone.
template <int Block>
struct Tile {
  static constexpr int block = Block;
  int lanes;

  __device__ int rank() const { return static_cast<int>(threadIdx.x) & (lanes - 1); }
  __device__ int size() const { return lanes; }
  // Every lane adds the same pairs in the same order (a + b and b + a are the same bits). What lanes
  // read from memory before, one of them may write after: shuffles alone do not order that.
  __device__ float sum(float x) const {
    __syncwarp(mask());
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      x += __shfl_xor_sync(mask(), x, distance);
    }
    return x;
  }

  // x of the lane with that rank.
  template <class T>
  __device__ T from(T x, int rank) const {
    return __shfl_sync(mask(), x, rank, lanes);
  }
  // What the lanes wrote to memory before is seen by all of them after.
  __device__ void sync() const { __syncwarp(mask()); }
  __device__ unsigned mask() const {
    const unsigned first = (threadIdx.x & 31u) & ~static_cast<unsigned>(lanes - 1);
    return (lanes == 32 ? 0xffffffffu : (1u << lanes) - 1u) << first;
  }
  // Number of this tile in its block.
  __device__ int number() const { return static_cast<int>(threadIdx.x) / lanes; }
};

}  // namespace device

COLDROW_END
