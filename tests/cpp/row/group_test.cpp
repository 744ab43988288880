#include <coldrow/row/group.hpp>

#include "../support.hpp"
#include "host_warp.hpp"

namespace coldrow_test {
namespace {

static_assert(Group<Serial>);
static_assert(Group<HostWarp::Lane<4>>);
static_assert(!Group<int>);

TEST(Group, SerialIsOneMember) {
  const Serial group;
  EXPECT_EQ(group.rank(), 0);
  EXPECT_EQ(group.size(), 1);
  EXPECT_EQ(group.sum(3.5f), 3.5f);
}

// The emulated warp that other tests use: all lanes see one sum, meeting after meeting.
TEST(Group, EmulatedLanesAgreeOnTheirSums) {
  for (const LaneOrder order : {LaneOrder::first_lane_first, LaneOrder::last_lane_first}) {
    HostWarp warp(8, order);
    std::vector<float> first(8), second(8);
    warp.run<4>([&](const auto& group) {
      const auto i = static_cast<std::size_t>(group.rank());
      first[i] = group.sum(static_cast<float>(group.rank()));
      second[i] = group.sum(1.0f);
    });
    EXPECT_EQ(first, std::vector<float>(8, 28.0f));
    EXPECT_EQ(second, std::vector<float>(8, 8.0f));
  }
}

}  // namespace
}  // namespace coldrow_test
