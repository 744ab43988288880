// The reference itself, against things that are not it: numbers by hand, and the dense loop whose
// lazy form the decays are.
#include <coldrow/reference.hpp>

#include "dense.hpp"
#include "support.hpp"

namespace coldrow_test {
namespace {

TEST(Reference, OneStepByHand) {
  reference::Update update{{0.0, 0.75}, {}, false};
  update.decay.kind = DecayKind::linear_clipped;
  update.decay.alpha = 0.25;
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
  reference::Decay decay;
  decay.kind = DecayKind::cumulative_linear;
  decay.alpha = 0.25;
  EXPECT_EQ(decay(1, 1, 1.0, 0), 1.0);
  EXPECT_EQ(decay(2, 1, 1.0, 0), 0.75);
  EXPECT_EQ(decay(3, 1, 1.0, 0), 0.375);
  EXPECT_EQ(decay(5, 1, 1.0, 0), 0.0);
  decay.epoch_gated = true;
  EXPECT_EQ(decay(3, 4, 1.0, 5), 0.375);
  EXPECT_EQ(decay(3, 5, 1.0, 5), 1.0);
  EXPECT_EQ(decay(3, 4, 1.0, 0), 1.0);  // no epoch was declared
  EXPECT_EQ(decay(1, 0, 1.0, 5), 1.0);  // never touched
  decay.kind = DecayKind::epoch_reset;
  EXPECT_EQ(decay(0, 4, 1.0, 5), 0.0);
  EXPECT_EQ(decay(3, 5, 1.0, 5), 1.0);
}

// charge="read": the forward reads decayed rows, the update charges the whole gap. Equal to the
// loop that decays every row in every step.
TEST(Reference, LazyDecayIsTheDenseLoop) {
  Random random(1);
  constexpr std::int64_t kRows = 6, kDim = 3;
  reference::Update update{{1e-8, 0.9}, {}, false};
  update.decay.kind = DecayKind::cumulative_linear;
  update.decay.alpha = 0.01;
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
