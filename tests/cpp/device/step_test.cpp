#include "run.hpp"

namespace coldrow_test {
namespace {

// What the device prepares is what the host prepares, for every decay, from a clock and lr that change
// between launches as between replays of a graph.
TEST(DeviceStep, PreparedUpdatesAreTheHosts) {
  using Update = RowUpdate<coldrow::bfloat16, float, RowwiseRMSprop, AnyDecay, Stochastic>;
  std::int64_t clock = 0, epoch_start = 0;
  double lr = 0.0;
  const double other_lr = 0.25;
  std::vector<device::Recipe<Update>> recipes;
  for (const DecayCase& c : decay_cases()) {
    recipes.push_back({{1e-3f, 0.5f},
                       c.policy,
                       {recipes.size()},
                       recipes.size() % 2 == 0,
                       recipes.size() % 3 == 0 ? OnNonfinite::propagate : OnNonfinite::skip,
                       {&lr}});
  }
  recipes.back().lr = {&other_lr};
  recipes[1].lr = {nullptr, 0.5};
  const auto count = static_cast<std::int32_t>(recipes.size());
  std::vector<std::int32_t> numbers(recipes.size());
  std::vector<Update> updates(recipes.size());
  device::Report report{};
  device::Queue queue(nullptr);
  device::begin_batch(queue, &report, true);
  for (const auto& [at, rate, epoch] :
       {std::tuple{0, 0.02, 0}, {5, 0.02, 3}, {6, 0.001, 3}, {INT32_MAX - 1, 1.0, INT32_MAX}}) {
    clock = at;
    lr = rate;
    epoch_start = epoch;
    device::prepare_updates(queue, {{&clock}, {&epoch_start}}, recipes.data(), numbers.data(),
                            count, updates.data(), &report);
    ASSERT_EQ(report.found, device::kNothing);
    for (std::size_t i = 0; i < recipes.size(); ++i) {
      const auto& r = recipes[i];
      Update expected =
          Update::at(at + 1, r.lr.get(), r.optimizer, r.decay, r.rounding, r.decay_state, epoch);
      expected.on_nonfinite = r.on_nonfinite;
      EXPECT_EQ(updates[i].step, expected.step);
      EXPECT_EQ(updates[i].lr, expected.lr);
      EXPECT_EQ(updates[i].rounding.seed, i);
      EXPECT_EQ(updates[i].decay_state, expected.decay_state);
      EXPECT_EQ(updates[i].on_nonfinite, expected.on_nonfinite);
      for (const std::int32_t gap : {0, 1, 2, 4, 900, INT32_MAX - 5}) {
        EXPECT_EQ(bits_of(updates[i].decay(gap, expected.lr)),
                  bits_of(expected.decay(gap, expected.lr)))
            << decay_cases()[i].name << ", gap " << gap;
      }
    }
  }
}

// A record that a later problem of a higher kind, or a later position, does not replace.
TEST(DeviceStep, TheFirstProblemOfTheLowestKindCounts) {
  using device::Refusal;
  EXPECT_LT(device::pack(Refusal::offsets_start, 9), device::pack(Refusal::offsets_decrease, 0));
  EXPECT_LT(device::pack(Refusal::index_range, INT32_MAX), device::pack(Refusal::step_range, 0));
  EXPECT_LT(device::pack(Refusal::stale_row, (1ull << 56) - 1),
            device::pack(Refusal::nonfinite_row, 0));
  EXPECT_LT(device::pack(Refusal::nonfinite_row, (1ull << 56) - 1), device::kNothing);
  for (const auto kind :
       {BatchProblem::none, BatchProblem::offsets_start, BatchProblem::offsets_decrease,
        BatchProblem::offsets_end, BatchProblem::index_range}) {
    EXPECT_EQ(static_cast<BatchProblem::Kind>(static_cast<Refusal>(kind)), kind);
  }
}

// Descriptors of any length arrive whole, and what the host does with its copy later does not matter.
TEST(DeviceStep, UploadBringsAllBytes) {
  for (const std::size_t bytes : {0, 1, 3071, 3072, 3073, 10000}) {
    std::vector<unsigned char> from(bytes), to(bytes + 1, 0xaa);
    for (std::size_t i = 0; i < bytes; ++i) from[i] = static_cast<unsigned char>(i * 7);
    const std::vector<unsigned char> copy = from;
    device::Queue queue(nullptr);
    device::upload(queue, to.data(), from.data(), bytes);
    EXPECT_TRUE(std::equal(copy.begin(), copy.end(), to.begin()));
    EXPECT_EQ(to[bytes], 0xaa);
  }
}

}  // namespace
}  // namespace coldrow_test
