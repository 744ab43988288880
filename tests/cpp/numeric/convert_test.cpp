#include <coldrow/numeric/convert.hpp>

#include "../support.hpp"
#include "convert_hardware.hpp"

namespace coldrow_test {
namespace {

template <class T>
class Convert16 : public ::testing::Test {};
using SixteenBit = ::testing::Types<half, bfloat16>;
TYPED_TEST_SUITE(Convert16, SixteenBit, NumericName);

template <class T>
constexpr int kInfinityBits = std::same_as<T, half> ? 0x7c00 : 0x7f80;
template <class T>
constexpr int kQuietBit = std::same_as<T, half> ? 0x0200 : 0x0040;

template <class T>
T of_bits(int bits) {
  return {static_cast<std::uint16_t>(bits)};
}

// A float between numbers of T, of a magnitude that reaches T's subnormals and its largest numbers.
template <class T>
float between(Random& random) {
  const int exponent =
      Format<T>::min_exponent - Format<T>::precision - 1 +
      static_cast<int>(random.below(Format<T>::max_exponent + Format<T>::precision + 1 -
                                    Format<T>::min_exponent));
  const double x = std::ldexp(random.uniform(1.0, 2.0), exponent);
  return static_cast<float>(random.below(2) == 0 ? x : -x);
}

TYPED_TEST(Convert16, EveryValueWidensExactlyAndComesBack) {
  using T = TypeParam;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const T x = of_bits<T>(bits);
    const float wide = Convert<T>::widen(x);
    const T back = Convert<T>::nearest(wide);
    if ((bits & 0x7fff) > kInfinityBits<T>) {
      ASSERT_TRUE(std::isnan(wide)) << std::hex << bits;
      ASSERT_EQ(back.bits, bits | kQuietBit<T>) << std::hex << bits;
    } else {
      ASSERT_EQ(wide, value_of(x)) << std::hex << bits;
      ASSERT_EQ(std::signbit(wide), bits >= 0x8000) << std::hex << bits;
      ASSERT_EQ(back.bits, bits) << std::hex << bits;
    }
  }
}

// All rounding decisions there are: at, just below and just above each midpoint of two neighbours,
// the largest number and the first one out of range included.
TYPED_TEST(Convert16, NearestAtEveryMidpoint) {
  using T = TypeParam;
  for (int bits = 0; bits < kInfinityBits<T>; ++bits) {
    const double lower = value_of(of_bits<T>(bits));
    const auto middle = static_cast<float>(lower + spacing<T>(lower) / 2.0);
    const int even = bits + (bits & 1);
    for (const int sign : {0, 0x8000}) {
      const float s = sign == 0 ? 1.0f : -1.0f;
      ASSERT_EQ(Convert<T>::nearest(s * middle).bits, sign | even) << middle;
      ASSERT_EQ(Convert<T>::nearest(s * std::nextafter(middle, 0.0f)).bits, sign | bits) << middle;
      ASSERT_EQ(Convert<T>::nearest(s * std::nextafter(middle, kInff)).bits, sign | (bits + 1))
          << middle;
    }
  }
}

TYPED_TEST(Convert16, NearestOfAnyFloat) {
  using T = TypeParam;
  Random random(1);
  for (int i = 0; i < 1000000; ++i) {
    const float x = float_of(random.bits());
    const T y = Convert<T>::nearest(x);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(value_of(y))) << std::hex << bits_of(x);
    } else {
      ASSERT_EQ(value_of(y), rounded<T>(x)) << x;
      ASSERT_EQ(y.bits >= 0x8000, std::signbit(x)) << x;
    }
  }
}

// All 65536 random numbers for each x: the rate of rounding up is counted, not estimated.
TYPED_TEST(Convert16, StochasticTakesTheNeighboursAtTheRightRate) {
  using T = TypeParam;
  Random random(2);
  for (int i = 0; i < 300; ++i) {
    const float x = between<T>(random);
    const double toward_zero = rounded<T>(x, std::trunc);
    const double away = rounded<T>(x, away_from_zero);
    int count = 0;
    for (std::uint32_t r = 0; r < 0x10000; ++r) {
      const double y = value_of(Convert<T>::stochastic(x, r));
      ASSERT_TRUE(y == toward_zero || y == away) << x << " became " << y;
      count += y == away && away != toward_zero ? 1 : 0;
    }
    const double fraction = (std::fabs(x) - std::fabs(toward_zero)) / spacing<T>(x);
    const bool subnormal = std::fabs(x) < std::ldexp(1.0, Format<T>::min_exponent);
    // Documented: exact, save for subnormal float16, within 2^-16 of a unit.
    const double slack = std::same_as<T, half> && subnormal ? 1.0 : 0.0;
    ASSERT_NEAR(count, fraction * 65536.0, slack) << x;
  }
}

TYPED_TEST(Convert16, StochasticLeavesExactValuesAlone) {
  using T = TypeParam;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const T x = of_bits<T>(bits);
    if ((bits & 0x7fff) > kInfinityBits<T>) continue;
    for (const std::uint32_t r : {0u, 1u, 0x1fffu, 0x8000u, 0xffffu}) {
      ASSERT_EQ(Convert<T>::stochastic(Convert<T>::widen(x), r).bits, bits) << std::hex << bits;
    }
  }
}

TYPED_TEST(Convert16, StochasticPassesInfinitiesAndNans) {
  using T = TypeParam;
  for (const std::uint32_t r : {0u, 1u, 0x7fffu, 0xffffu}) {
    EXPECT_EQ(Convert<T>::stochastic(kInff, r).bits, kInfinityBits<T>);
    EXPECT_EQ(Convert<T>::stochastic(-kInff, r).bits, 0x8000 | kInfinityBits<T>);
    for (const std::uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xffc00000u, 0xff800001u}) {
      EXPECT_TRUE(std::isnan(value_of(Convert<T>::stochastic(float_of(nan), r))))
          << std::hex << nan;
    }
  }
}

TEST(Convert, FloatIsStoredAsItIs) {
  Random random(3);
  for (int i = 0; i < 1000; ++i) {
    const std::uint32_t bits = random.bits();
    EXPECT_EQ(bits_of(Convert<float>::widen(float_of(bits))), bits);
    EXPECT_EQ(bits_of(Convert<float>::nearest(float_of(bits))), bits);
    EXPECT_EQ(bits_of(Convert<float>::stochastic(float_of(bits), 0xffff)), bits);
  }
}

// Builds with F16C use it, so the bits must be the same, those of NaNs too.
TEST(Convert, HalfIsWhatHardwareMakes) {
  if (!has_f16c()) GTEST_SKIP() << "this machine has no F16C";
  std::vector<std::uint16_t> halves;
  for (int bits = 0; bits < 0x10000; ++bits) halves.push_back(static_cast<std::uint16_t>(bits));
  std::vector<float> wide(halves.size());
  hardware_widen(halves.data(), wide.data(), static_cast<int>(halves.size()));
  for (std::size_t i = 0; i < halves.size(); ++i) {
    ASSERT_EQ(bits_of(Convert<half>::widen(half{halves[i]})), bits_of(wide[i])) << std::hex << i;
  }

  constexpr int kCount = 1 << 20;
  std::vector<float> floats(kCount);
  for (std::uint32_t i = 0; i < kCount; ++i) floats[i] = float_of(i * 4093u);  // all exponents
  std::vector<std::uint16_t> narrow(kCount);
  hardware_nearest(floats.data(), narrow.data(), kCount);
  for (std::size_t i = 0; i < kCount; ++i) {
    ASSERT_EQ(Convert<half>::nearest(floats[i]).bits, narrow[i]) << std::hex << bits_of(floats[i]);
  }
}

}  // namespace
}  // namespace coldrow_test
