// How the items of several tables or features (runs, bags) are dealt to blocks. Each gets whole
// blocks of its own, so that its width, pointers and policy are the same for all threads of a block;
// which blocks those are is found on the device, where the numbers of items are known.
#pragma once

#include "group.cuh"

COLDROW_BEGIN

namespace device {

// Items that a block of `threads` takes of a table or feature in tiles of `lanes`.
COLDROW_HD constexpr std::int64_t items_per_block(int threads, int lanes) {
  return std::int64_t{threads} / lanes * kRounds;
}

// first_block[i] = blocks of the parts before part i, for i in [0, count]: items(i) are part i's, in
// tiles of lanes(i). One warp.
template <class Items, class LanesOf>
__device__ inline void deal_blocks(std::int32_t count, int threads, const Items& items,
                                   const LanesOf& lanes, std::int32_t* first_block) {
  const int lane = static_cast<int>(threadIdx.x);
  std::int32_t before = 0;
  for (std::int32_t first = 0; first < count; first += 32) {
    const std::int32_t i = first + lane;
    std::int32_t blocks = 0;
    if (i < count) {
      blocks = static_cast<std::int32_t>(divide_up(items(i), items_per_block(threads, lanes(i))));
    }
    std::int32_t sum = blocks;
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::int32_t other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (i < count) first_block[i] = before + sum - blocks;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) first_block[count] = before;
}

// What one block does at a time: items [first, last) of part `part`.
struct Share {
  std::int32_t part;
  std::int64_t first, last;
};

// `block`'s share, counted from 0 within its part.
template <class LanesOf>
__device__ __forceinline__ Share share_of(std::int32_t block, std::int32_t count, int threads,
                                          const std::int32_t* first_block, const LanesOf& lanes) {
  Share share;
  share.part = last_at_or_before(
      count, [&](std::int32_t i) { return first_block[i]; }, block);
  const std::int64_t size = items_per_block(threads, lanes(share.part));
  share.first = (block - first_block[share.part]) * size;
  share.last = share.first + size;
  return share;
}

// Copies an object to shared memory with all threads of the block; a barrier has to follow.
template <class T>
__device__ __forceinline__ void copy_to_shared(T* to, const T* from) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0);
  for (unsigned i = threadIdx.x; i < sizeof(T) / 4; i += blockDim.x) {
    reinterpret_cast<std::uint32_t*>(to)[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
  }
}

COLDROW_HD constexpr int round_up_16(std::size_t bytes) { return static_cast<int>((bytes + 15) / 16 * 16); }

}  // namespace device

COLDROW_END
