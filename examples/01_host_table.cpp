// A table on the host and one batch with duplicates: sort the indices, then sum the gradients of
// each row and update it once.
//
//   g++ -std=c++20 -O2 -ffp-contract=off -Iinclude examples/01_host_table.cpp && ./a.out
#include <cmath>
#include <coldrow/coldrow.hpp>
#include <cstdio>
#include <vector>

using namespace coldrow;

int main() {
  constexpr std::int64_t kRows = 5;
  constexpr int kDim = 2;
  std::vector<float> weight(kRows * kDim, 1.0f), momentum1(kRows);
  std::vector<std::int32_t> prev_iter(kRows);
  Table<float, RowwiseRMSprop> table;  // a view: the memory stays ours
  table.weight = weight.data();
  table.rows = kRows;
  table.dim = kDim;
  table.prev_iter = {prev_iter.data()};
  table.scalars[0] = {momentum1.data()};

  // One feature with three bags: rows {3, 1}, {} and {3}. Bag b's gradient is grad[b].
  const std::vector<std::int64_t> indices = {3, 1, 3}, offsets = {0, 2, 2, 3};
  const std::vector<float> grad = {0.5f, 0.25f, 9.0f, 9.0f, 0.25f, -0.25f};
  const std::int64_t bags = 3, positions = 3;
  const Feature feature{0, kDim, 0, bags, 0, positions, 0, 0, kDim};
  const Batch<std::int64_t> batch{indices.data(),  offsets.data(), bags,   positions, &feature, 1,
                                  /*pooled=*/true, false,          nullptr};
  if (check_offsets(offsets.data(), bags, positions).kind != BatchProblem::none) return 1;
  if (check_indices(batch, &kRows).kind != BatchProblem::none) return 1;

  std::vector<host::PlainEntry> entries(positions), other(positions);
  std::vector<std::uint32_t> counts(host::kCounts);
  std::vector<float> scratch(static_cast<std::size_t>(host::scratch_floats(kDim)));
  const host::PlainEntry* sorted =
      host::sort_lookups(host::Lookups<std::int64_t>{batch, &feature, 1}, host::row_bits(kRows),
                         /*threads=*/1, entries.data(), other.data(), counts.data());

  const auto update = RowUpdate<float, float, RowwiseRMSprop, LinearClipped, Nearest>::at(
      /*step=*/1, /*lr=*/0.1, {}, {/*alpha=*/0.5f, /*min_shrinkage=*/0.1f});
  const host::ApplyReport report =
      host::apply_runs(update, table, sorted, 0, positions, /*base=*/0, host::Pass::update,
                       host::GradientRows<float>{grad.data(), &feature, 1}, scratch.data());

  for (std::int64_t r = 0; r < kRows; ++r) {
    std::printf("row %d: weight %7.4f %7.4f, last touched at step %d\n", static_cast<int>(r),
                weight[2 * r], weight[2 * r + 1], prev_iter[r]);
  }

  // Row 3 got the sum of two gradients, {0.75, 0}; rows that were not in the batch stay as they are.
  const double shrink = 1.0 - 0.1 * 0.5, v = (1.0 - 0.99) * (0.75 * 0.75 + 0.0) / 2.0;
  const bool right = std::fabs(weight[2 * 3] - (shrink - 0.1 / std::sqrt(v) * 0.75)) < 1e-5 &&
                     std::fabs(weight[2 * 3 + 1] - shrink) < 1e-6 && weight[2 * 2] == 1.0f;
  return right && report.nonfinite.count == 0 ? 0 : 1;
}
