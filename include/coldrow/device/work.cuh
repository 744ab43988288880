// How the items of several tables or features (runs, bags) are dealt to blocks. Each gets whole
// blocks of its own, so that its width, pointers and policy are the same for all threads of a block;
// which blocks those are is found on the device, where the numbers of items are known.
#pragma once

#include "group.cuh"

COLDROW_BEGIN

namespace device {

// How a launch goes through its parts (tables or features): part i has blocks
// [first_block[i], first_block[i + 1]), each of `threads` threads in tiles that take `rounds` items.
struct Deal {
  const std::int32_t* first_block = nullptr;  // [parts + 1]
  std::int32_t parts = 0;
  std::int32_t threads = 0;
  std::int32_t rounds = 0;

  COLDROW_HD std::int64_t items_per_block(int lanes) const {
    return std::int64_t{threads} / lanes * rounds;
  }
  __device__ __forceinline__ std::int32_t blocks() const { return first_block[parts]; }
};

// Fills deal.first_block (given as first_block, to write): items(i) are part i's, in tiles of lanes(i).
// One warp.
template <class Items, class LanesOf>
__device__ inline void deal_blocks(const Deal& deal, const Items& items, const LanesOf& lanes,
                                   std::int32_t* first_block) {
  const int lane = static_cast<int>(threadIdx.x);
  std::int32_t before = 0;
  for (std::int32_t first = 0; first < deal.parts; first += 32) {
    const std::int32_t i = first + lane;
    std::int32_t blocks = 0;
    if (i < deal.parts) {
      blocks = static_cast<std::int32_t>(divide_up(items(i), deal.items_per_block(lanes(i))));
    }
    std::int32_t sum = blocks;
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::int32_t other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (i < deal.parts) first_block[i] = before + sum - blocks;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) first_block[deal.parts] = before;
}

// What one block does at a time: items [first, last) of part `part`, counted from 0 within it.
struct Share {
  std::int32_t part;
  std::int64_t first, last;
};

template <class LanesOf>
__device__ __forceinline__ Share share_of(const Deal& deal, std::int32_t block,
                                          const LanesOf& lanes) {
  Share share;
  share.part =
      last_at_or_before(deal.parts, [&](std::int32_t i) { return deal.first_block[i]; }, block);
  const std::int64_t size = deal.items_per_block(lanes(share.part));
  share.first = (block - deal.first_block[share.part]) * size;
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

COLDROW_HD constexpr int round_up_16(std::size_t bytes) {
  return static_cast<int>((bytes + 15) / 16 * 16);
}

}  // namespace device

COLDROW_END
