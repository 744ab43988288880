// An update is composed of types: here Adam, a decay that waits for an epoch to begin, and rounding
// to nearest. The decay fades Adam's moments too. Then the same decay, chosen at run time.
#include <cmath>
#include <coldrow/policy/any_decay.hpp>
#include <coldrow/row/update.hpp>
#include <cstdio>
#include <vector>

using namespace coldrow;

struct RowOfTwo {
  float weight[2] = {1.0f, -1.0f};
  float momentum1[2] = {}, momentum2[2] = {};  // Adam's state: two numbers per element
  std::int32_t prev_iter = 0;
  bool operator==(const RowOfTwo&) const = default;
};

// Touches the row once; returns the factor it shrank by.
template <class Decay>
float touch(RowOfTwo& row, const Decay& decay, std::int32_t step, std::int32_t epoch_start) {
  using Update = RowUpdate<float, float, Adam<>, Decay, Nearest>;
  const auto update = Update::at(step, /*lr=*/0.01, Adam<>{.beta1 = 0.9}, decay, Nearest{},
                                 /*decay_state=*/true, epoch_start);
  const float factor = touch_factor(update.decay, step, row.prev_iter, update.lr);
  const float grad[2] = {0.5f, -0.25f};
  update(Serial{}, {row.weight, &row.prev_iter, {}, {row.momentum1, row.momentum2}}, grad, 2, {});
  return factor;
}

int main() {
  // After n untouched steps about 2^-(n/10)^2: a product over the steps, whose values fit in a
  // table. The table is ours and must live as long as the policy; without one the policy is right
  // too, but multiplies step by step.
  const double alpha = 2.0 * 0.6931471805599453 / (10.0 * 10.0);
  std::vector<float> table(static_cast<std::size_t>(CumulativeLinear::table_size(alpha)));
  CumulativeLinear::fill_table(alpha, table.data());
  const CumulativeLinear cumulative{alpha, table.data(), static_cast<std::int32_t>(table.size())};
  const EpochGated<CumulativeLinear> gated{cumulative};

  RowOfTwo row;
  const float first = touch(row, gated, /*step=*/1, /*epoch_start=*/1);
  const float same_epoch = touch(row, gated, 4, 1);
  const float before = row.momentum1[0];
  const float next_epoch = touch(row, gated, 12, 11);  // 8 steps later, and an epoch began between
  const float after = row.momentum1[0];
  const float again = touch(row, gated, 13, 11);
  std::printf("factors %.4f, %.4f in the first epoch, %.4f, %.4f in the second\n", first,
              same_epoch, next_epoch, again);
  std::printf("momentum1 %.4f -> %.4f\n", before, after);

  double expected = 1.0;
  for (int j = 1; j < 8; ++j) expected *= 1.0 - alpha * j;
  const bool gate = first == 1.0f && same_epoch == 1.0f && again == 1.0f &&
                    std::fabs(next_epoch - expected) < 1e-6;
  const bool faded = std::fabs(after - (0.9 * next_epoch * before + 0.1 * 0.5)) < 1e-6;

  const AnyDecay any(cumulative, /*gated=*/true);  // one type for all built-in decays
  RowOfTwo other;
  for (const std::int32_t step : {1, 4, 12, 13}) touch(other, any, step, step < 11 ? 1 : 11);
  std::printf("chosen at run time: %s\n", other == row ? "the same bits" : "other bits");
  return gate && faded && other == row ? 0 : 1;
}
