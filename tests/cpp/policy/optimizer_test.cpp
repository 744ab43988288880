#include <coldrow/policy/optimizer.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

static_assert(OptimizerPolicy<RowwiseRMSprop>);
static_assert(RowwiseRMSprop::scalar_states == 1 && RowwiseRMSprop::vector_states == 0);

TEST(Optimizer, RowwiseRMSpropIsItsFormula) {
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const RowwiseRMSprop optimizer{static_cast<float>(std::pow(10.0, random.uniform(-12.0, 0.0))),
                                   static_cast<float>(random.uniform(0.0, 1.0))};
    const auto v = static_cast<float>(std::pow(10.0, random.uniform(-20.0, 10.0)));
    const auto mean_square = static_cast<float>(std::pow(10.0, random.uniform(-20.0, 10.0)));
    const auto lr = static_cast<float>(std::pow(10.0, random.uniform(-6.0, 1.0)));
    const auto g = static_cast<float>(random.uniform(-10.0, 10.0));

    const long double beta = optimizer.ema_beta;
    const long double v_new = beta * v + (1.0L - beta) * mean_square;
    const long double amount = lr / (std::sqrt(v_new) + optimizer.eps) * g;

    float state = v;
    const auto row = optimizer.row(&state, mean_square, lr, 1);
    EXPECT_TRUE(row.finite());
    EXPECT_NEAR(static_cast<double>(state / v_new), 1.0, 3e-7);
    EXPECT_NEAR(static_cast<double>(optimizer.element(row, g, nullptr) / amount), 1.0, 6e-7);
  }
}

TEST(Optimizer, NoGradientMovesNothing) {
  float state = 4.0f;
  const RowwiseRMSprop optimizer{1e-8f, 0.5f};
  const auto row = optimizer.row(&state, 0.0f, 0.1f, 1);
  EXPECT_EQ(state, 2.0f);
  EXPECT_EQ(optimizer.element(row, 0.0f, nullptr), 0.0f);
}

TEST(Optimizer, RowwiseRMSpropTellsWhenItsMultiplierIsNotFinite) {
  const RowwiseRMSprop no_eps{0.0f, 0.5f};
  float state = 0.0f;
  EXPECT_FALSE(no_eps.row(&state, 0.0f, 0.1f, 1).finite());  // lr / 0
  state = 0.0f;
  EXPECT_FALSE(no_eps.row(&state, kNanf, 0.1f, 1).finite());
  state = 0.0f;
  EXPECT_FALSE(RowwiseRMSprop{}.row(&state, 1.0f, kInff, 1).finite());
}

}  // namespace
}  // namespace coldrow_test
