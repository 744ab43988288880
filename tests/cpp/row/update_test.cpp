#include <coldrow/policy/any_decay.hpp>
#include <coldrow/row/update.hpp>

#include "../optimizers.hpp"
#include "host_warp.hpp"

namespace coldrow_test {
namespace {

// One row and its state, in memory.
template <Numeric W>
struct OneRow {
  std::vector<W> weight;
  float momentum1 = 0.0f;
  std::int32_t prev_iter = 0;

  Row<W, RowwiseRMSprop> view() { return {weight.data(), &prev_iter, {&momentum1}, {}}; }
  bool operator==(const OneRow& other) const {
    return same_bits(weight, other.weight) && bits_of(momentum1) == bits_of(other.momentum1) &&
           prev_iter == other.prev_iter;
  }
};

template <Numeric W, Numeric G = float, class Decay = NoDecay, class Rounding = Nearest>
using Update = RowUpdate<W, G, RowwiseRMSprop, Decay, Rounding>;

constexpr double kLr = 0.02;
const RowwiseRMSprop kOptimizer{1e-6f, 0.75f};

// ---------------------------------------------------------------------------- against the reference

template <class Types>
class RowUpdateOf : public ::testing::Test {};
template <Numeric W, Numeric G>
struct Pair {
  using Weight = W;
  using Grad = G;
};
struct PairName {
  template <class P>
  static std::string GetName(int) {
    return std::string(Format<typename P::Weight>::name) + "_" + Format<typename P::Grad>::name;
  }
};
using Pairs = ::testing::Types<Pair<float, float>, Pair<half, float>, Pair<bfloat16, float>,
                               Pair<float, half>, Pair<half, bfloat16>, Pair<bfloat16, bfloat16>>;
TYPED_TEST_SUITE(RowUpdateOf, Pairs, PairName);

// Several touches of one row with gaps of 1 to 1000, two of them across an epoch's start. The
// reference starts each step from what is stored, so that roundings do not add up.
template <class W, class G>
void follow_reference(const DecayCase& decay, int dim, bool decay_state, Random& random) {
  OneRow<W> row{random.numbers<W>(dim)};
  reference::Update expected{kOptimizer, decay.expected, decay_state};
  for (const std::int32_t step : {3, 4, 6, 31, 32, 1032}) {
    const std::int32_t epoch_start = step >= 31 ? 31 : step >= 6 ? 5 : 0;
    const auto grad = random.numbers<G>(dim);
    std::vector<double> w = values_of(row.weight);
    const std::vector<double> g = values_of(grad);
    double v = value_of(row.momentum1);
    std::int64_t prev = row.prev_iter;
    const std::int64_t index = 0;
    reference::apply(expected, w.data(), dim, {&prev, &v}, g.data(), &index, 1, step, kLr,
                     epoch_start);

    const auto update = Update<W, G, AnyDecay>::at(step, kLr, kOptimizer, decay.policy, {},
                                                   decay_state, epoch_start);
    ASSERT_TRUE(update(Serial{}, row.view(), grad.data(), dim, {}));
    ASSERT_EQ(row.prev_iter, step);
    ASSERT_NEAR(row.momentum1 / v, 1.0, 1e-6);
    for (int d = 0; d < dim; ++d) {
      const auto i = static_cast<std::size_t>(d);
      const double amount = kLr / (std::sqrt(v) + value_of(kOptimizer.eps)) * std::fabs(g[i]);
      double tolerance = 4e-6 * std::max({1.0, std::fabs(w[i]), amount});
      if (!std::same_as<W, float>) tolerance += spacing<W>(w[i]) / 2.0;
      ASSERT_NEAR(value_of(row.weight[i]), w[i], tolerance)
          << decay.name << ", dim " << dim << ", step " << step << ", column " << d;
    }
  }
}

TYPED_TEST(RowUpdateOf, FollowsTheReference) {
  Random random(1);
  for (const DecayCase& decay : decay_cases()) {
    for (const int dim : {1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 130}) {
      for (const bool decay_state : {false, true}) {
        follow_reference<typename TypeParam::Weight, typename TypeParam::Grad>(decay, dim,
                                                                               decay_state, random);
      }
    }
  }
}

TYPED_TEST(RowUpdateOf, ReadsAndWritesNothingPastTheRow) {
  using W = typename TypeParam::Weight;
  using G = typename TypeParam::Grad;
  Random random(2);
  for (const int dim : {1, 15, 16, 17, 33, 64, 70}) {
    const AtPageEnd<W> weight(random.numbers<W>(dim));
    const AtPageEnd<G> grad(random.numbers<G>(dim));
    OneRow<W> state;
    Row<W, RowwiseRMSprop> row = state.view();
    row.weight = weight.data();
    const auto update = Update<W, G>::at(1, kLr);
    EXPECT_TRUE(update.finite(Serial{}, row, grad.data(), dim));
    EXPECT_TRUE(update(Serial{}, row, grad.data(), dim, {}));
  }
}

// -------------------------------------------------------------------------------- what stays exact

template <class Decay>
void expect_plain(const Decay& decay) {
  for (const int dim : {1, 16, 37}) {
    Random random(3);
    OneRow<float> plain{random.numbers<float>(dim)};
    OneRow<float> decayed = plain;
    for (const std::int32_t step : {1, 2, 5, 100000, INT32_MAX}) {
      const auto grad = random.numbers<float>(dim);
      Update<float>::at(step, kLr)(Serial{}, plain.view(), grad.data(), dim, {});
      Update<float, float, Decay>::at(step, kLr, {}, decay, {}, true)(Serial{}, decayed.view(),
                                                                      grad.data(), dim, {});
      ASSERT_TRUE(plain == decayed) << "step " << step;
    }
  }
}

TEST(RowUpdate, WithoutStrengthADecayIsThePlainOptimizerBitForBit) {
  expect_plain(LinearClipped{0.0f, 0.1f});
  expect_plain(CumulativeLinear{0.0});
  expect_plain(Exponential{0.0});
  expect_plain(Constant{0.0f});
  expect_plain(AnyDecay{});
  expect_plain(EpochGated<LinearClipped>{{0.5f, 0.0f}});  // no epoch was declared
}

TEST(RowUpdate, ZeroGradientStillTouches) {
  OneRow<float> row{{1.0f, -2.0f}, 4.0f, 3};
  const std::vector<float> grad(2);
  const auto update = Update<float, float, LinearClipped>::at(5, 0.5, {1e-8f, 0.5f}, {0.5f, 0.0f});
  EXPECT_TRUE(update(Serial{}, row.view(), grad.data(), 2, {}));
  EXPECT_EQ(row.weight, (std::vector<float>{0.5f, -1.0f}));  // 1 - 0.5 * 0.5 * 2
  EXPECT_EQ(row.momentum1, 2.0f);
  EXPECT_EQ(row.prev_iter, 5);
}

TEST(RowUpdate, ClockReachesTheLastStep) {
  const std::vector<float> grad(1);
  const auto touch = [&](std::int32_t step, std::int32_t last) {
    OneRow<float> row{{1.0f}, 0.0f, last};
    Update<float, float, LinearClipped>::at(step, 1.0, {}, {1e-8f, 0.0f})(Serial{}, row.view(),
                                                                          grad.data(), 1, {});
    EXPECT_EQ(row.prev_iter, step);
    return row.weight[0];
  };
  // A float32 counter could not tell these gaps apart.
  EXPECT_EQ(touch(kLastStep, kLastStep - 1), touch(2, 1));
  EXPECT_NEAR(touch(kLastStep, kLastStep - 10000000), 0.9f, 1e-6f);
  EXPECT_EQ(touch(kLastStep, 1), 0.0f);
}

TEST(RowUpdate, GapsAndFactors) {
  EXPECT_EQ(gap_at(7, 3), 4);
  EXPECT_EQ(gap_at(3, 3), 0);
  EXPECT_EQ(gap_at(3, 7), 0);  // written by hand
  EXPECT_EQ(gap_at(kLastStep, 1), kLastStep - 1);
  EXPECT_EQ(gap_at(kLastStep, -5), INT32_MAX);

  const LinearClipped decay{0.125f, 0.0f};
  EXPECT_EQ(touch_factor(decay, 9, 0, 1.0f), 0.875f);  // first touch: a gap of 1
  EXPECT_EQ(touch_factor(decay, 9, 5, 1.0f), 0.5f);
  EXPECT_EQ(read_factor(decay, 9, 0, 1.0f), 1.0f);  // never touched: as stored
  EXPECT_EQ(read_factor(decay, 9, 5, 1.0f), 0.625f);
  EXPECT_EQ(read_factor(decay, 9, 8, 1.0f), 1.0f);
  const std::int64_t after_the_last = std::int64_t{kLastStep} + 1;
  EXPECT_EQ(read_factor(decay, after_the_last, kLastStep - 3, 1.0f), 0.625f);
}

// -------------------------------------------------------------------------------------- not finite

struct NanDecay {
  COLDROW_HD float operator()(std::int32_t, float) const { return kNanf; }
};
struct GrowingDecay {
  COLDROW_HD float operator()(std::int32_t, float) const { return 1.0f + 0x1p-23f; }
};
struct NegativeDecay {
  COLDROW_HD float operator()(std::int32_t, float) const { return -0x1p-149f; }
};

template <class Decay>
void expect_refused(const std::vector<float>& grad, float momentum1 = 1.0f) {
  const int dim = static_cast<int>(grad.size());
  OneRow<float> row{std::vector<float>(grad.size(), 0.5f), momentum1, 3};
  const OneRow<float> before = row;
  auto update = Update<float, float, Decay>::at(5, kLr);

  EXPECT_FALSE(update.finite(Serial{}, row.view(), grad.data(), dim));
  EXPECT_TRUE(row == before) << "finite() wrote";

  update.on_nonfinite = OnNonfinite::skip;
  EXPECT_FALSE(update(Serial{}, row.view(), grad.data(), dim, {}));
  EXPECT_TRUE(row == before) << "a skipped row was written";

  update.on_nonfinite = OnNonfinite::propagate;
  EXPECT_FALSE(update.finite(Serial{}, row.view(), grad.data(), dim));
  EXPECT_TRUE(update(Serial{}, row.view(), grad.data(), dim, {}));
  EXPECT_EQ(row.prev_iter, 5);
  EXPECT_FALSE(row == before);
}

TEST(RowUpdate, NonfiniteRowsAreSkippedOrPropagated) {
  for (const std::size_t dim : {std::size_t{1}, std::size_t{20}, std::size_t{64}}) {
    for (const float bad : {kNanf, kInff, -kInff, 1e30f, -3e38f}) {  // 1e30 squared overflows
      std::vector<float> grad(dim, 0.25f);
      grad.back() = bad;
      expect_refused<NoDecay>(grad);
    }
    expect_refused<NanDecay>(std::vector<float>(dim, 0.25f));
    expect_refused<GrowingDecay>(std::vector<float>(dim, 0.25f));
    expect_refused<NegativeDecay>(std::vector<float>(dim, 0.25f));
    expect_refused<NoDecay>(std::vector<float>(dim, 0.25f), kNanf);
    expect_refused<NoDecay>(std::vector<float>(dim, 0.25f), kInff);
  }
}

TEST(RowUpdate, PropagateWritesWhatTheFormulaGives) {
  OneRow<float> row{{1.0f, 1.0f}};
  const std::vector<float> grad = {kNanf, 1.0f};
  auto update = Update<float>::at(1, kLr);
  update.on_nonfinite = OnNonfinite::propagate;
  EXPECT_TRUE(update(Serial{}, row.view(), grad.data(), 2, {}));
  EXPECT_TRUE(std::isnan(row.weight[0]) && std::isnan(row.weight[1]));
  EXPECT_TRUE(std::isnan(row.momentum1));
}

TEST(RowUpdate, FiniteWritesNothing) {
  Random random(4);
  OneRow<half> row{random.numbers<half>(40), 0.5f, 2};
  const OneRow<half> before = row;
  const auto grad = random.numbers<float>(40);
  const auto update = Update<half, float, LinearClipped>::at(9, kLr, {}, {0.5f, 0.0f}, {}, true);
  EXPECT_TRUE(update.finite(Serial{}, row.view(), grad.data(), 40));
  EXPECT_TRUE(row == before);
}

// ---------------------------------------------------------------------------- 16 bits and rounding

// The reason for Stochastic: decay below half a unit in the last place does nothing to nearest.
TEST(RowUpdate, SmallDecayMovesBfloat16OnlyWhenRoundedStochastically) {
  constexpr double kCharge = 0.0005;  // of 1.0, where bfloat16 is spaced 2^-8 below
  const std::vector<float> grad(64);
  const auto mean_after = [&](auto rounding) {
    double sum = 0.0;
    for (std::int64_t r = 0; r < 500; ++r) {
      OneRow<bfloat16> row{std::vector<bfloat16>(64, number<bfloat16>(1.0)), 0.0f, 1};
      const auto update = Update<bfloat16, float, Constant, decltype(rounding)>::at(
          2, 1.0, {}, {static_cast<float>(kCharge)}, rounding);
      update(Serial{}, row.view(), grad.data(), 64, {0, r, 0, 0});
      for (const bfloat16 w : row.weight) sum += value_of(w);
    }
    return sum / (500 * 64);
  };
  EXPECT_EQ(mean_after(Nearest{}), 1.0);
  const double unit = 0x1p-8;
  const double rate = kCharge / unit;
  const double deviation = unit * std::sqrt(rate * (1.0 - rate) / (500 * 64));
  EXPECT_NEAR(mean_after(Stochastic{1}), 1.0 - kCharge, 5.0 * deviation);
}

// A shard of a row rounds as the whole row does, given its offsets.
TEST(RowUpdate, ShardsRoundLikeTheWhole) {
  Random random(5);
  const std::vector<float> grad(48);  // zero, so that the mean square is the same for every shard
  const OneRow<half> start{random.numbers<half>(48), 0.0f, 1};
  const auto update =
      Update<half, float, Constant, Stochastic>::at(2, 0.3, {}, {0.1f}, Stochastic{9});
  OneRow<half> whole = start;
  update(Serial{}, whole.view(), grad.data(), 48, {7, 1000, 0, 0});
  for (const int cut : {5, 16, 24, 33}) {
    OneRow<half> left = start, right = start;
    update(Serial{}, left.view(), grad.data(), cut, {7, 1000, 0, 0});
    Row<half, RowwiseRMSprop> shard = right.view();
    shard.weight += cut;
    update(Serial{}, shard, grad.data(), 48 - cut, {7, 1000, cut, 0});
    std::copy(right.weight.begin() + cut, right.weight.end(), left.weight.begin() + cut);
    EXPECT_TRUE(same_bits(left.weight, whole.weight)) << cut;
  }
}

TEST(RowUpdate, StochasticBitsAreThoseOfTheStep) {
  const std::vector<float> grad(64);
  const OneRow<half> start{std::vector<half>(64, number<half>(1.0)), 0.0f, 1};
  const auto after = [&](std::int32_t step, std::int32_t step_in_key) {
    OneRow<half> row = start;
    Update<half, float, Constant, Stochastic>::at(step, 1.0, {}, {0.0003f})(
        Serial{}, row.view(), grad.data(), 64, {0, 0, 0, step_in_key});
    return row.weight;
  };
  EXPECT_TRUE(same_bits(after(2, 0), after(2, 99)));  // the update sets the key's step
  EXPECT_FALSE(same_bits(after(2, 0), after(3, 0)));
}

// -------------------------------------------------------------------------------------- other groups

// Gradients whose sum of squares is exact in any order, so the groups must agree bit for bit.
template <class W, class Rounding>
void expect_lanes_agree(int size, int dim, LaneOrder order) {
  Random random(6);
  OneRow<W> serial{random.numbers<W>(dim), 0.5f, 2};
  OneRow<W> shared = serial;
  for (const std::int32_t step : {5, 6, 9}) {
    std::vector<float> grad;
    for (int d = 0; d < dim; ++d) grad.push_back(static_cast<float>(random.below(17) - 8));
    const auto update =
        Update<W, float, AnyDecay, Rounding>::at(step, kLr, {}, decay_cases()[1].policy, {}, true);
    const ElementKey key{3, 4, 5, 0};
    update(Serial{}, serial.view(), grad.data(), dim, key);

    HostWarp warp(size, order);
    std::vector<char> finite(static_cast<std::size_t>(size)), done(finite);
    warp.run<4>([&](const auto& group) {
      const auto i = static_cast<std::size_t>(group.rank());
      finite[i] = update.finite(group, shared.view(), grad.data(), dim);
      done[i] = update(group, shared.view(), grad.data(), dim, key);
    });
    const std::vector<char> all(static_cast<std::size_t>(size), 1);
    EXPECT_EQ(finite, all);
    EXPECT_EQ(done, all);
    ASSERT_TRUE(serial == shared) << size << " lanes, dim " << dim << ", step " << step;
  }
}

class RowUpdateByLanes : public ::testing::TestWithParam<LaneOrder> {};

TEST_P(RowUpdateByLanes, AgreesWithSerial) {
  for (const int dim : {1, 4, 31, 32, 70, 128, 130, 300}) {
    for (const int size : {1, 2, 8, 32}) {
      expect_lanes_agree<float, Nearest>(size, dim, GetParam());
      expect_lanes_agree<half, Stochastic>(size, dim, GetParam());
      expect_lanes_agree<bfloat16, Nearest>(size, dim, GetParam());
    }
  }
}

TEST_P(RowUpdateByLanes, SkipsTogether) {
  OneRow<float> row{std::vector<float>(70, 1.0f), 1.0f, 2};
  const OneRow<float> before = row;
  std::vector<float> grad(70, 1.0f);
  grad[69] = kNanf;  // seen by one lane only
  const auto update = Update<float>::at(5, kLr);
  HostWarp warp(32, GetParam());
  std::vector<char> done(32, 1);
  warp.run<4>([&](const auto& group) {
    done[static_cast<std::size_t>(group.rank())] =
        update(group, row.view(), grad.data(), 70, ElementKey{});
  });
  EXPECT_EQ(done, std::vector<char>(32, 0));
  EXPECT_TRUE(row == before);
}

INSTANTIATE_TEST_SUITE_P(Order, RowUpdateByLanes,
                         ::testing::Values(LaneOrder::first_lane_first, LaneOrder::last_lane_first),
                         [](const auto& info) {
                           return info.param == LaneOrder::first_lane_first ? "FirstLaneFirst"
                                                                            : "LastLaneFirst";
                         });

// One thread with another block: the sum of squares is taken in another order.
template <int Block>
struct SerialOf {
  static constexpr int block = Block;
  int rank() const { return 0; }
  int size() const { return 1; }
  float sum(float x) const { return x; }
};

template <int Block>
void expect_block_agrees() {
  Random random(7);
  for (const int dim : {1, 7, 16, 65}) {
    OneRow<float> serial{random.numbers<float>(dim), 0.5f, 2};
    OneRow<float> other = serial;
    const auto grad = random.numbers<float>(dim);
    const auto update = Update<float>::at(5, kLr);
    update(Serial{}, serial.view(), grad.data(), dim, {});
    update(SerialOf<Block>{}, other.view(), grad.data(), dim, {});
    EXPECT_NEAR(other.momentum1 / serial.momentum1, 1.0f, 1e-6f) << "block " << Block;
    for (std::size_t d = 0; d < other.weight.size(); ++d) {
      EXPECT_NEAR(other.weight[d], serial.weight[d], 1e-6f) << "block " << Block;
    }
  }
}

TEST(RowUpdate, BlockSizeChangesNoMoreThanTheOrderOfASum) {
  expect_block_agrees<1>();
  expect_block_agrees<2>();
  expect_block_agrees<8>();
}

// --------------------------------------------------------------------------------- own optimizers

// Element-wise state, none per row.
struct HeavyBall {
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 2;
  struct AtRow {
    float lr;
    bool finite() const { return is_finite(lr); }
  };
  AtRow row(float*, float, float lr, std::int32_t) const { return {lr}; }
  float element(const AtRow& row, float g, float* state) const {
    state[0] = 0.5f * state[0] + g;
    state[1] += 1.0f;
    return row.lr * state[0];
  }
};

TEST(RowUpdate, ElementWiseStateIsCarriedAndDecayed) {
  for (const int dim : {1, 16, 19, 40}) {
    for (const bool decay_state : {false, true}) {
      Random random(8);
      const auto n = static_cast<std::size_t>(dim);
      std::vector<float> w = random.numbers<float>(dim), m = random.numbers<float>(dim),
                         touches(n, 8.0f);
      const std::vector<float> w0 = w, m0 = m, g = random.numbers<float>(dim);
      std::int32_t prev_iter = 3;
      const Row<float, HeavyBall> row{w.data(), &prev_iter, {}, {m.data(), touches.data()}};
      const auto update = RowUpdate<float, float, HeavyBall, Constant, Nearest>::at(
          7, 0.5, {}, {0.5f}, {}, decay_state);
      EXPECT_TRUE(update(Serial{}, row, g.data(), dim, {}));
      EXPECT_EQ(prev_iter, 7);
      const double fade = decay_state ? 0.75 : 1.0;
      for (std::size_t d = 0; d < n; ++d) {
        const double moment = 0.5 * fade * value_of(m0[d]) + value_of(g[d]);
        EXPECT_NEAR(value_of(m[d]), moment, 1e-6);
        EXPECT_NEAR(value_of(w[d]), 0.75 * value_of(w0[d]) - 0.5 * moment, 1e-6);
        EXPECT_EQ(value_of(touches[d]), 8.0 * fade + 1.0);
      }
    }
  }
}

// --------------------------------------------------------------------------------- every optimizer

template <class O>
class EveryOptimizer : public ::testing::Test {};
TYPED_TEST_SUITE(EveryOptimizer, Optimizers, OptimizerName);

template <class O, class W, class G>
void follow_reference(const DecayCase& decay, int dim, bool decay_state, Random& random) {
  const O optimizer = optimizer_of<O>();
  const reference::Update expected{optimizer, decay.expected, decay_state};
  OptimizedTable<W, O> table(1, dim, random);
  for (const std::int32_t step : {3, 4, 6, 31, 1032}) {
    const std::int32_t epoch_start = step >= 31 ? 31 : step >= 6 ? 5 : 0;
    const std::vector<double> grad = exact_gradients(dim, random);
    const OptimizedTable<W, O> before = table;
    const auto update = RowUpdate<W, G, O, AnyDecay, Nearest>::at(
        step, kLr, optimizer, decay.policy, {}, decay_state, epoch_start);
    ASSERT_TRUE(update.finite(Serial{}, table.row(), numbers_of<G>(grad).data(), dim));
    ASSERT_TRUE(table == before) << "finite() wrote";
    ASSERT_TRUE(update(Serial{}, table.row(), numbers_of<G>(grad).data(), dim, {}));
    expect_step(expected, before, table, grad, {0}, step, kLr, epoch_start,
                decay.name + ", dim " + std::to_string(dim) + ", step " + std::to_string(step) +
                    (decay_state ? ", decay_state" : ""));
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TYPED_TEST(EveryOptimizer, FollowsTheReference) {
  Random random(11);
  for (const DecayCase& decay : decay_cases()) {
    for (const bool decay_state : {false, true}) {
      for (const int dim : {1, 5, 15, 16, 17, 33, 64, 100}) {
        follow_reference<TypeParam, float, float>(decay, dim, decay_state, random);
      }
      for (const int dim : {1, 16, 21}) {
        follow_reference<TypeParam, half, float>(decay, dim, decay_state, random);
        follow_reference<TypeParam, bfloat16, half>(decay, dim, decay_state, random);
      }
    }
  }
}

// The row and its state lie before memory that may not be touched, and after a neighbour.
TYPED_TEST(EveryOptimizer, TouchesNothingButItsOwnColumns) {
  Random random(12);
  for (const int dim : {1, 15, 16, 17, 33, 70}) {
    const auto update = RowUpdate<float, float, TypeParam, NoDecay, Nearest>::at(1, kLr);
    const AtPageEnd<float> grad(random.numbers<float>(dim));
    const AtPageEnd<float> weight(random.numbers<float>(dim));
    const AtPageEnd<float> first(random.numbers<float>(dim, 0.0, 1.0));
    const AtPageEnd<float> second(random.numbers<float>(dim, 0.0, 1.0));
    OptimizedTable<float, TypeParam> table(1, dim, random);
    Row<float, TypeParam> row = table.row();
    row.weight = weight.data();
    float* const ends[] = {first.data(), second.data()};
    for (int s = 0; s < TypeParam::vector_states; ++s) row.vectors[s] = ends[s];
    EXPECT_TRUE(update.finite(Serial{}, row, grad.data(), dim));
    EXPECT_TRUE(update(Serial{}, row, grad.data(), dim, {}));

    OptimizedTable<float, TypeParam> three(3, dim, random), before = three;
    EXPECT_TRUE(update(Serial{}, three.row(1), grad.data(), dim, {}));
    const auto n = static_cast<std::size_t>(dim);
    for (std::size_t i = 0; i < 3 * n; ++i) {
      if (i >= n && i < 2 * n) continue;
      EXPECT_EQ(three.weight[i], before.weight[i]);
      for (const auto& state : three.vectors) EXPECT_EQ(state[i], 0.0f);
    }
    for (const std::size_t r : {0u, 2u}) {
      for (std::size_t i = 0; i < 1 + TypeParam::scalar_states; ++i) {
        EXPECT_EQ(three.records[r * (1 + TypeParam::scalar_states) + i], 0);
      }
    }
  }
}

TYPED_TEST(EveryOptimizer, WithoutStrengthADecayIsThePlainOptimizerBitForBit) {
  for (const int dim : {1, 16, 37}) {
    Random random(13);
    OptimizedTable<float, TypeParam> plain(1, dim, random), decayed = plain;
    for (const std::int32_t step : {1, 2, 5, 100000, INT32_MAX}) {
      const auto grad = random.numbers<float>(dim);
      RowUpdate<float, float, TypeParam, NoDecay, Nearest>::at(step, kLr)(Serial{}, plain.row(),
                                                                          grad.data(), dim, {});
      RowUpdate<float, float, TypeParam, LinearClipped, Nearest>::at(
          step, kLr, {}, LinearClipped{0.0f, 0.1f}, {}, true)(Serial{}, decayed.row(), grad.data(),
                                                              dim, {});
      ASSERT_TRUE(plain == decayed) << "step " << step;
    }
  }
}

// Whatever is not finite, and in whichever column: nothing is written, or all of it.
TYPED_TEST(EveryOptimizer, NonfiniteRowsKeepAllTheirState) {
  Random random(14);
  for (const int dim : {1, 20, 64}) {
    OptimizedTable<float, TypeParam> start(1, dim, random);
    const auto good = random.numbers<float>(dim);
    RowUpdate<float, float, TypeParam, NoDecay, Nearest>::at(1, kLr)(Serial{}, start.row(),
                                                                     good.data(), dim, {});
    for (const int column : {0, dim / 2, dim - 1}) {
      for (const float bad : {kNanf, kInff, -kInff, 1e30f}) {
        std::vector<float> grad = good;
        grad[static_cast<std::size_t>(column)] = bad;
        auto update =
            RowUpdate<float, float, TypeParam, Constant, Nearest>::at(2, kLr, {}, {1.0f}, {}, true);
        OptimizedTable<float, TypeParam> table = start;
        EXPECT_FALSE(update.finite(Serial{}, table.row(), grad.data(), dim));
        EXPECT_FALSE(update(Serial{}, table.row(), grad.data(), dim, {}));
        EXPECT_TRUE(table == start) << "written for " << bad << " in column " << column;
        update.on_nonfinite = OnNonfinite::propagate;
        EXPECT_TRUE(update(Serial{}, table.row(), grad.data(), dim, {}));
        EXPECT_EQ(*table.row().prev_iter, 2);
      }
    }
  }
}

// A state that is not finite already does not come right by itself: a scalar one is found.
TYPED_TEST(EveryOptimizer, NonfiniteScalarStateIsFound) {
  Random random(15);
  for (int s = 0; s < TypeParam::scalar_states; ++s) {
    for (const float bad : {kNanf, kInff}) {
      OptimizedTable<float, TypeParam> table(1, 9, random);
      *table.row().scalars[s] = bad;
      const OptimizedTable<float, TypeParam> before = table;
      const auto grad = random.numbers<float>(9);
      const auto update = RowUpdate<float, float, TypeParam, NoDecay, Nearest>::at(1, kLr);
      EXPECT_FALSE(update.finite(Serial{}, table.row(), grad.data(), 9));
      EXPECT_FALSE(update(Serial{}, table.row(), grad.data(), 9, {}));
      EXPECT_TRUE(table == before);
    }
  }
}

// Nothing to divide by: all that is wrong is the row's multiplier.
template <class O>
void expect_multiplier_is_judged(const O& optimizer) {
  Random random(22);
  OptimizedTable<float, O> table(1, 9, random);
  const OptimizedTable<float, O> before = table;
  const std::vector<float> grad(9, 0.0f);
  auto update = RowUpdate<float, float, O, NoDecay, Nearest>::at(1, kLr, optimizer);
  EXPECT_FALSE(update.finite(Serial{}, table.row(), grad.data(), 9));
  EXPECT_FALSE(update(Serial{}, table.row(), grad.data(), 9, {}));
  EXPECT_TRUE(table == before);
  update.on_nonfinite = OnNonfinite::propagate;
  EXPECT_TRUE(update(Serial{}, table.row(), grad.data(), 9, {}));
  EXPECT_TRUE(std::isnan(table.weight[0]));  // infinity times no gradient
}

TEST(RowUpdate, MultiplierThatIsNotFiniteStopsTheRow) {
  expect_multiplier_is_judged(RowwiseRMSprop{0.0f, 0.5f});
  expect_multiplier_is_judged(RowwiseAdagrad{0.0f});
}

// Gradients whose sum of squares is exact in any order, as above.
template <class O, class W, class Rounding>
void expect_lanes_agree_on_state(int size, int dim, LaneOrder order) {
  Random random(16);
  OptimizedTable<W, O> serial(1, dim, random), shared = serial;
  for (const std::int32_t step : {5, 6, 9}) {
    const auto grad = numbers_of<float>(exact_gradients(dim, random));
    const auto update = RowUpdate<W, float, O, AnyDecay, Rounding>::at(
        step, kLr, optimizer_of<O>(), decay_cases()[1].policy, {}, true);
    const ElementKey key{3, 4, 5, 0};
    update(Serial{}, serial.row(), grad.data(), dim, key);
    HostWarp warp(size, order);
    warp.run<4>([&](const auto& group) {
      EXPECT_TRUE(update.finite(group, shared.row(), grad.data(), dim));
      EXPECT_TRUE(update(group, shared.row(), grad.data(), dim, key));
    });
    ASSERT_TRUE(serial == shared) << size << " lanes, dim " << dim << ", step " << step;
  }
}

TYPED_TEST(EveryOptimizer, LanesAgreeWithSerial) {
  for (const LaneOrder order : {LaneOrder::first_lane_first, LaneOrder::last_lane_first}) {
    for (const int dim : {1, 5, 31, 70, 130}) {
      for (const int size : {1, 2, 32}) {
        expect_lanes_agree_on_state<TypeParam, float, Nearest>(size, dim, order);
        expect_lanes_agree_on_state<TypeParam, bfloat16, Stochastic>(size, dim, order);
      }
    }
  }
}

TYPED_TEST(EveryOptimizer, LanesSkipTogether) {
  Random random(17);
  OptimizedTable<float, TypeParam> table(1, 70, random);
  const OptimizedTable<float, TypeParam> before = table;
  std::vector<float> grad(70, 1.0f);
  grad[69] = kInff;  // seen by one lane only
  const auto update = RowUpdate<float, float, TypeParam, NoDecay, Nearest>::at(5, kLr);
  HostWarp warp(32);
  std::vector<char> done(32, 1);
  warp.run<4>([&](const auto& group) {
    done[static_cast<std::size_t>(group.rank())] =
        update(group, table.row(), grad.data(), 70, ElementKey{});
  });
  EXPECT_EQ(done, std::vector<char>(32, 0));
  EXPECT_TRUE(table == before);
}

// ------------------------------------------------------------------- own optimizers, not finite

// Divides by the gradient: an element whose gradient is 0 moves by NaN or infinity, which neither the
// mean of squares nor the row's multiplier tells. Promise: whether it claims that this cannot be.
template <bool Promise>
struct Quotient {
  static constexpr int scalar_states = 1;
  static constexpr int vector_states = 1;
  static constexpr bool elements_finite = Promise;
  static inline int evaluated = 0;
  RowMultiplier row(float* scalars, float, float lr, std::int32_t) const {
    *scalars += 1.0f;
    return {lr};
  }
  float element(const RowMultiplier& row, float g, float* state) const {
    ++evaluated;
    *state += 1.0f;
    return row.multiplier / g;
  }
};
// The amount is always fine, its state is not.
struct BadState : Quotient<false> {
  float element(const RowMultiplier& row, float g, float* state) const {
    *state += 1.0f / g;
    return row.multiplier;
  }
};
// Says nothing about elements.
struct Silent {
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 0;
  RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  float element(const RowMultiplier& row, float g, float*) const { return row.multiplier / g; }
};
static_assert(kElementsFinite<Quotient<true>> && !kElementsFinite<Quotient<false>> &&
              !kElementsFinite<Silent>);

template <class O, class W = float>
void expect_skipped(int dim, int column) {
  Random random(18);
  OptimizedTable<W, O> table(1, dim, random);
  const OptimizedTable<W, O> before = table;
  std::vector<float> grad(static_cast<std::size_t>(dim), 0.5f);
  auto update = RowUpdate<W, float, O, NoDecay, Nearest>::at(3, 0.5);
  EXPECT_TRUE(update.finite(Serial{}, table.row(), grad.data(), dim));
  grad[static_cast<std::size_t>(column)] = 0.0f;
  EXPECT_FALSE(update.finite(Serial{}, table.row(), grad.data(), dim));
  EXPECT_FALSE(update(Serial{}, table.row(), grad.data(), dim, {}));
  EXPECT_TRUE(table == before) << "dim " << dim << ", column " << column;
  for (const LaneOrder order : {LaneOrder::first_lane_first, LaneOrder::last_lane_first}) {
    HostWarp warp(8, order);
    warp.run<4>([&](const auto& group) {
      EXPECT_FALSE(update.finite(group, table.row(), grad.data(), dim));
      EXPECT_FALSE(update(group, table.row(), grad.data(), dim, ElementKey{}));
    });
    EXPECT_TRUE(table == before) << "lanes, dim " << dim << ", column " << column;
  }
  update.on_nonfinite = OnNonfinite::propagate;
  EXPECT_TRUE(update(Serial{}, table.row(), grad.data(), dim, {}));
  EXPECT_EQ(*table.row().prev_iter, 3);
}

TEST(RowUpdate, OneElementThatIsNotFiniteStopsTheRow) {
  for (const int dim : {1, 15, 16, 17, 40, 70}) {
    for (const int column : {0, dim / 2, dim - 1}) {
      expect_skipped<Quotient<false>>(dim, column);
      expect_skipped<Quotient<false>, half>(dim, column);
      expect_skipped<BadState>(dim, column);
      expect_skipped<Silent>(dim, column);
    }
  }
}

// (Beyond the end of a row a block is filled with zeros, of which Quotient makes infinity.)
TEST(RowUpdate, ColumnsThatDoNotExistAreNotJudged) {
  Random random(19);
  for (const int dim : {1, 5, 17, 31}) {
    OptimizedTable<float, Quotient<false>> table(1, dim, random);
    const std::vector<float> start = table.weight;
    const std::vector<float> grad(static_cast<std::size_t>(dim), 0.5f);
    const auto update = RowUpdate<float, float, Quotient<false>, NoDecay, Nearest>::at(3, 0.25);
    EXPECT_TRUE(update(Serial{}, table.row(), grad.data(), dim, {}));
    HostWarp warp(8);
    warp.run<4>([&](const auto& group) {
      EXPECT_TRUE(update(group, table.row(), grad.data(), dim, ElementKey{}));
    });
    EXPECT_EQ(*table.row().scalars[0], 2.0f);
    EXPECT_EQ(table.vectors[0], std::vector<float>(static_cast<std::size_t>(dim), 2.0f));
    for (std::size_t d = 0; d < start.size(); ++d) {
      EXPECT_NEAR(table.weight[d], start[d] - 1.0f, 1e-6f);
    }
  }
}

// What the promise is for: elements are evaluated once.
template <bool Promise>
int evaluations(OnNonfinite on_nonfinite, float g, bool* done) {
  Random random(20);
  OptimizedTable<float, Quotient<Promise>> table(1, 32, random);
  const std::vector<float> grad(32, g);
  auto update = RowUpdate<float, float, Quotient<Promise>, NoDecay, Nearest>::at(3, 0.5);
  update.on_nonfinite = on_nonfinite;
  Quotient<Promise>::evaluated = 0;
  *done = update(Serial{}, table.row(), grad.data(), 32, {});
  return Quotient<Promise>::evaluated;
}

TEST(RowUpdate, ElementsAreEvaluatedTwiceOnlyWithoutThePromise) {
  bool done = false;
  EXPECT_EQ(evaluations<true>(OnNonfinite::skip, 0.5f, &done), 32);
  EXPECT_TRUE(done);
  EXPECT_EQ(evaluations<false>(OnNonfinite::skip, 0.5f, &done), 64);
  EXPECT_TRUE(done);
  EXPECT_EQ(evaluations<false>(OnNonfinite::skip, 0.0f, &done), 32);
  EXPECT_FALSE(done);
  EXPECT_EQ(evaluations<true>(OnNonfinite::skip, 0.0f, &done), 32);  // it promised
  EXPECT_TRUE(done);
}

// An own optimizer that is prepared: lr and step reach it there and nowhere else.
struct PreparedScale {
  float scale = 1.0f;
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 1;
  struct AtStep {
    float amount;
    static constexpr int scalar_states = 0;
    static constexpr int vector_states = 1;
    RowMultiplier row(float*, float, float, std::int32_t) const { return {amount}; }
    float element(const RowMultiplier& row, float, float* state) const {
      return *state += row.multiplier;
    }
  };
  AtStep prepare(std::int32_t step, double lr) const {
    return {scale * static_cast<float>(step * lr)};
  }
};

TEST(RowUpdate, OwnOptimizersArePreparedOnceAStep) {
  Random random(21);
  OptimizedTable<float, PreparedScale> table(1, 19, random);
  table.weight.assign(19, 10.0f);
  const std::vector<float> grad(19, 1.0f);
  using Update = RowUpdate<float, float, PreparedScale, NoDecay, Nearest>;
  EXPECT_TRUE(Update::at(2, 0.25, {2.0f})(Serial{}, table.row(), grad.data(), 19, {}));
  EXPECT_TRUE(Update::at(4, 0.25, {2.0f})(Serial{}, table.row(), grad.data(), 19, {}));
  EXPECT_EQ(table.vectors[0], std::vector<float>(19, 3.0f));  // 2*2/4 + 2*4/4
  EXPECT_EQ(table.weight, std::vector<float>(19, 6.0f));      // 10 - 1 - 3
}

}  // namespace
}  // namespace coldrow_test
