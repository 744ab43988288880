// All of it together: a table trained on the host with read-charged decay, by the umbrella header.
#include <coldrow/coldrow.hpp>

#include "dense.hpp"
#include "support.hpp"

namespace coldrow_test {
namespace {

constexpr std::int64_t kRows = 30, kBatch = 8;
constexpr double kLr = 0.05;

// The gradient depends on the row as it was read. Decay, lookup, sort and update are the library's;
// the dense loop sees the same batches and its own weights.
template <class W>
double worst_difference(int dim, int steps) {
  Random random(1);
  const auto d = static_cast<std::size_t>(dim);
  std::vector<W> weight = random.numbers<W>(kRows * dim);
  std::vector<float> momentum1(kRows);
  std::vector<std::int32_t> prev_iter(kRows);
  Table<W, RowwiseRMSprop> table;
  table.weight = weight.data();
  table.rows = kRows;
  table.dim = dim;
  table.prev_iter = {prev_iter.data()};
  table.scalars[0] = {momentum1.data()};

  const CumulativeLinear decay{0.003};
  const reference::Update dense_update{RowwiseRMSprop{1e-6f, 0.9f}, decay, false};
  DenseTable dense(weight, dim);

  const Feature feature{0, dim, 0, kBatch, 0, kBatch, 0, 0, dim};
  double worst = 0.0;
  for (std::int32_t step = 1; step <= steps; ++step) {
    std::vector<std::int64_t> indices;
    for (std::int64_t i = 0; i < kBatch; ++i) {
      indices.push_back(random.below(2) == 0 ? random.below(3) : random.below(kRows));
    }
    std::vector<float> scale(kBatch), out(kBatch * d), grad(kBatch * d);
    host::read_scales(prepare(decay, step - 1, kLr, 0), step, static_cast<float>(kLr),
                      Strided<const std::int32_t>{prev_iter.data()}, indices.data(), 0, kBatch,
                      nullptr, scale.data());
    host::lookup_bags(host::Bags<W, std::int64_t>{weight.data(), dim, indices.data(), nullptr, 0,
                                                  kBatch, kBatch, scale.data(), false},
                      out.data(), dim);
    std::vector<double> dense_grad(kBatch * d);
    for (std::size_t i = 0; i < kBatch; ++i) {
      for (std::size_t k = 0; k < d; ++k) {
        const double read = dense.weight[static_cast<std::size_t>(indices[i]) * d + k];
        worst = std::max(worst, std::fabs(value_of(out[i * d + k]) - read));
        // Mostly noise: with the row's error alone, rounding differences would feed on themselves.
        const auto noise = static_cast<float>(random.uniform(-1.0, 1.0));
        grad[i * d + k] = 0.125f * out[i * d + k] + noise;
        dense_grad[i * d + k] = 0.125 * read + value_of(noise);
      }
    }
    dense.step(indices, dense_grad, dense_update, kLr);

    const Batch<std::int64_t> batch{indices.data(), nullptr, kBatch, kBatch, &feature, 1,
                                    true,           false,   nullptr};
    std::vector<host::PlainEntry> entries(kBatch), other(kBatch);
    std::vector<std::uint32_t> counts(host::kCounts);
    std::vector<float> scratch(static_cast<std::size_t>(host::scratch_floats(static_cast<int>(d))));
    const auto* sorted = host::sort_lookups(host::Lookups<std::int64_t>{batch, &feature, 1}, 5, 1,
                                            entries.data(), other.data(), counts.data());
    const auto update = RowUpdate<W, float, RowwiseRMSprop, CumulativeLinear, Nearest>::at(
        step, kLr, {1e-6f, 0.9f}, decay);
    host::apply_runs(update, table, sorted, 0, kBatch, 0, host::Pass::update,
                     host::GradientRows<float>{grad.data(), &feature, 1}, scratch.data());
  }
  return worst;
}

TEST(Coldrow, ReadChargedTrainingIsTheDenseLoop) {
  EXPECT_LT(worst_difference<float>(5, 300), 2e-5);
  EXPECT_LT(worst_difference<float>(64, 300), 2e-5);
}

}  // namespace
}  // namespace coldrow_test
