#include <coldrow/device/tuning.hpp>
#include <coldrow/device/workspace.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

using device::ApplyLaunch;
using device::choose_apply;
using device::choose_flat;
using device::choose_tiles;
using device::Launch;
using device::Machine;
using device::TileLaunch;

constexpr Machine kLarge{132};

TEST(DeviceTuning, LanesHoldTheRow) {
  EXPECT_EQ(device::block_for(4), 4);
  EXPECT_EQ(device::block_for(2), 8);
  for (const int block : {4, 8}) {
    for (int dim = 1; dim <= 1000; ++dim) {
      const int lanes = device::lanes_for(dim, block);
      EXPECT_TRUE(lanes == 32 || lanes * block >= dim);
      EXPECT_TRUE(lanes == 1 || lanes / 2 * block < dim) << "half as many would do";
      EXPECT_EQ(lanes & (lanes - 1), 0);
    }
  }
  static_assert(device::lanes_for(64, 4) == 16 && device::lanes_for(128, 8) == 16);
}

// The mean of squares is added over these lanes: another choice would give other bits.
TEST(DeviceTuning, LanesThatUpdateARow) {
  static_assert(device::update_lanes_for(1, 4) == 1 && device::update_lanes_for(16, 4) == 4 &&
                device::update_lanes_for(32, 4) == 8 && device::update_lanes_for(64, 4) == 8 &&
                device::update_lanes_for(65, 4) == 16 && device::update_lanes_for(128, 4) == 16 &&
                device::update_lanes_for(256, 4) == 32 && device::update_lanes_for(9999, 4) == 32);
  static_assert(device::update_lanes_for(64, 8) == 8 && device::update_lanes_for(128, 8) == 8 &&
                device::update_lanes_for(256, 8) == 16 && device::update_lanes_for(257, 8) == 32);
  for (const int block : {4, 8}) {
    for (int dim = 1; dim < 1000; ++dim) {
      EXPECT_LE(device::update_lanes_for(dim, block), device::update_lanes_for(dim + 1, block));
    }
  }
}

TEST(DeviceTuning, LaunchesAreNeverEmptyAndNeverTooLarge) {
  for (const std::int64_t items : {0ll, 1ll, 127ll, 128ll, 129ll, 10000000ll, 1ll << 40}) {
    const Launch flat = choose_flat(items, kLarge);
    EXPECT_GE(flat.blocks, 1);
    EXPECT_LE(flat.blocks, 132 * 2048 / device::kThreads);
    const TileLaunch tiles = choose_tiles(items, 3, device::kThreads, kLarge);
    EXPECT_GE(tiles.launch.blocks, 1);
    EXPECT_LE(tiles.launch.blocks, 2 * 132 * 2048 / device::kThreads);
    EXPECT_GE(tiles.rounds, 1);
    EXPECT_LE(tiles.rounds, device::kMaxRounds);
    // Few items: one each, over many blocks.
    EXPECT_TRUE(items > 1000 || tiles.rounds == 1);
    EXPECT_TRUE(items < 1 << 20 || tiles.rounds == device::kMaxRounds);
  }
  EXPECT_EQ(choose_flat(129, kLarge).blocks, 2);
}

TEST(DeviceTuning, SumsFitInSharedMemoryOrGoToTheWorkspace) {
  for (const int block : {4, 8}) {
    for (int widest = 1; widest < 40000; widest += widest < 300 ? 1 : 97) {
      const ApplyLaunch a = choose_apply(1000000, 5, widest, block, 500, kLarge);
      EXPECT_GE(a.launch.threads, 32);
      if (a.sums_in_workspace) {
        EXPECT_EQ(a.launch.threads, 32);
        EXPECT_GE(a.workspace_floats, a.launch.blocks * device::sum_stride(widest));
        for (int dim = 1; dim <= 600; ++dim) {
          const int tiles = 32 / device::update_lanes_for(dim, block);
          ASSERT_GE(a.workspace_floats, a.launch.blocks * tiles * device::sum_stride(dim));
        }
        continue;
      }
      EXPECT_LE(a.launch.shared_bytes, device::kMaxShared);
      // Every dim up to the widest has room, in as many tiles as the block then has.
      for (int dim = 1; dim <= widest; dim += dim < 600 || dim + 100 > widest ? 1 : 100) {
        const int tiles = a.launch.threads / device::update_lanes_for(dim, block);
        ASSERT_LE(500 + tiles * device::sum_stride(dim) * 4, a.launch.shared_bytes)
            << "dim " << dim << " of " << widest;
      }
    }
  }
  EXPECT_FALSE(choose_apply(100, 1, 6000, 4, 500, kLarge).sums_in_workspace);
  EXPECT_TRUE(choose_apply(100, 1, 20000, 4, 500, kLarge).sums_in_workspace);
}

TEST(DeviceTuning, ChoicesCompareAndRepeat) {
  static_assert(choose_apply(1 << 20, 1, 128, 4, 256, kLarge) ==
                choose_apply(1 << 20, 1, 128, 4, 256, kLarge));
  static_assert(!(choose_apply(1 << 20, 1, 128, 4, 256, kLarge) ==
                  choose_apply(1 << 20, 1, 128, 4, 256, {1})));
}

TEST(DeviceWorkspace, CountsWhatItHandsOut) {
  const auto take = [](device::Workspace& w) {
    w.take<char>(1);
    auto* piece = w.take<double>(5);
    w.take<int>(0);
    w.take<int>(3);
    return piece;
  };
  device::Workspace counting(nullptr);
  EXPECT_EQ(take(counting), nullptr);
  EXPECT_EQ(counting.bytes(), 512u + 12u);
  alignas(256) static unsigned char memory[1024];
  device::Workspace real(memory);
  EXPECT_EQ(static_cast<void*>(take(real)), memory + 256);
  EXPECT_EQ(real.bytes(), counting.bytes());
}

}  // namespace
}  // namespace coldrow_test
