#include <coldrow/policy/decay.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

static_assert(DecayPolicy<NoDecay> && DecayPolicy<LinearClipped> && DecayPolicy<CumulativeLinear> &&
              DecayPolicy<Exponential> && DecayPolicy<ExponentialAtStep> && DecayPolicy<Constant> &&
              DecayPolicy<EpochGated<LinearClipped>> && DecayPolicy<EpochReset>);

constexpr std::int32_t kGaps[] = {
    1, 2, 3, 7, 50, 1000, 30000, 65536, 99999, 1000000, 16777217, 20000001, 2147483646, 2147483647};

TEST(Decay, NothingIsChargedForNoGap) {
  EXPECT_EQ(NoDecay{}(0, 1.0f), 1.0f);
  EXPECT_EQ((LinearClipped{0.5f, 0.1f}(0, 1.0f)), 1.0f);
  EXPECT_EQ(CumulativeLinear{0.5}(0, 1.0f), 1.0f);
  EXPECT_EQ(CumulativeLinear{1e-9}(0, 1.0f), 1.0f);
  EXPECT_EQ(Exponential{0.5}(0, 1.0f), 1.0f);
  EXPECT_EQ(Exponential{2.0}(0, 1.0f), 1.0f);  // lr * weight_decay above 1
  EXPECT_EQ((Exponential{0.0, 3.0}(0, 1.0f)), 1.0f);
  EXPECT_EQ(Constant{0.5f}(0, 1.0f), 1.0f);
}

TEST(Decay, NoDecayIsOne) {
  for (const std::int32_t gap : kGaps) EXPECT_EQ(NoDecay{}(gap, 0.5f), 1.0f);
}

TEST(Decay, LinearClipped) {
  for (const float alpha : {0.0f, 1e-9f, 1e-5f, 1e-3f, 0.1f, 5.0f}) {
    for (const float lr : {0.001f, 0.02f, 1.0f}) {
      for (const float floor : {0.0f, 0.1f, 1.0f}) {
        const LinearClipped decay{alpha, floor};
        for (const std::int32_t gap : kGaps) {
          const long double charge = static_cast<long double>(lr) * alpha * gap;
          const long double expected =
              std::fmax(static_cast<long double>(floor), 1.0L - std::fmin(1.0L, charge));
          // Two roundings of a charge of at most 1 and one of the difference.
          EXPECT_NEAR(static_cast<double>(decay(gap, lr)), static_cast<double>(expected), 2e-7)
              << alpha << " " << lr << " " << floor << " " << gap;
        }
      }
    }
  }
}

// FBGEMM's roundings: lr * alpha to float32, the charge once more, whatever the size of the gap.
TEST(Decay, LinearClippedRoundsTheChargeOnce) {
  Random random(1);
  for (int i = 0; i < 100000; ++i) {
    const auto gap = static_cast<std::int32_t>((1 << 24) + random.below(1 << 30));
    const auto alpha = static_cast<float>(random.uniform(0.1, 2.0) / gap);
    const auto lr = static_cast<float>(random.uniform(0.5, 1.0));
    const auto rate = static_cast<float>(static_cast<long double>(lr) * alpha);
    const auto charge = static_cast<float>(static_cast<long double>(rate) * gap);
    const float expected = charge < 1.0f ? 1.0f - charge : 0.0f;
    ASSERT_EQ((LinearClipped{alpha, 0.0f}(gap, lr)), expected) << gap;
  }
}

// ------------------------------------------------------------------------------- CumulativeLinear

// Promised: 2e-6 relative above 1e-4 and 1e-9 absolute below. Held: a few roundings to float32,
// until the factor is no longer a normal float32 and 0 takes its place.
void expect_close(float actual, long double expected, const std::string& what) {
  const double tolerance = expected > 1.2e-38L ? 2e-7 * static_cast<double>(expected) : 1e-37;
  EXPECT_NEAR(static_cast<double>(actual), static_cast<double>(expected), tolerance) << what;
}

class CumulativeLinearAlpha : public ::testing::TestWithParam<double> {};

// The policy with a table and without one (which below 1e-8 is a series) against the product.
TEST_P(CumulativeLinearAlpha, IsTheProduct) {
  const double alpha = GetParam();
  const CumulativeLinear plain{alpha};
  std::vector<float> table(static_cast<std::size_t>(CumulativeLinear::table_size(alpha)));
  if (!table.empty()) CumulativeLinear::fill_table(alpha, table.data());
  const CumulativeLinear tabled{alpha, table.empty() ? nullptr : table.data(),
                                static_cast<std::int32_t>(table.size())};
  const auto last = static_cast<std::int32_t>(std::sqrt(230.0 / alpha)) + 10;  // zero by then
  const std::int32_t stride = last / 150 + 1;
  long double product = 1.0L;
  for (std::int32_t gap = 1; gap <= last; ++gap) {  // here product is over j < gap
    if (gap < 20 || gap % stride == 0) {
      const std::string what = "gap " + std::to_string(gap);
      expect_close(plain(gap, 1.0f), product, what);
      expect_close(tabled(gap, 1.0f), product, what + ", table");
    }
    product *= 1.0L - std::fmin(1.0L, static_cast<long double>(alpha) * gap);
  }
  EXPECT_LT(product, 1e-38L);
  for (const std::int32_t gap : {last, 2000000000, INT32_MAX}) {
    if (gap < last) continue;
    EXPECT_EQ(plain(gap, 1.0f), 0.0f) << gap;
    EXPECT_EQ(tabled(gap, 1.0f), 0.0f) << gap;
  }
}

INSTANTIATE_TEST_SUITE_P(Decay, CumulativeLinearAlpha,
                         ::testing::Values(1e-9, 3e-9, 9.99e-9, 1e-8, 1.01e-8, 1e-7, 1e-6, 1e-5,
                                           1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 1.0, 1.5));

// Where no loop reaches: the logarithm of the product, its second term and on below 1e-8.
TEST(Decay, CumulativeLinearOfTinyAlphaAtTheLargestGap) {
  for (const double alpha : {1e-21, 1e-19, 1e-18, 3e-18, 1e-17}) {
    for (const std::int32_t gap : {1, 100000, 1 << 30, INT32_MAX}) {
      const long double n = gap - 1;
      const long double log = -static_cast<long double>(alpha) * n * (n + 1) / 2;
      expect_close(CumulativeLinear{alpha}(gap, 1.0f), std::exp(log), std::to_string(alpha));
    }
  }
  EXPECT_EQ(CumulativeLinear{0.0}(INT32_MAX, 1.0f), 1.0f);
}

TEST(Decay, CumulativeLinearTableEndsWithItsFirstZero) {
  for (const double alpha : {1e-8, 1e-7, 1e-5, 1e-3, 0.1, 1.0, 2.0}) {
    const std::int32_t size = CumulativeLinear::table_size(alpha);
    std::vector<float> table(static_cast<std::size_t>(size) + 1, -1.0f);
    CumulativeLinear::fill_table(alpha, table.data());
    EXPECT_EQ(table[0], 1.0f);
    EXPECT_GE(table[static_cast<std::size_t>(size) - 2], std::numeric_limits<float>::min())
        << alpha;
    EXPECT_EQ(table[static_cast<std::size_t>(size) - 1], 0.0f) << alpha;
    EXPECT_EQ(table[static_cast<std::size_t>(size)], -1.0f) << "written past its size: " << alpha;
  }
  EXPECT_EQ(CumulativeLinear::table_size(9.9e-9), 0);
  EXPECT_EQ(CumulativeLinear::table_size(0.0), 0);
}

// alpha = 2 ln 2 / h^2 is what "half-life h" means, up to terms of order 1/h.
TEST(Decay, CumulativeLinearHalvesAtItsHalfLife) {
  for (const double h : {300.0, 3000.0, 30000.0}) {
    const CumulativeLinear decay{2.0 * std::log(2.0) / (h * h)};
    EXPECT_NEAR(static_cast<double>(decay(static_cast<std::int32_t>(h), 1.0f)), 0.5, 1.0 / h);
    EXPECT_NEAR(static_cast<double>(decay(static_cast<std::int32_t>(2 * h), 1.0f)), 0.0625,
                1.0 / h);
  }
}

// ---------------------------------------------------------------------------------- Exponential

TEST(Decay, Exponential) {
  for (const double lr : {1e-6, 1e-3, 0.02}) {
    // 1e-2 * 1e-6: a charge of 1e-8 a step, which a float32 base would round away.
    for (const double weight_decay : {0.0, 1e-2, 0.5, 10.0}) {
      const auto decay = prepare(Exponential{weight_decay}, 5, lr, 0);
      for (const std::int32_t gap : kGaps) {
        const long double expected =
            std::exp(gap * std::log1p(-static_cast<long double>(lr) * weight_decay));
        const double e = expected < 1.1754944e-38L ? 0.0 : static_cast<double>(expected);
        EXPECT_NEAR(static_cast<double>(decay(gap, 0.5f)), e, 1e-7 * e)
            << lr << " " << weight_decay << " " << gap;
      }
    }
  }
}

TEST(Decay, ExponentialByHalfLife) {
  for (const double half_life : {0.5, 1.0, 7.0, 12345.6, 1e9}) {
    const auto decay = prepare(Exponential{0.0, half_life}, 5, 0.1, 0);
    for (const std::int32_t gap : kGaps) {
      const long double expected = std::exp2(-static_cast<long double>(gap) / half_life);
      const double e = expected < 1.1754944e-38L ? 0.0 : static_cast<double>(expected);
      EXPECT_NEAR(static_cast<double>(decay(gap, 0.5f)), e, 1e-7 * e) << half_life << " " << gap;
    }
  }
}

TEST(Decay, ExponentialThatTakesAllLeavesNothing) {
  for (const double weight_decay : {1.0, 2.0, 1e300}) {
    const auto decay = prepare(Exponential{weight_decay}, 5, 1.0, 0);
    for (const std::int32_t gap : kGaps) EXPECT_EQ(decay(gap, 1.0f), 0.0f);
    EXPECT_EQ(decay(0, 1.0f), 1.0f);
  }
}

TEST(Decay, ConstantIgnoresTheGap) {
  for (const std::int32_t gap : kGaps) {
    EXPECT_EQ(Constant{0.25f}(gap, 0.5f), 0.875f);
    EXPECT_EQ(Constant{4.0f}(gap, 0.5f), 0.0f);
  }
}

// ---------------------------------------------------------------------------------- epoch gates

// Over all small histories, for the touch at `step` and for a read before it: open exactly where
// the row's last touch came before the running epoch.
TEST(Decay, GateOpensForRowsLastTouchedBeforeTheEpoch) {
  const EpochGated<Constant> gated{{0.5f}};
  for (std::int32_t last = 1; last <= 10; ++last) {
    for (std::int32_t step = last + 1; step <= 12; ++step) {
      for (std::int32_t epoch_start = 0; epoch_start <= step; ++epoch_start) {
        const bool open = epoch_start > 0 && last < epoch_start;
        const std::string what = "last " + std::to_string(last) + ", step " + std::to_string(step) +
                                 ", epoch " + std::to_string(epoch_start);
        const float touch = prepare(gated, step, 1.0, epoch_start)(step - last, 1.0f);
        EXPECT_EQ(touch, open ? 0.5f : 1.0f) << what;
        EXPECT_EQ(prepare(EpochReset{}, step, 1.0, epoch_start)(step - last, 1.0f),
                  open ? 0.0f : 1.0f)
            << what;

        // A row touched in the step before has no gap at the epoch's first read: the gate is open,
        // but only a reset has anything to charge.
        const std::int32_t gap = step - 1 - last;
        const float read = prepare(gated, step - 1, 1.0, epoch_start)(gap, 1.0f);
        EXPECT_EQ(read, open && gap > 0 ? 0.5f : 1.0f) << what;
        EXPECT_EQ(prepare(EpochReset{}, step - 1, 1.0, epoch_start)(gap, 1.0f), open ? 0.0f : 1.0f)
            << what;
      }
    }
  }
}

TEST(Decay, WithoutAnEpochNoGateEverOpens) {
  for (const std::int32_t gap : kGaps) {
    EXPECT_EQ(prepare(EpochReset{}, INT32_MAX, 1.0, 0)(gap, 1.0f), 1.0f);
    EXPECT_EQ(EpochReset{}(gap, 1.0f), 1.0f);
    EXPECT_EQ(prepare(EpochGated<Constant>{{1.0f}}, INT32_MAX, 1.0, 0)(gap, 1.0f), 1.0f);
    EXPECT_EQ(EpochGated<Constant>{{1.0f}}(gap, 1.0f), 1.0f);
  }
}

TEST(Decay, GatedPolicyIsPreparedToo) {
  const auto gated = prepare(EpochGated<Exponential>{{0.0, 2.0}}, 10, 0.1, 9);
  EXPECT_EQ(gated(4, 0.1f), 0.25f);
  EXPECT_EQ(gated(1, 0.1f), 1.0f);
}

// ---------------------------------------------------------------------------- optional members

struct OwnDecay {
  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    return lr / static_cast<float>(gap);
  }
};

TEST(Decay, OptionalMembersHaveDefaults) {
  static_assert(std::same_as<Prepared<OwnDecay>, OwnDecay>);
  EXPECT_EQ(prepare(OwnDecay{}, 3, 0.1, 2)(4, 1.0f), 0.25f);
  EXPECT_EQ(first_touch(OwnDecay{}, 0.5f), 0.5f);  // that of a gap of 1
  EXPECT_EQ(first_touch(Constant{0.5f}, 1.0f), 0.5f);
}

TEST(Decay, NothingFadesAtAFirstTouchBehindAGate) {
  EXPECT_EQ(first_touch(prepare(EpochReset{}, 5, 1.0, 5), 1.0f), 1.0f);
  EXPECT_EQ(first_touch(prepare(EpochGated<Constant>{{0.5f}}, 5, 1.0, 5), 1.0f), 1.0f);
}

}  // namespace
// A NaN must reach the row update, which then leaves the row alone; 0 would wipe it.
TEST(Decay, NanParametersGiveNan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan((LinearClipped{nan, 0.1f}(5, 0.1f))));
  EXPECT_TRUE(std::isnan((LinearClipped{0.1f, 0.1f}(5, nan))));
  EXPECT_TRUE(std::isnan((Constant{nan}(5, 0.1f))));
  EXPECT_TRUE(std::isnan((Exponential{nan, 0.0}(5, 0.1f))));
  EXPECT_TRUE(std::isnan((CumulativeLinear{nan}(5, 0.1f))));
}

}  // namespace coldrow_test
