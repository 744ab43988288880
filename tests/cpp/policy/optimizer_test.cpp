#include <coldrow/policy/optimizer.hpp>

#include "../optimizers.hpp"

namespace coldrow_test {
namespace {

// ------------------------------------------------------------------------------------- declarations

template <class O>
class Optimizer : public ::testing::Test {};
TYPED_TEST_SUITE(Optimizer, Optimizers, OptimizerName);

template <class O>
std::vector<std::string> state_names() {
  std::vector<std::string> names;
  for (int i = 0; i < O::scalar_states + O::vector_states; ++i) names.push_back(state_name<O>(i));
  return names;
}
using Names = std::vector<std::string>;

// State is what is allocated, saved and named: it cannot change by accident.
TEST(OptimizerState, IsAsDeclared) {
  const auto counts = [](const auto& o) {
    using O = std::remove_cvref_t<decltype(o)>;
    return std::pair<int, int>{O::scalar_states, O::vector_states};
  };
  EXPECT_EQ(counts(SGD{}), (std::pair{0, 0}));
  EXPECT_EQ(counts(RowwiseRMSprop{}), (std::pair{1, 0}));
  EXPECT_EQ(counts(RowwiseAdagrad{}), (std::pair{1, 0}));
  EXPECT_EQ(counts(Adagrad{}), (std::pair{0, 1}));
  EXPECT_EQ(counts(AdamByClock{}), (std::pair{0, 2}));
  EXPECT_EQ(counts(AdamByTouches{}), (std::pair{1, 2}));
  EXPECT_EQ(counts(PartialAdamByClock{}), (std::pair{1, 1}));
  EXPECT_EQ(counts(PartialAdamByTouches{}), (std::pair{2, 1}));

  EXPECT_EQ(state_names<SGD>(), Names{});
  EXPECT_EQ(state_names<RowwiseRMSprop>(), Names{"momentum1"});
  EXPECT_EQ(state_names<RowwiseAdagrad>(), Names{"momentum1"});
  EXPECT_EQ(state_names<Adagrad>(), Names{"momentum1"});
  EXPECT_EQ(state_names<AdamByClock>(), (Names{"momentum1", "momentum2"}));
  EXPECT_EQ(state_names<AdamByTouches>(), (Names{"touches", "momentum1", "momentum2"}));
  EXPECT_EQ(state_names<PartialAdamByClock>(), (Names{"momentum2", "momentum1"}));
  EXPECT_EQ(state_names<PartialAdamByTouches>(), (Names{"momentum2", "touches", "momentum1"}));
}

struct Unnamed {
  static constexpr int scalar_states = 1;
  static constexpr int vector_states = 3;
  RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  float element(const RowMultiplier& row, float g, float*) const { return row.multiplier * g; }
};

TEST(OptimizerState, HasNamesOfItsOwnWhereNoneAreGiven) {
  EXPECT_EQ(state_names<Unnamed>(), (Names{"state1", "state2", "state3", "state4"}));
}

TYPED_TEST(Optimizer, IsPreparedWithTheSameStateAndPromisesFiniteElements) {
  using AtStep = PreparedOptimizer<TypeParam>;
  static_assert(OptimizerPolicy<TypeParam> && EvaluatedOptimizer<AtStep>);
  static_assert(AtStep::scalar_states == TypeParam::scalar_states);
  static_assert(AtStep::vector_states == TypeParam::vector_states);
  static_assert(kElementsFinite<AtStep>);
  static_assert(!kElementsFinite<Unnamed>);
}

TEST(OptimizerState, PolicyWithoutPrepareIsEvaluatedAsItIs) {
  static_assert(std::same_as<PreparedOptimizer<RowwiseRMSprop>, RowwiseRMSprop>);
  const RowwiseRMSprop prepared = prepare(RowwiseRMSprop{0.5f, 0.25f}, 7, 0.1);
  EXPECT_EQ(prepared.eps, 0.5f);
  EXPECT_EQ(prepared.ema_beta, 0.25f);
}

// ----------------------------------------------------------------------------------------- formulas

using Real = long double;
constexpr Real kUlp = 0x1p-24L;

float power_of_ten(Random& random, double low, double high) {
  return static_cast<float>(std::pow(10.0, random.uniform(low, high)));
}

// |got - want| is at most so many roundings of `size`.
void expect_near(float got, Real want, Real size, Real roundings, const char* what) {
  EXPECT_LE(std::fabs(static_cast<Real>(got) - want), roundings * kUlp * std::fabs(size) + 1e-44L)
      << what << ": got " << got << ", want " << static_cast<double>(want);
}

TEST(Formula, SGD) {
  float none = kNanf;  // not looked at
  const auto row = SGD{}.row(&none, 3.0f, 0.1f, 5);
  EXPECT_TRUE(row.finite());
  EXPECT_EQ(SGD{}.element(row, -0.3f, &none), 0.1f * -0.3f);
  EXPECT_TRUE(std::isnan(none));
}

TEST(Formula, RowwiseRMSprop) {
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const RowwiseRMSprop optimizer{power_of_ten(random, -12, 0),
                                   static_cast<float>(random.uniform(0.0, 1.0))};
    const float v = power_of_ten(random, -20, 10), mean_square = power_of_ten(random, -20, 10);
    const float lr = power_of_ten(random, -6, 1);
    const auto g = static_cast<float>(random.uniform(-10.0, 10.0));
    const Real beta = optimizer.ema_beta;
    const Real v_new = beta * v + (1.0L - beta) * mean_square;
    const Real amount = lr / (std::sqrt(v_new) + optimizer.eps) * g;

    float state = v;
    const auto row = optimizer.row(&state, mean_square, lr, 1);
    EXPECT_TRUE(row.finite());
    expect_near(state, v_new, v_new, 4, "v");
    expect_near(optimizer.element(row, g, nullptr), amount, amount, 8, "amount");
  }
}

TEST(Formula, RowwiseAdagrad) {
  Random random(2);
  for (int i = 0; i < 20000; ++i) {
    const RowwiseAdagrad optimizer{power_of_ten(random, -12, 0)};
    const float v = power_of_ten(random, -20, 10), mean_square = power_of_ten(random, -20, 10);
    const float lr = power_of_ten(random, -6, 1);
    const auto g = static_cast<float>(random.uniform(-10.0, 10.0));
    const Real v_new = static_cast<Real>(v) + mean_square;
    const Real amount = lr / (std::sqrt(v_new) + optimizer.eps) * g;
    float state = v;
    const auto row = optimizer.row(&state, mean_square, lr, 1);
    EXPECT_TRUE(row.finite());
    expect_near(state, v_new, v_new, 1, "v");
    expect_near(optimizer.element(row, g, nullptr), amount, amount, 6, "amount");
  }
}

TEST(Formula, Adagrad) {
  Random random(3);
  for (int i = 0; i < 20000; ++i) {
    const Adagrad optimizer{power_of_ten(random, -12, 0)};
    const float v = power_of_ten(random, -15, 10), lr = power_of_ten(random, -6, 1);
    const float g = power_of_ten(random, -8, 5) * (i % 2 == 0 ? 1.0f : -1.0f);
    const Real v_new = static_cast<Real>(v) + static_cast<Real>(g) * g;
    const Real amount = lr * (g / (std::sqrt(v_new) + optimizer.eps));
    float state = v;
    const auto row = optimizer.row(nullptr, kNanf, lr, 1);  // knows no mean of squares
    EXPECT_TRUE(row.finite());
    EXPECT_EQ(row.multiplier, lr);
    const float moved = optimizer.element(row, g, &state);
    expect_near(state, v_new, v_new, 1, "v");
    expect_near(moved, amount, amount, 6, "amount");
  }
}

// Steps, or touches: the first, the next, some, where the corrections are 1, and the last.
constexpr std::int32_t kSteps[] = {1, 2, 3, 10, 1000, 100000, 16777217, INT32_MAX - 1, INT32_MAX};

struct AdamInput {
  double beta1, beta2, eps;
  float m, v, g, mean_square;
  double lr;

  explicit AdamInput(Random& random) {
    const auto below_one = [&] { return 1.0 - std::pow(10.0, random.uniform(-6.0, 0.0)); };
    beta1 = below_one();
    beta2 = below_one();
    eps = power_of_ten(random, -12, 0);
    m = static_cast<float>(random.uniform(-3.0, 3.0));
    v = power_of_ten(random, -12, 4);
    g = static_cast<float>(random.uniform(-3.0, 3.0));
    mean_square = power_of_ten(random, -12, 4);
    lr = std::pow(10.0, random.uniform(-6.0, 1.0));
  }
};

// The definition: the first moment with the size of its parts, the second, and the amount.
struct AdamResult {
  Real m, m_size, v, amount, amount_size;

  AdamResult(const AdamInput& in, Real square, Real n) {
    const Real b1 = in.beta1, b2 = in.beta2;
    m = b1 * in.m + (1.0L - b1) * in.g;
    m_size = b1 * std::fabs(in.m) + (1.0L - b1) * std::fabs(in.g);
    v = b2 * in.v + (1.0L - b2) * square;
    const Real rate = in.lr / (1.0L - std::pow(b1, n));
    const Real root = std::sqrt(v / (1.0L - std::pow(b2, n)));
    amount = rate * m / (root + static_cast<Real>(in.eps));
    amount_size = rate * m_size / (root + static_cast<Real>(in.eps));
  }
};

template <class O>
void expect_adam(std::int32_t step) {
  constexpr bool by_touches = expects_touches<O>();
  Random random(static_cast<std::uint64_t>(step));
  for (int i = 0; i < 500; ++i) {
    const AdamInput in(random);
    const O policy{in.eps, in.beta1, in.beta2};
    // What does not count is another number.
    const auto optimizer = prepare(policy, by_touches ? 77 : step, in.lr);
    float scalars[2] = {}, vectors[2] = {in.m, in.v};
    float n = static_cast<float>(step);
    if constexpr (by_touches) {
      n = std::fmin(n, 0x1p24f);  // counted in float32: 2^24 stays 2^24, where corrections are 1
      scalars[O::scalar_states - 1] = n - 1.0f;
    }
    const bool partial = O::vector_states == 1;
    if (partial) scalars[0] = in.v;
    const auto row =
        optimizer.row(scalars, partial ? in.mean_square : kNanf, static_cast<float>(in.lr), 99);
    EXPECT_TRUE(row.finite());
    const float moved = optimizer.element(row, in.g, vectors);

    const AdamResult want(in, partial ? static_cast<Real>(in.mean_square) : Real{in.g} * in.g,
                          by_touches ? static_cast<Real>(n) : static_cast<Real>(step));
    expect_near(vectors[0], want.m, want.m_size, 5, "m");
    expect_near(partial ? scalars[0] : vectors[1], want.v, want.v, 6, "v");
    // Of the corrections: 1 - beta^n for beta near 1 has 1e-9 left of the double's 1e-16.
    expect_near(moved, want.amount, want.amount_size, 24, "amount");
    if constexpr (by_touches) {
      EXPECT_EQ(scalars[O::scalar_states - 1], n);
    }
  }
}

TEST(Formula, Adam) {
  for (const std::int32_t step : kSteps) {
    expect_adam<AdamByClock>(step);
    expect_adam<AdamByTouches>(step);
  }
}

TEST(Formula, PartialRowwiseAdam) {
  for (const std::int32_t step : kSteps) {
    expect_adam<PartialAdamByClock>(step);
    expect_adam<PartialAdamByTouches>(step);
  }
}

// --------------------------------------------------------------------------------------- corners

TEST(Adam, FirstStepMovesByTheLearningRateWhateverTheGradient) {
  for (const float g : {1e-3f, 0.5f, -20.0f, 3e5f}) {
    float vectors[2] = {};
    const auto optimizer = AdamByClock{1e-20, 0.9, 0.999}.prepare(1, 0.125);
    const float moved = optimizer.element(optimizer.row(nullptr, 0.0f, 0.125f, 1), g, vectors);
    EXPECT_NEAR(moved, std::copysign(0.125f, g), 0.125f * 4e-7f);
  }
}

// beta 0 forgets at once and corrects nothing; the largest beta below 1 corrects most.
TEST(Adam, BetasAtTheirEnds) {
  for (const std::int32_t step : kSteps) {
    const auto none = AdamByClock{0.25, 0.0, 0.0}.prepare(step, 0.5);
    EXPECT_EQ(none.by_clock.rate, 0.5f);
    EXPECT_EQ(none.by_clock.square_rate, 1.0f);
    float vectors[2] = {1e10f, 1e10f};
    EXPECT_EQ(none.element(none.by_clock, 2.0f, vectors), 0.5f * (2.0f / 2.25f));
    EXPECT_EQ(vectors[0], 2.0f);
    EXPECT_EQ(vectors[1], 4.0f);

    const double most = 1.0 - 0x1p-24;
    const auto late = AdamByClock{1e-8, most, most}.prepare(step, 1.0);
    EXPECT_TRUE(late.by_clock.finite());
    const Real want = -1.0L / std::expm1(static_cast<Real>(step) * std::log1p(-0x1p-24L));
    EXPECT_NEAR(static_cast<double>(late.by_clock.rate / want), 1.0, 2e-7) << "step " << step;
    EXPECT_NEAR(static_cast<double>(late.by_clock.square_rate / want), 1.0, 2e-7);
  }
  const auto tiny = AdamByClock{1e-8, 1e-300, 1e-30}.prepare(1, 1.0);
  EXPECT_EQ(tiny.by_clock.rate, 1.0f);
  EXPECT_EQ(tiny.by_clock.square_rate, 1.0f);
}

// 1 - 0.999f is off by 1e-5: what is new is weighted with 1 - beta computed in double.
TEST(Adam, WeightOfTheNewIsNotRoundedTwice) {
  const auto optimizer = AdamByClock{1e-8, 0.99999, 0.999}.prepare(1, 0.1);
  EXPECT_EQ(optimizer.new1, static_cast<float>(1.0 - 0.99999));
  EXPECT_EQ(optimizer.new2, static_cast<float>(1.0 - 0.999));
  EXPECT_NE(optimizer.new2, 1.0f - 0.999f);
}

TEST(Adam, BetasAndMomentsAreNotMixedUp) {
  float vectors[2] = {};
  const auto optimizer = AdamByClock{1.0, 0.5, 0.75}.prepare(1, 1.0);
  optimizer.element(optimizer.by_clock, 2.0f, vectors);
  EXPECT_EQ(vectors[0], 1.0f);  // half of g
  EXPECT_EQ(vectors[1], 1.0f);  // a quarter of g^2
  EXPECT_EQ(optimizer.by_clock.rate, 2.0f);
  EXPECT_EQ(optimizer.by_clock.square_rate, 4.0f);
}

TEST(Adam, TouchesAreCountedAndOnlyByRow) {
  float scalars[2] = {};
  const auto by_row = AdamByTouches{}.prepare(1000, 0.5);
  for (int n = 1; n <= 5; ++n) {
    const auto corrected = by_row.row(scalars, 0.0f, 0.5f, 1000);
    EXPECT_EQ(scalars[0], static_cast<float>(n));
    EXPECT_NEAR(corrected.rate, 0.5 / (1.0 - std::pow(0.9, n)), 1e-6);
    EXPECT_NEAR(corrected.square_rate, 1.0 / (1.0 - std::pow(0.999, n)), 2e-4);
  }
  scalars[0] = 2.5f;  // faded by decay_state
  EXPECT_NEAR(by_row.row(scalars, 0.0f, 0.5f, 1000).rate, 0.5 / (1.0 - std::pow(0.9, 3.5)), 1e-6);
  scalars[0] = 0x1p24f;
  EXPECT_EQ(by_row.row(scalars, 0.0f, 0.5f, 1000).rate, 0.5f);
  EXPECT_EQ(scalars[0], 0x1p24f);

  const auto partial = PartialAdamByTouches{}.prepare(1000, 0.5);
  float two[2] = {};
  partial.row(two, 4.0f, 0.5f, 1000);
  EXPECT_NEAR(two[0], 0.004f, 1e-9f);  // momentum2 first
  EXPECT_EQ(two[1], 1.0f);

  float untouched[2] = {7.0f, 7.0f};
  const auto by_clock = AdamByClock{}.prepare(3, 0.5);
  EXPECT_NEAR(by_clock.row(untouched, 0.0f, 0.5f, 9).rate, 0.5 / (1.0 - 0.729), 1e-6);
  EXPECT_EQ(untouched[0], 7.0f);
}

TYPED_TEST(Optimizer, NoGradientAndNoStateMoveNothing) {
  const TypeParam policy{};
  for (const std::int32_t step : kSteps) {
    const auto optimizer = prepare(policy, step, 0.1);
    float scalars[2] = {}, vectors[2] = {};
    const auto row = optimizer.row(scalars, 0.0f, 0.1f, step);
    EXPECT_TRUE(row.finite());
    EXPECT_EQ(optimizer.element(row, 0.0f, vectors), 0.0f);
    EXPECT_EQ(vectors[0], 0.0f);
    EXPECT_EQ(vectors[1], 0.0f);
  }
}

TEST(RowwiseRMSprop, NoGradientFadesItsState) {
  float state = 4.0f;
  const RowwiseRMSprop optimizer{1e-8f, 0.5f};
  const auto row = optimizer.row(&state, 0.0f, 0.1f, 1);
  EXPECT_EQ(state, 2.0f);
  EXPECT_EQ(optimizer.element(row, 0.0f, nullptr), 0.0f);
}

// ------------------------------------------------------------------------------------- not finite

TEST(NotFinite, RowWiseOnesTellByTheirMultiplier) {
  float state = 0.0f;
  EXPECT_FALSE((RowwiseRMSprop{0.0f, 0.5f}.row(&state, 0.0f, 0.1f, 1).finite()));  // lr / 0
  state = 0.0f;
  EXPECT_FALSE((RowwiseRMSprop{0.0f, 0.5f}.row(&state, kNanf, 0.1f, 1).finite()));
  state = 0.0f;
  EXPECT_FALSE(RowwiseRMSprop{}.row(&state, 1.0f, kInff, 1).finite());
  state = 0.0f;
  EXPECT_FALSE(RowwiseAdagrad{0.0f}.row(&state, 0.0f, 0.1f, 1).finite());
  state = kNanf;
  EXPECT_FALSE(RowwiseAdagrad{}.row(&state, 1.0f, 0.1f, 1).finite());
  float scalars[2] = {kNanf, 0.0f};
  EXPECT_FALSE(PartialAdamByTouches{}.prepare(1, 0.1).row(scalars, 1.0f, 0.1f, 1).finite());
}

TYPED_TEST(Optimizer, LearningRateThatIsNotFiniteIsToldByTheRow) {
  for (const float lr : {kInff, kNanf}) {
    float scalars[2] = {};
    const auto optimizer = prepare(TypeParam{}, 3, static_cast<double>(lr));
    EXPECT_FALSE(optimizer.row(scalars, 1.0f, lr, 3).finite());
  }
}

// A beta of 1 is refused where policies are made; one that gets here stops the row.
TEST(NotFinite, BetaOfOneIsToldByTheRow) {
  EXPECT_FALSE((AdamByClock{1e-8, 1.0, 0.999}.prepare(5, 0.1).by_clock.finite()));
  EXPECT_FALSE((AdamByClock{1e-8, 0.9, 1.0}.prepare(5, 0.1).by_clock.finite()));
}

TEST(Adagrad, SumOfSquaresEndsAtTheLargestFloat) {
  float v = 3e38f;
  const Adagrad optimizer;
  EXPECT_EQ(optimizer.element({1.0f}, 1e19f, &v), 1e19f / std::sqrt(kLargestFloat));
  EXPECT_EQ(v, std::numeric_limits<float>::max());
  v = kNanf;  // stays one
  EXPECT_TRUE(std::isnan(optimizer.element({1.0f}, 1.0f, &v)));
  EXPECT_TRUE(std::isnan(v));
}

// elements_finite: gradients from 1e-38 to where their square overflows, one after the other.
TYPED_TEST(Optimizer, KeepsItsPromiseOfFiniteElements) {
  Random random(5);
  for (int run = 0; run < 3000; ++run) {
    TypeParam policy = optimizer_of<TypeParam>();
    if constexpr (requires { policy.eps; }) {
      policy.eps = static_cast<decltype(policy.eps)>(std::pow(10.0, random.uniform(-18.0, 0.0)));
    }
    if constexpr (requires { policy.beta1; }) {
      policy.beta1 = random.uniform(0.0, 0.9999);
      policy.beta2 = run % 3 == 0 ? 0.0 : random.uniform(0.0, 0.9999);
    }
    float scalars[2] = {}, vectors[2] = {};
    std::int32_t step = 0;
    for (int touch = 0; touch < 8; ++touch) {
      step += static_cast<std::int32_t>(1 + random.below(1000));
      const float lr = power_of_ten(random, -6, 0);
      float g = random.below(4) == 0 ? 0.0f : power_of_ten(random, -38, 19.26);
      if (random.below(2) == 0) g = -g;
      const auto optimizer = prepare(policy, step, static_cast<double>(lr));
      const auto row = optimizer.row(scalars, g * g, lr, step);
      if (!row.finite()) break;
      bool finite = true;
      for (const float s : scalars) finite = finite && std::isfinite(s);
      if (!finite) break;  // the row update stops here
      ASSERT_TRUE(std::isfinite(optimizer.element(row, g, vectors))) << "g " << g;
      ASSERT_TRUE(std::isfinite(vectors[0]) && std::isfinite(vectors[1])) << "g " << g;
    }
  }
}

}  // namespace
}  // namespace coldrow_test
