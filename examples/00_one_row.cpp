// One row of a table, touched at steps 1, 2 and 50 by the same gradient.
//
//   g++ -std=c++20 -O2 -ffp-contract=off -Iinclude examples/00_one_row.cpp && ./a.out
#include <coldrow/row/update.hpp>
#include <cstdio>

int main() {
  constexpr int kDim = 4;
  float weight[kDim] = {1.0f, 1.0f, 1.0f, 1.0f};
  const float grad[kDim] = {0.5f, -0.5f, 0.5f, -0.5f};
  float momentum1 = 0.0f;      // the optimizer's state: one number per row
  std::int32_t prev_iter = 0;  // step of the last touch, 0: never

  // After n steps without a touch a row has shrunk by 2^-(n / 30)^2.
  const double half_life = 30.0;
  const coldrow::CumulativeLinear decay{2.0 * 0.6931471805599453 / (half_life * half_life)};

  using Update = coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop,
                                    coldrow::CumulativeLinear, coldrow::Nearest>;
  for (const std::int32_t step : {1, 2, 50}) {
    const auto update = Update::at(step, /*lr=*/0.01, coldrow::RowwiseRMSprop{}, decay);
    const float shrink = coldrow::touch_factor(update.decay, step, prev_iter, update.lr);
    const coldrow::Row<float, coldrow::RowwiseRMSprop> row{weight, &prev_iter, {&momentum1}, {}};
    const bool finite = update(coldrow::Serial{}, row, grad, kDim, coldrow::ElementKey{});
    if (!finite) return 1;  // the gradient was not finite: the row was left as it was
    std::printf("step %2d: shrink %.4f, weight %.4f %.4f %.4f %.4f\n", step, shrink, weight[0],
                weight[1], weight[2], weight[3]);
  }
  return 0;
}
