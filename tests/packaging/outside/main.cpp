// Prints a row before and after a gap of 13 steps, 3 of them warm-up and 10 one half-life, and the
// version of the headers.
#include <cstdio>

#include "train.hpp"

int main() {
  float weight[3] = {1.0f, -2.0f, 4.0f}, momentum1 = 0.0f;
  const float grad[3] = {0.0f, 0.0f, 0.0f};
  std::int32_t prev_iter = 0;
  const Update::RowType row{weight, &prev_iter, {&momentum1}, {}};
  for (const std::int32_t step : {1, 14}) {
    train(step, row, grad, 3);
    std::printf("%g %g %g\n", weight[0], weight[1], weight[2]);
  }
  std::printf("%d.%d.%d\n", COLDROW_VERSION_MAJOR, COLDROW_VERSION_MINOR, COLDROW_VERSION_PATCH);
}
