#include <coldrow/numeric/math.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

TEST(Math, Exp2WithinItsStatedError) {
  Random random(1);
  double worst = 0.0;
  const auto check = [&](double x) {
    const long double expected = std::exp2(static_cast<long double>(x));
    const long double error = (static_cast<long double>(exp2_fixed(x)) - expected) / expected;
    worst = std::max(worst, static_cast<double>(std::fabs(error)));
  };
  for (int i = 0; i <= 126 * 64; ++i) check(-i / 64.0);
  for (int i = 0; i < 200000; ++i) check(random.uniform(-126.0, 0.0));
  for (int i = 0; i < 1000; ++i) check(-std::ldexp(random.uniform(0.5, 1.0), -i));
  EXPECT_LT(worst, 1e-13);
}

TEST(Math, Exp2OfWholeNumbersIsExact) {
  for (int i = 0; i <= 126; ++i) EXPECT_EQ(exp2_fixed(-i), std::ldexp(1.0, -i));
}

TEST(Math, Exp2IsZeroBelowTheSmallestNormal) {
  EXPECT_EQ(exp2_fixed(-126.0), static_cast<double>(std::numeric_limits<float>::min()));
  for (const double x : {std::nextafter(-126.0, -127.0), -127.0, -1e4, -1e308, -kInf}) {
    EXPECT_EQ(exp2_fixed(x), 0.0) << x;
  }
}

TEST(Math, Exp2OfAPositiveNumberIsNone) {
  for (const double x : {1e-300, 0.5, 1.0, 1e10, 1e308, kInf, std::nan("")}) {
    EXPECT_TRUE(std::isnan(exp2_fixed(x))) << x;
  }
  EXPECT_EQ(exp2_fixed(0.0), 1.0);
  EXPECT_EQ(exp2_fixed(-0.0), 1.0);
}

TEST(Math, IsFinite) {
  for (const float x :
       {0.0f, -0.0f, 1.0f, std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest(),
        std::numeric_limits<float>::denorm_min()}) {
    EXPECT_TRUE(is_finite(x)) << x;
  }
  for (const float x : {kInff, -kInff, kNanf, -kNanf, float_of(0x7f800001u)}) {
    EXPECT_FALSE(is_finite(x)) << x;
  }
}

TEST(Math, FmaRoundsOnce) {
  const float a = 1.0f + 0x1p-12f;
  EXPECT_EQ(coldrow::math::fma(a, a, -1.0f), 0x1p-11f + 0x1p-24f);  // a*a alone loses the last term
  const double b = 1.0 + 0x1p-30;
  EXPECT_EQ(coldrow::math::fma(b, b, -1.0), 0x1p-29 + 0x1p-60);
}

TEST(Math, SquareRootIsCorrectlyRounded) {
  Random random(2);
  for (int i = 0; i < 10000; ++i) {
    const auto x = static_cast<float>(std::ldexp(random.uniform(1.0, 2.0), i % 200 - 100));
    // Rounding a double root to float is correct: 53 bits are more than 2 * 24 + 2.
    EXPECT_EQ(coldrow::math::sqrt(x), static_cast<float>(std::sqrt(static_cast<double>(x))));
  }
}

TEST(Math, MinMaxAndBitCast) {
  EXPECT_EQ(min_of(1, 2), 1);
  EXPECT_EQ(max_of(1, 2), 2);
  EXPECT_EQ(min_of(2, 1), 1);
  EXPECT_EQ(max_of(2, 1), 2);
  EXPECT_EQ(coldrow::bit_cast<std::uint32_t>(1.0f), 0x3f800000u);
  EXPECT_EQ(kSmallestNormal, std::numeric_limits<float>::min());
}

}  // namespace
}  // namespace coldrow_test
