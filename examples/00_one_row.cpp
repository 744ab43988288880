// One row of a table, touched at steps 1, 2 and 50 by the same gradient.
//
//   g++ -std=c++20 -O2 -ffp-contract=off -Iinclude examples/00_one_row.cpp && ./a.out
#include <cmath>
#include <coldrow/row/update.hpp>
#include <cstdio>

int main() {
  constexpr int kDim = 4;
  float weight[kDim] = {1.0f, 1.0f, 1.0f, 1.0f};
  const float grad[kDim] = {0.5f, -0.5f, 0.5f, -0.5f};
  float momentum1 = 0.0f;      // the optimizer's state: one number per row
  std::int32_t prev_iter = 0;  // step of the last touch, 0: never

  // After n steps without a touch a row has shrunk by 2^-(n / 30)^2.
  const double alpha = 2.0 * 0.6931471805599453 / (30.0 * 30.0);
  const coldrow::CumulativeLinear decay{alpha};

  double w = 1.0, v = 0.0;  // the first element and its second moment, by the formula
  for (const std::int32_t step : {1, 2, 50}) {
    double shrink = 1.0;
    for (int j = 1; prev_iter != 0 && j < step - prev_iter; ++j) shrink *= 1.0 - alpha * j;
    v = 0.99 * v + 0.01 * 0.25;
    w = shrink * w - 0.01 / (std::sqrt(v) + 1e-8) * 0.5;

    // [update]
    using Update = coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop,
                                      coldrow::CumulativeLinear, coldrow::Nearest>;
    const auto update = Update::at(step, /*lr=*/0.01, {.ema_beta = 0.99f}, decay);
    const bool finite = update(coldrow::Serial{}, {weight, &prev_iter, {&momentum1}, {}}, grad,
                               kDim, coldrow::ElementKey{});
    // [/update]
    if (!finite) return 1;  // the gradient was not finite: the row was left as it was
    std::printf("step %2d: shrink %.4f, weight %.4f %.4f %.4f %.4f\n", step, shrink, weight[0],
                weight[1], weight[2], weight[3]);
  }
  return std::fabs(weight[0] - w) < 1e-6 && prev_iter == 50 ? 0 : 1;
}
