#include <coldrow/policy/any_decay.hpp>
#include <coldrow/row/update.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

static_assert(DecayPolicy<AnyDecay> && DecayPolicy<AnyDecay::AtStep>);

// What a driver asks for many rows at once is what it would be told of each.
template <class Many, class One>
void expect_same_by_rows(const Many& many, const One& one, std::int32_t step, float lr) {
  const std::int32_t prev_iter[16] = {0,
                                      step,
                                      step - (step > 0),
                                      step / 2,
                                      1,
                                      2,
                                      INT32_MAX,
                                      INT32_MAX - 1,
                                      -1,
                                      INT32_MIN,
                                      -step,
                                      step / 3,
                                      900,
                                      99,
                                      step / 2 + 10,
                                      0};
  float factor[16];
  touch_factors(many, step, prev_iter, lr, factor);
  for (int i = 0; i < 16; ++i) {
    ASSERT_EQ(bits_of(factor[i]), bits_of(touch_factor(one, step, prev_iter[i], lr)))
        << "touch, step " << step << ", prev_iter " << prev_iter[i];
  }
  const std::int64_t next = std::int64_t{step} + 1;
  read_factors(many, next, prev_iter, lr, factor);
  for (int i = 0; i < 16; ++i) {
    ASSERT_EQ(bits_of(factor[i]), bits_of(read_factor(one, next, prev_iter[i], lr)))
        << "read, step " << next << ", prev_iter " << prev_iter[i];
  }
}

// `any` and `policy` are one function, bit for bit.
template <class Policy>
void expect_same(const AnyDecay& any, const Policy& policy) {
  for (const double lr : {1e-4, 0.02, 1.0}) {
    const auto lr32 = static_cast<float>(lr);
    for (const std::int32_t step : {0, 1, 5, 1000, 16777300, INT32_MAX}) {
      for (const std::int32_t epoch_start : {0, 1, 4, 900, INT32_MAX - 10}) {
        const auto a = prepare(any, step, lr, epoch_start);
        const auto b = prepare(policy, step, lr, epoch_start);
        for (const std::int32_t gap : {0, 1, 2, 4, 5, 99, 101, 996, 16777217, INT32_MAX}) {
          ASSERT_EQ(bits_of(a(gap, lr32)), bits_of(b(gap, lr32)))
              << "lr " << lr << " step " << step << " epoch " << epoch_start << " gap " << gap;
        }
        ASSERT_EQ(bits_of(first_touch(a, lr32)), bits_of(first_touch(b, lr32)));
        a.visit([&](const auto& own) { expect_same_by_rows(own, b, step, lr32); });
      }
    }
    for (const std::int32_t gap : {0, 1, 7, 1000000}) {
      ASSERT_EQ(bits_of(any(gap, lr32)), bits_of(policy(gap, lr32))) << "unprepared, gap " << gap;
    }
  }
}

template <class Policy>
void expect_same_gated_and_not(AnyDecay any, const Policy& policy) {
  expect_same(any, policy);
  any.epoch_gated = true;
  expect_same(any, EpochGated<Policy>{policy});
}

TEST(AnyDecay, DefaultIsNoDecay) { expect_same_gated_and_not(AnyDecay{}, NoDecay{}); }

TEST(AnyDecay, LinearClipped) {
  expect_same_gated_and_not(LinearClipped{1e-3f, 0.1f}, LinearClipped{1e-3f, 0.1f});
}

TEST(AnyDecay, CumulativeLinear) {
  std::vector<float> table(static_cast<std::size_t>(CumulativeLinear::table_size(1e-3)));
  CumulativeLinear::fill_table(1e-3, table.data());
  for (const CumulativeLinear& policy :
       {CumulativeLinear{1e-3}, CumulativeLinear{1e-9},
        CumulativeLinear{1e-3, table.data(), static_cast<std::int32_t>(table.size())}}) {
    expect_same_gated_and_not(policy, policy);
  }
}

TEST(AnyDecay, Exponential) {
  for (const Exponential& policy : {Exponential{0.01}, Exponential{0.0, 30.0}}) {
    expect_same_gated_and_not(policy, policy);
  }
}

TEST(AnyDecay, Constant) { expect_same_gated_and_not(Constant{0.3f}, Constant{0.3f}); }

TEST(AnyDecay, EpochReset) { expect_same_gated_and_not(EpochReset{}, EpochReset{}); }

// Each of the list, whatever there is in it, with its default fields.
TEST(AnyDecay, EveryBuiltinDecay) {
  int number = 0;
  BuiltinDecays::for_each([&](auto one) {
    const typename decltype(one)::type decay{};
    const AnyDecay any = decay;
    EXPECT_EQ(any.number, number++);
    expect_same_gated_and_not(any, decay);
  });
  EXPECT_EQ(number, BuiltinDecays::size);
}

// ------------------------------------------------------------------------- known by functions alone

// Through the functions of a decay that AnyDecay does not know, gated and not.
template <class Policy>
void expect_same_through_functions(const Policy& policy) {
  static constexpr ExternalDecay functions = ExternalDecay::of<Policy>();
  AnyDecay any = AnyDecay::of(&functions, &policy);
  for (unsigned char& byte : any.policy) byte = 0xff;  // of built-in ones: not looked at
  expect_same_gated_and_not(any, policy);
}

TEST(ExternalDecay, BuiltInPolicies) {
  expect_same_through_functions(NoDecay{});
  expect_same_through_functions(LinearClipped{1e-3f, 0.1f});
  expect_same_through_functions(CumulativeLinear{1e-3});
  expect_same_through_functions(CumulativeLinear{1e-9});
  expect_same_through_functions(Exponential{0.01});
  expect_same_through_functions(Exponential{0.0, 30.0});
  expect_same_through_functions(Constant{0.3f});
  expect_same_through_functions(EpochReset{});
}

// Gates of its own, so a first touch of its own.
TEST(ExternalDecay, PolicyThatIsGatedItself) {
  const EpochGated<Exponential> policy{{0.5}, {}};
  static constexpr ExternalDecay functions = ExternalDecay::of<EpochGated<Exponential>>();
  expect_same(AnyDecay::of(&functions, &policy), policy);
}

// All that a policy may have, and as many bytes of it as fit.
struct Everything {
  double half_life = 20.0;
  struct AtStep {
    double half_life, rate;
    std::int32_t step, since;
    float more[10];
    COLDROW_HD float operator()(std::int32_t gap, float lr) const {
      const double steps = static_cast<double>(gap) + (since > 0 ? step % 7 : 0);
      return static_cast<float>(exp2_fixed(-steps / half_life)) * (1.0f - lr * more[9]);
    }
    COLDROW_HD float first_touch(float lr) const { return 1.0f - static_cast<float>(rate) * lr; }
  };
  COLDROW_HD AtStep prepare(std::int32_t step, double lr, std::int32_t epoch_start) const {
    AtStep out{half_life, lr * 0.125, step, epoch_start > 0 ? step - epoch_start : 0, {}};
    out.more[9] = 0.25f;
    return out;
  }
  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    return prepare(0, lr, 0)(gap, lr);
  }
};
static_assert(sizeof(Everything::AtStep) == ExternalDecay::capacity);

TEST(ExternalDecay, OwnPolicyWithAllThatThereIs) {
  expect_same_through_functions(Everything{});
  expect_same_through_functions(Everything{3.0});
}

}  // namespace
}  // namespace coldrow_test
