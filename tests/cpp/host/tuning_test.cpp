#include <coldrow/host/tuning.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

TEST(HostTuning, SmallBatchesStayInOneThread) {
  EXPECT_EQ(host::threads_for(0, 64, 32), 1);
  EXPECT_EQ(host::threads_for(100, 64, 32), 1);
  EXPECT_EQ(host::threads_for(10000, 64, 32), 32);
  EXPECT_EQ(host::threads_for(1 << 20, 64, 1000), host::kMostThreads);
  EXPECT_EQ(host::threads_for(1 << 20, 64, 0), 1);
}

// A run that all threads sum is longer than any part, so that it is the last of one.
TEST(HostTuning, HotRunsAreLongerThanParts) {
  for (int threads = 2; threads <= 256; ++threads) {
    for (std::int64_t positions = 0; positions < std::int64_t{1} << 31;
         positions = 2 * positions + 1) {
      EXPECT_GT(host::hot_length(positions, threads), host::part_length(positions, threads));
      EXPECT_LE(positions / host::hot_length(positions, threads), 4 * threads);
    }
  }
  EXPECT_EQ(host::hot_length(1 << 30, 1), INT64_MAX);
  EXPECT_EQ(host::part_length(1 << 30, 1), INT64_MAX);
}

}  // namespace
}  // namespace coldrow_test
