// The reference itself, against things that are not it: numbers by hand, and the dense loop whose
// lazy form the decays are.
#include <coldrow/reference.hpp>

#include "dense.hpp"
#include "support.hpp"

namespace coldrow_test {
namespace {

TEST(Reference, OneStepByHand) {
  const reference::Update update{RowwiseRMSprop{0.0f, 0.75f}, LinearClipped{0.25f, 0.0f}, false};
  std::vector<double> weight = {1.0, 2.0, 10.0, 20.0}, momentum1 = {0.0, 20.0};
  std::vector<std::int64_t> prev_iter = {0, 3};
  // Row 1 twice: its gradients sum to (6, 2), mean square 20, v' = 0.75 * 20 + 0.25 * 20 = 20.
  const std::vector<double> grad = {4.0, 0.0, 2.0, 2.0};
  const std::vector<std::int64_t> indices = {1, 1};
  reference::apply(update, weight.data(), 2, {prev_iter.data(), momentum1.data()}, grad.data(),
                   indices.data(), 2, 5, 1.0, 0);
  EXPECT_EQ(momentum1, (std::vector<double>{0.0, 20.0}));
  EXPECT_EQ(prev_iter, (std::vector<std::int64_t>{0, 5}));
  EXPECT_EQ(weight[0], 1.0);
  EXPECT_EQ(weight[1], 2.0);
  const double multiplier = 1.0 / std::sqrt(20.0);  // a gap of 2 leaves half
  EXPECT_DOUBLE_EQ(weight[2], 5.0 - 6.0 * multiplier);
  EXPECT_DOUBLE_EQ(weight[3], 10.0 - 2.0 * multiplier);
}

TEST(Reference, DecaysByHand) {
  reference::Decay decay = CumulativeLinear{0.25};
  EXPECT_EQ(decay(1, 1, 1.0, 0), 1.0);
  EXPECT_EQ(decay(2, 1, 1.0, 0), 0.75);
  EXPECT_EQ(decay(3, 1, 1.0, 0), 0.375);
  EXPECT_EQ(decay(5, 1, 1.0, 0), 0.0);
  decay.epoch_gated = true;
  EXPECT_EQ(decay(3, 4, 1.0, 5), 0.375);
  EXPECT_EQ(decay(3, 5, 1.0, 5), 1.0);
  EXPECT_EQ(decay(3, 4, 1.0, 0), 1.0);  // no epoch was declared
  EXPECT_EQ(decay(1, 0, 1.0, 5), 1.0);  // never touched
  decay = EpochReset{};
  EXPECT_EQ(decay(0, 4, 1.0, 5), 0.0);
  EXPECT_EQ(decay(3, 5, 1.0, 5), 1.0);
}

// ------------------------------------------------------------------------------ optimizers by hand

// One row of two columns, touched at steps 1 (gradient 3, 4: mean square 12.5) and 3 (-1, 1).
struct ByHand {
  std::vector<double> weight = {10.0, 20.0}, momentum1 = {0.0, 0.0}, momentum2 = {0.0, 0.0};
  std::vector<double> touches = {0.0};
  std::vector<std::int64_t> prev_iter = {0};

  ByHand(const reference::Optimizer& optimizer, bool decay_state = false) {
    // Half of everything at step 3.
    const reference::Update update{optimizer, Exponential{0.0, 2.0}, decay_state};
    const std::vector<std::vector<double>> grads = {{3.0, 4.0}, {-1.0, 1.0}};
    const std::int64_t index = 0;
    for (const std::int64_t step : {1, 3}) {
      weight = {10.0, 20.0};
      reference::apply(update, weight.data(), 2,
                       {prev_iter.data(), momentum1.data(), momentum2.data(), touches.data()},
                       grads[static_cast<std::size_t>(step / 2)].data(), &index, 1, step, 0.5, 0);
    }
    EXPECT_EQ(prev_iter[0], 3);
  }
  void expect_weight(double first_amount, double second_amount) const {
    EXPECT_NEAR(weight[0], 5.0 - first_amount, 1e-14);  // 10 and 20 fade to a half
    EXPECT_NEAR(weight[1], 10.0 - second_amount, 1e-14);
  }
};

TEST(ReferenceOptimizers, SGD) { ByHand(SGD{}).expect_weight(0.5 * -1.0, 0.5 * 1.0); }

TEST(ReferenceOptimizers, RowwiseRMSprop) {
  for (const bool fade : {false, true}) {
    const ByHand run(RowwiseRMSprop{0.25f, 0.75f}, fade);
    const double v = 0.75 * (fade ? 0.5 : 1.0) * (0.25 * 12.5) + 0.25 * 1.0;
    EXPECT_DOUBLE_EQ(run.momentum1[0], v);
    EXPECT_EQ(run.momentum1[1], 0.0);
    const double amount = 0.5 / (std::sqrt(v) + 0.25);
    run.expect_weight(-amount, amount);
  }
}

TEST(ReferenceOptimizers, RowwiseAdagrad) {
  for (const bool fade : {false, true}) {
    const ByHand run(RowwiseAdagrad{0.25f}, fade);
    const double v = (fade ? 6.25 : 12.5) + 1.0;
    EXPECT_DOUBLE_EQ(run.momentum1[0], v);
    const double amount = 0.5 / (std::sqrt(v) + 0.25);
    run.expect_weight(-amount, amount);
  }
}

TEST(ReferenceOptimizers, Adagrad) {
  for (const bool fade : {false, true}) {
    const ByHand run(Adagrad{0.25f}, fade);
    const double v0 = (fade ? 4.5 : 9.0) + 1.0, v1 = (fade ? 8.0 : 16.0) + 1.0;
    EXPECT_EQ(run.momentum1, (std::vector<double>{v0, v1}));
    run.expect_weight(-0.5 / (std::sqrt(v0) + 0.25), 0.5 / (std::sqrt(v1) + 0.25));
  }
}

// beta1 1/2, beta2 3/4. The first touch leaves m = (1.5, 2) and v = (9/4, 4), or 25/8 for the row.
TEST(ReferenceOptimizers, Adam) {
  for (const bool fade : {false, true}) {
    for (const bool by_touches : {false, true}) {
      const ByHand run(by_touches
                           ? reference::Optimizer(Adam<BiasCorrection::row>{0.25, 0.5, 0.75})
                           : reference::Optimizer(Adam<BiasCorrection::clock>{0.25, 0.5, 0.75}),
                       fade);
      const double f = fade ? 0.5 : 1.0;
      const double m0 = 0.5 * f * 1.5 - 0.5, m1 = 0.5 * f * 2.0 + 0.5;
      const double v0 = 0.75 * f * 2.25 + 0.25, v1 = 0.75 * f * 4.0 + 0.25;
      EXPECT_EQ(run.momentum1, (std::vector<double>{m0, m1}));
      EXPECT_EQ(run.momentum2, (std::vector<double>{v0, v1}));
      const double n = by_touches ? f + 1.0 : 3.0;
      EXPECT_EQ(run.touches[0], by_touches ? n : 0.0);
      const double c1 = 1.0 - std::exp2(-n), c2 = 1.0 - std::pow(0.75, n);
      run.expect_weight(0.5 * (m0 / c1) / (std::sqrt(v0 / c2) + 0.25),
                        0.5 * (m1 / c1) / (std::sqrt(v1 / c2) + 0.25));
    }
  }
}

TEST(ReferenceOptimizers, PartialRowwiseAdam) {
  for (const bool fade : {false, true}) {
    for (const bool by_touches : {false, true}) {
      const ByHand run(
          by_touches
              ? reference::Optimizer(PartialRowwiseAdam<BiasCorrection::row>{0.25, 0.5, 0.75})
              : reference::Optimizer(PartialRowwiseAdam<BiasCorrection::clock>{0.25, 0.5, 0.75}),
          fade);
      const double f = fade ? 0.5 : 1.0;
      const double m0 = 0.5 * f * 1.5 - 0.5, m1 = 0.5 * f * 2.0 + 0.5;
      const double v = 0.75 * f * 3.125 + 0.25;
      EXPECT_EQ(run.momentum1, (std::vector<double>{m0, m1}));
      EXPECT_DOUBLE_EQ(run.momentum2[0], v);
      EXPECT_EQ(run.momentum2[1], 0.0);
      const double n = by_touches ? f + 1.0 : 3.0;
      const double c1 = 1.0 - std::exp2(-n), c2 = 1.0 - std::pow(0.75, n);
      const double root = std::sqrt(v / c2) + 0.25;
      run.expect_weight(0.5 * (m0 / c1) / root, 0.5 * (m1 / c1) / root);
    }
  }
}

// charge="read": the forward reads decayed rows, the update charges the whole gap. Equal to the
// loop that decays every row in every step.
TEST(Reference, LazyDecayIsTheDenseLoop) {
  Random random(1);
  constexpr std::int64_t kRows = 6, kDim = 3;
  const reference::Update update{RowwiseRMSprop{1e-8f, 0.9f}, CumulativeLinear{0.01}, false};
  constexpr double kLr = 0.05;

  DenseTable dense(random.numbers<float>(kRows * kDim), kDim);
  std::vector<double> weight = dense.weight, momentum1(kRows);
  std::vector<std::int64_t> prev_iter(kRows);
  for (std::int64_t step = 1; step <= 200; ++step) {
    for (std::int64_t r = 0; r < kRows; ++r) {
      const double factor =
          reference::read_factor(update, prev_iter[static_cast<std::size_t>(r)], step, kLr, 0);
      for (std::int64_t i = r * kDim; i < (r + 1) * kDim; ++i) {
        const auto at = static_cast<std::size_t>(i);
        ASSERT_NEAR(factor * weight[at], dense.weight[at], 1e-12) << "step " << step;
      }
    }
    const std::vector<std::int64_t> batch = {random.below(kRows), random.below(2)};
    std::vector<double> grad = values_of(random.numbers<float>(2 * kDim));
    reference::apply(update, weight.data(), kDim, {prev_iter.data(), momentum1.data()}, grad.data(),
                     batch.data(), 2, step, kLr, 0);
    dense.step(batch, grad, update, kLr);
  }
}

}  // namespace
}  // namespace coldrow_test
