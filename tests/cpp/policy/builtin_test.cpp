#include <coldrow/policy/builtin.hpp>
#include <string>

#include "../support.hpp"

namespace coldrow_test {
namespace {

TEST(Builtin, NumbersByName) {
  EXPECT_EQ(policy_number<BuiltinDecays>("none"), BuiltinDecays::number<NoDecay>);
  EXPECT_EQ(policy_number<BuiltinDecays>("exponential"), BuiltinDecays::number<Exponential>);
  EXPECT_EQ(policy_number<BuiltinDecays>("exponentia"), -1);
  EXPECT_EQ(policy_number<BuiltinDecays>("exponential2"), -1);
  EXPECT_EQ(policy_number<BuiltinOptimizers>("adam"),
            BuiltinOptimizers::number<Adam<BiasCorrection::clock>>);
  EXPECT_EQ(policy_number<BuiltinOptimizers>("adam_by_touches"),
            BuiltinOptimizers::number<Adam<BiasCorrection::row>>);
  EXPECT_EQ(policy_number<BuiltinRoundings>("stochastic"), BuiltinRoundings::number<Stochastic>);
}

TEST(Builtin, FieldsByName) {
  LinearClipped decay;
  EXPECT_TRUE(set_field(decay, "alpha", 0.1));
  EXPECT_TRUE(set_field(decay, "min_shrinkage", 0.5));
  EXPECT_FALSE(set_field(decay, "half_life", 0.5));
  EXPECT_EQ(decay.alpha, 0.1f);  // rounded
  EXPECT_EQ(decay.min_shrinkage, 0.5f);
  Stochastic rounding;
  const std::uint64_t seed = ~std::uint64_t{0} - 1;
  EXPECT_TRUE(set_field(rounding, "seed", seed));
  EXPECT_EQ(rounding.seed, seed);
}

// Every field of every policy is reached by its own name and by no other's.
template <class List>
void expect_own_fields() {
  List::for_each([](auto one) {
    using P = typename decltype(one)::type;
    std::vector<std::string> names;
    P policy{};
    P::fields(policy, [&](const char* name, const auto&) { names.push_back(name); });
    for (const std::string& name : names) {
      P changed{};
      ASSERT_TRUE(set_field(changed, name.c_str(), 3.0)) << P::name << "." << name;
      int threes = 0;
      P::fields(changed, [&](const char* field, const auto& x) {
        if (static_cast<double>(x) == 3.0) {
          ++threes;
          EXPECT_EQ(field, name);
        }
      });
      EXPECT_EQ(threes, 1) << P::name << "." << name;
    }
  });
}

TEST(Builtin, EveryFieldIsItself) {
  expect_own_fields<BuiltinOptimizers>();
  expect_own_fields<BuiltinDecays>();
  expect_own_fields<BuiltinRoundings>();
}

static_assert(DecayByTable<CumulativeLinear> && !DecayByTable<Exponential> &&
              !DecayByTable<LinearClipped>);
static_assert(std::same_as<RoundingOf<float, Stochastic>, Nearest> &&
              std::same_as<RoundingOf<half, Stochastic>, Stochastic>);

}  // namespace
}  // namespace coldrow_test
