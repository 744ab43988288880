#include <coldrow/policy/rounding.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

static_assert(RoundingPolicy<Nearest> && RoundingPolicy<Stochastic>);
static_assert(!Nearest::needs_random && Stochastic::needs_random);

template <int N>
std::vector<std::uint32_t> block(const Stochastic& rounding, const ElementKey& key,
                                 std::int64_t column) {
  std::uint32_t out[N];
  rounding.random<N>(key, column, out);
  return {out, out + N};
}

template <int N>
void check_position_only() {
  const Stochastic rounding{3};
  const ElementKey at_zero{9, 123456789012345, 0, 77};
  for (std::int64_t offset = 0; offset <= 24; ++offset) {
    ElementKey key = at_zero;
    key.col_offset = offset;
    for (std::int64_t column = 0; column <= 24; ++column) {
      const auto bits = block<N>(rounding, key, column);
      for (int k = 0; k < N; ++k) {
        ASSERT_EQ(bits[static_cast<std::size_t>(k)],
                  block<1>(rounding, at_zero, offset + column + k)[0])
            << "offset " << offset << " column " << column << " + " << k;
      }
    }
  }
}

// Whatever the block size, the shard's offset and where a block starts.
TEST(Rounding, RandomBitsDependOnTheGlobalColumnAlone) {
  check_position_only<1>();
  check_position_only<4>();
  check_position_only<8>();
  check_position_only<16>();
}

// Computed outside of the library. A change here means that runs no longer repeat.
TEST(Rounding, RandomBitsArePinned) {
  const std::vector<std::uint32_t> expected = {0x9c89, 0x6d3b, 0xb776, 0x169c, 0xfb80, 0x535a,
                                               0xdbe3, 0x20da, 0x8ac3, 0x882e, 0x75e2, 0xfa95,
                                               0xa016, 0x6694, 0x6492, 0x8f3a};
  EXPECT_EQ(block<16>(Stochastic{7}, {11, (std::int64_t{5} << 32) + 3, 0, 42}, 20), expected);
}

TEST(Rounding, RandomBitsDifferBySeedTableRowAndStep) {
  const ElementKey key{1, 2, 0, 3};
  std::vector<std::vector<std::uint32_t>> blocks;
  blocks.push_back(block<16>(Stochastic{0}, key, 0));
  blocks.push_back(block<16>(Stochastic{1}, key, 0));
  blocks.push_back(block<16>(Stochastic{0}, key, 16));
  for (int field = 0; field < 4; ++field) {
    ElementKey other = key;
    if (field == 0) other.table += 1;
    if (field == 1) other.row += 1;
    if (field == 2) other.row += std::int64_t{1} << 32;
    if (field == 3) other.step += 1;
    blocks.push_back(block<16>(Stochastic{0}, other, 0));
  }
  for (std::size_t a = 0; a < blocks.size(); ++a) {
    for (std::size_t b = 0; b < a; ++b) {
      int equal = 0;
      for (std::size_t k = 0; k < 16; ++k) equal += blocks[a][k] == blocks[b][k] ? 1 : 0;
      EXPECT_LE(equal, 1) << a << " and " << b;  // two or more by chance: one in 10^7
    }
  }
}

TEST(Rounding, RandomBitsAreUniform) {
  const Stochastic rounding{5};
  constexpr int kRows = 4096;
  int ones[16] = {};
  for (int row = 0; row < kRows; ++row) {
    for (const std::uint32_t bits : block<16>(rounding, {0, row, 0, 1}, 0)) {
      ASSERT_LT(bits, 0x10000u);
      for (int b = 0; b < 16; ++b) ones[b] += (bits >> b) & 1u;
    }
  }
  const double n = 16.0 * kRows;
  for (int b = 0; b < 16; ++b) EXPECT_NEAR(ones[b], n / 2.0, 5.0 * std::sqrt(n) / 2.0) << b;
}

template <class T>
class Rounding16 : public ::testing::Test {};
using SixteenBit = ::testing::Types<half, bfloat16>;
TYPED_TEST_SUITE(Rounding16, SixteenBit, NumericName);

// The rate of rounding up is the fraction dropped, within five standard deviations.
TYPED_TEST(Rounding16, StochasticIsUnbiased) {
  using T = TypeParam;
  const Stochastic rounding{0};
  constexpr int kRows = 2000;
  for (const double fraction : {0.01, 0.25, 0.5, 0.9}) {
    const auto x = static_cast<float>(1.0 + fraction * spacing<T>(1.0));
    int up = 0;
    for (int row = 0; row < kRows; ++row) {
      for (const std::uint32_t bits : block<16>(rounding, {0, row, 0, 1}, 0)) {
        const double y = value_of(rounding.round<T>(x, bits));
        ASSERT_TRUE(y == 1.0 || y == 1.0 + spacing<T>(1.0));
        up += y > 1.0 ? 1 : 0;
      }
    }
    const double n = 16.0 * kRows;
    EXPECT_NEAR(up, n * fraction, 5.0 * std::sqrt(n * fraction * (1.0 - fraction))) << fraction;
  }
}

TYPED_TEST(Rounding16, NearestIgnoresRandomBits) {
  using T = TypeParam;
  const auto x = static_cast<float>(1.0 + 0.75 * spacing<T>(1.0));
  for (const std::uint32_t bits : {0u, 0xffffu}) {
    EXPECT_EQ(value_of(Nearest{}.round<T>(x, bits)), 1.0 + spacing<T>(1.0));
  }
}

}  // namespace
}  // namespace coldrow_test
