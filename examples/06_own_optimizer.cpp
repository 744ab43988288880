// An optimizer of your own (lion.hpp) on a table, tested against a plain loop.
#include <cmath>
#include <coldrow/table/table.hpp>
#include <cstdio>
#include <vector>

#include "lion.hpp"

static_assert(coldrow::OptimizerPolicy<Lion>);

int main() {
  constexpr int kRows = 4, kDim = 20;
  constexpr double kLr = 0.01;
  constexpr float kWeightDecay = 0.125f;
  std::vector<float> weight(kRows * kDim, 1.0f), momentum1(kRows * kDim);
  std::vector<std::int32_t> prev_iter(kRows);
  coldrow::Table<float, Lion> table;  // a view: the memory stays ours
  table.weight = weight.data();
  table.rows = kRows;
  table.dim = kDim;
  table.prev_iter = {prev_iter.data()};
  table.vectors[0] = momentum1.data();
  std::vector<double> w(kRows * kDim, 1.0), m(kRows * kDim);  // the plain loop's

  using Update = coldrow::RowUpdate<float, float, Lion, coldrow::Constant, coldrow::Nearest>;
  for (std::int32_t step = 1; step <= 200; ++step) {
    const int r = step * step % kRows;  // touches rows 0 and 1
    float grad[kDim];
    for (int d = 0; d < kDim; ++d) {  // none in column 0: decay alone moves it
      grad[d] = d == 0 ? 0.0f : static_cast<float>(std::sin(step + 0.7 * d + r));
    }

    const auto update = Update::at(step, kLr, Lion{}, {.weight_decay = kWeightDecay});
    if (!update(coldrow::Serial{}, table.row(r), grad, kDim, table.key(r))) return 1;

    for (int d = 0; d < kDim; ++d) {
      const int i = r * kDim + d;
      const double direction = 0.9 * m[i] + 0.1 * grad[d];
      w[i] -= kLr * ((direction > 0.0) - (direction < 0.0) + kWeightDecay * w[i]);
      m[i] = 0.99 * m[i] + 0.01 * grad[d];
    }
  }

  double worst = 0.0;
  for (int i = 0; i < kRows * kDim; ++i) worst = std::fmax(worst, std::fabs(weight[i] - w[i]));
  for (int r = 0; r < kRows; ++r) {
    std::printf("row %d: weight %.4f %.4f ..., last touched at step %d\n", r, weight[r * kDim],
                weight[r * kDim + 1], prev_iter[r]);
  }
  std::printf("the plain loop differs by at most %.1e\n", worst);
  return worst < 1e-4 && weight[3 * kDim] == 1.0f ? 0 : 1;
}
