// The stand-in itself: it has to find what it is there to find.
#include "simt.hpp"

#include <gtest/gtest.h>

namespace coldrow_test {
namespace {

std::vector<simt::Order> orders() {
  return {{simt::Order::forward, 0},
          {simt::Order::reverse, 0},
          {simt::Order::random, 1},
          {simt::Order::random, 2}};
}

TEST(Simt, ShufflesAndVotes) {
  for (const simt::Order& order : orders()) {
    const simt::WithOrder with(order);
    std::vector<int> got(64), up(64), half(64);
    std::vector<unsigned> votes(64);
    simt::launch(1, 64, 0, [&] {
      const int i = static_cast<int>(threadIdx.x);
      const auto at = static_cast<std::size_t>(i);
      got[at] = __shfl_xor_sync(0xffffffffu, i, 1);
      up[at] = __shfl_up_sync(0xffffffffu, i, 3);
      votes[at] = __ballot_sync(0xffffffffu, i % 3 == 0);
      const unsigned mask = i % 32 < 16 ? 0xffffu : 0xffff0000u;
      if (i % 32 < 16) half[at] = __shfl_sync(mask, 10 * i, 2, 16);
    });
    for (int i = 0; i < 64; ++i) {
      const auto at = static_cast<std::size_t>(i);
      EXPECT_EQ(got[at], i ^ 1);
      EXPECT_EQ(up[at], i % 32 >= 3 ? i - 3 : i);
      EXPECT_EQ(votes[at], i < 32 ? 0x49249249u : 0x92492492u);
      EXPECT_EQ(half[at], i % 32 < 16 ? 10 * (i / 32 * 32 + 2) : 0);
    }
  }
}

TEST(Simt, BarriersOrderSharedMemory) {
  for (const simt::Order& order : orders()) {
    const simt::WithOrder with(order);
    std::vector<int> out(3 * 96);
    simt::launch(3, 96, 96 * sizeof(int), [&] {
      auto* const shared = reinterpret_cast<int*>(simt::shared_memory());
      shared[threadIdx.x] = static_cast<int>(blockIdx.x * 1000 + threadIdx.x);
      __syncthreads();
      out[blockIdx.x * 96 + threadIdx.x] = shared[95 - threadIdx.x];
    });
    for (int b = 0; b < 3; ++b) {
      for (int i = 0; i < 96; ++i) {
        EXPECT_EQ(out[static_cast<std::size_t>(b * 96 + i)], b * 1000 + 95 - i);
      }
    }
  }
}

// Without the barrier some order reads what is not yet written.
TEST(Simt, AMissingBarrierShows) {
  bool wrong = false;
  for (const simt::Order& order : orders()) {
    const simt::WithOrder with(order);
    std::vector<int> out(32);
    simt::launch(1, 32, 32 * sizeof(int), [&] {
      auto* const shared = reinterpret_cast<int*>(simt::shared_memory());
      shared[threadIdx.x] = 1;
      out[threadIdx.x] = shared[31 - threadIdx.x];
    });
    for (const int x : out) wrong = wrong || x != 1;
  }
  EXPECT_TRUE(wrong);
}

TEST(Simt, DivergenceIsAFault) {
  const auto run = [](const std::function<void()>& body) { simt::launch(1, 32, 0, body); };
  // A lane that does not come.
  EXPECT_THROW(run([] {
                 if (threadIdx.x != 7) __syncwarp();
               }),
               simt::Fault);
  // Two places. (In a macro all of them would be one.)
  const auto two_places = [] {
    if (threadIdx.x < 16) {
      __shfl_sync(0xffffffffu, 1, 0);
    } else {
      __shfl_sync(0xffffffffu, 1, 0);
    }
  };
  EXPECT_THROW(run(two_places), simt::Fault);
  // A mask without the lane itself, a lane outside the mask, a barrier missed.
  EXPECT_THROW(run([] { __syncwarp(1u); }), simt::Fault);
  EXPECT_THROW(run([] {
                 if (threadIdx.x < 4) __shfl_sync(0xfu, 1, 9);
               }),
               simt::Fault);
  EXPECT_THROW(run([] {
                 if (threadIdx.x > 0) __syncthreads();
               }),
               simt::Fault);
  EXPECT_THROW(simt::launch(0, 32, 0, [] {}), simt::Fault);
  EXPECT_THROW(simt::launch(1, 32, 49 * 1024, [] {}), simt::Fault);
}

TEST(Simt, SortIsStableAndByTheBitsAsked) {
  std::vector<std::uint32_t> keys{0x105, 0x001, 0x205, 0x001}, other(4), payload{0, 1, 2, 3},
      other_payload(4);
  std::size_t bytes = 0;
  bool second = false;
  std::uint32_t* const k[2] = {keys.data(), other.data()};
  std::uint32_t* const p[2] = {payload.data(), other_payload.data()};
  simt::radix_sort_pairs(nullptr, bytes, k, p, 4, 8, second, nullptr);
  std::vector<char> temp(bytes);
  simt::radix_sort_pairs(temp.data(), bytes, k, p, 4, 8, second, nullptr);
  EXPECT_TRUE(second);
  EXPECT_EQ(other_payload, (std::vector<std::uint32_t>{1, 3, 0, 2}));
}

}  // namespace
}  // namespace coldrow_test
