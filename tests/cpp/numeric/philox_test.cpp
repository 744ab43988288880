#include <coldrow/numeric/philox.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

struct KnownAnswer {
  Philox4 counter;
  std::uint32_t key0, key1;
  Philox4 answer;
};

// The known answers that Random123 is distributed with.
constexpr KnownAnswer kKnown[] = {
    {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
    {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
     0xffffffff,
     0xffffffff,
     {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
    {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
     0xa4093822,
     0x299f31d0,
     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
};

TEST(Philox, KnownAnswers) {
  for (const KnownAnswer& k : kKnown) {
    const Philox4 r = philox4x32_10(k.counter, k.key0, k.key1);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(r.word[i], k.answer.word[i]);
  }
}

// The first three outputs of splitmix64 with seed 0: mix64 of 0, 1 and 2 increments.
TEST(Philox, Mix64IsSplitmix64) {
  constexpr std::uint64_t kIncrement = 0x9e3779b97f4a7c15u;
  EXPECT_EQ(mix64(0), 0xe220a8397b1dcdafu);
  EXPECT_EQ(mix64(kIncrement), 0x6e789e6aa1b965f4u);
  EXPECT_EQ(mix64(2 * kIncrement), 0x06c45d188009454fu);
}

}  // namespace
}  // namespace coldrow_test
