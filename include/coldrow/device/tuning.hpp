// Launch choices: small structs that can be compared, picked by functions without state. Nothing here
// needs CUDA. No result depends on a choice.
#pragma once

#include "../table/run.hpp"

COLDROW_BEGIN

namespace device {

struct Launch {
  int blocks = 1;
  int threads = 32;
  int shared_bytes = 0;
  bool operator==(const Launch&) const = default;
};

// What a selector has to know of the device.
struct Machine {
  int multiprocessors = 1;
  bool operator==(const Machine&) const = default;
};

inline constexpr int kThreads = 128;
// Blocks a multiprocessor is to hold at once: what bounds the registers of a thread. These are the
// largest numbers at which the compiler keeps everything in registers (nvcc 13.0 for sm_90), the
// update's by whether the optimizer has state per element.
COLDROW_HD constexpr int apply_blocks(int vector_states) { return vector_states > 0 ? 4 : 5; }
inline constexpr int kLookupBlocks = 5;
inline constexpr int kWeightGradientBlocks = 4;
inline constexpr int kThreadsPerMultiprocessor = 2048;
inline constexpr int kMaxShared = 48 * 1024;  // what a block may have without asking for more

// A tile takes up to this many items one after another before its block looks which table comes next.
// Each time costs a tile some waits for memory, as many as two or three rows do.
inline constexpr int kMaxRounds = 16;

// Neighbouring columns of a row that one lane handles at once: 16 bytes of them.
COLDROW_HD constexpr int block_for(int weight_bytes) { return 16 / weight_bytes; }

// Lanes that read a row together: enough to take it in one go, at most a warp.
COLDROW_HD constexpr int lanes_for(int dim, int block) {
  int lanes = 1;
  while (lanes < 32 && lanes * block < dim) lanes *= 2;
  return lanes;
}

// Lanes that update a row together. An update is a chain of waits (gradient, state, the sum of squares
// over the lanes, weights), so what counts is how many rows are under way: from 8 lanes on, each takes
// two blocks before there are more lanes. (No fewer: they also look up the gradients of a run, one each.)
// The mean of squares is added over these lanes, so results depend on this function: it is no choice
// of the launch.
COLDROW_HD constexpr int update_lanes_for(int dim, int block) {
  int lanes = 1;
  while (lanes < 32 && lanes * block * (lanes < 8 ? 1 : 2) < dim) lanes *= 2;
  return lanes;
}

// One thread per item, as many as are of use: a grid-stride loop takes the rest.
constexpr Launch choose_flat(std::int64_t items, Machine machine) {
  const std::int64_t most =
      std::int64_t{machine.multiprocessors} * (kThreadsPerMultiprocessor / kThreads);
  return {static_cast<int>(max_of<std::int64_t>(1, min_of(divide_up(items, kThreads), most))),
          kThreads, 0};
}

// Blocks of tiles, and how many items each tile takes in a row: that saves work where there are many
// items, and would leave multiprocessors idle where there are few.
struct TileLaunch {
  Launch launch{};
  int rounds = 1;
  bool operator==(const TileLaunch&) const = default;
};

// Tiles of up to 32 lanes over at most `items` items of up to `groups` tables or features.
constexpr TileLaunch choose_tiles(std::int64_t items, std::int64_t groups, int threads,
                                  Machine machine) {
  const std::int64_t most =
      2 * std::int64_t{machine.multiprocessors} * (kThreadsPerMultiprocessor / threads);
  const std::int64_t warps = threads / 32;
  const std::int64_t rounds =
      max_of<std::int64_t>(1, min_of<std::int64_t>(kMaxRounds, items / (most * warps)));
  const std::int64_t full = divide_up(items, warps * rounds) + groups;
  return {{static_cast<int>(max_of<std::int64_t>(1, min_of(full, most))), threads, 0},
          static_cast<int>(rounds)};
}

// The update of rows: every tile keeps the summed gradient of its row in shared memory, or, where rows
// are so wide that a single warp's would not fit, in the workspace.
struct ApplyLaunch {
  Launch launch{};
  int rounds = 1;
  bool sums_in_workspace = false;
  std::int64_t workspace_floats = 0;
  bool operator==(const ApplyLaunch&) const = default;
};

// Floats between the sums of neighbouring tiles: whole 16-byte accesses.
COLDROW_HD constexpr std::int64_t sum_stride(int dim) { return (std::int64_t{dim} + 7) / 8 * 8; }

// Floats that the sums of `threads` threads' tiles take, whatever the dims of up to `widest`.
constexpr std::int64_t sums_floats(int widest, int block, int threads) {
  std::int64_t most = 0;
  for (int lanes = 1; lanes <= 32; lanes *= 2) {
    // The widest row that such tiles are for.
    int dim = min_of(widest, 2 * lanes * block);
    while (dim > 1 && update_lanes_for(dim, block) > lanes) --dim;
    if (lanes == 32) dim = widest;
    if (update_lanes_for(dim, block) != lanes) continue;
    most = max_of(most, threads / lanes * sum_stride(dim));
  }
  return most;
}

// fixed_bytes: shared memory the block needs besides. widest: the largest dim of its tables.
constexpr ApplyLaunch choose_apply(std::int64_t items, std::int64_t groups, int widest, int block,
                                   int fixed_bytes, Machine machine) {
  int threads = kThreads;
  const auto bytes = [&](int n) { return fixed_bytes + sums_floats(widest, block, n) * 4; };
  while (threads > 32 && bytes(threads) > kMaxShared) threads /= 2;
  ApplyLaunch choice;
  const TileLaunch tiles = choose_tiles(items, groups, threads, machine);
  choice.launch = tiles.launch;
  choice.rounds = tiles.rounds;
  if (bytes(threads) <= kMaxShared) {
    choice.launch.shared_bytes = static_cast<int>(bytes(threads));
  } else {
    // One warp to a multiprocessor's quarter: the sums of more would not stay in its caches.
    choice.launch.blocks = min_of(choice.launch.blocks, 4 * machine.multiprocessors);
    choice.launch.shared_bytes = fixed_bytes;
    choice.sums_in_workspace = true;
    choice.workspace_floats = choice.launch.blocks * sums_floats(widest, block, threads);
  }
  return choice;
}

}  // namespace device

COLDROW_END
