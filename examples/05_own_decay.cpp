// A decay of your own (half_life_warmup.hpp), tested against a loop that decays in every step.
#include <cmath>
#include <coldrow/row/update.hpp>
#include <cstdio>

#include "half_life_warmup.hpp"

static_assert(coldrow::DecayPolicy<HalfLifeWarmup>);

int main() {
  const HalfLifeWarmup decay{.half_life = 8.0f, .warmup = 5.0f};
  for (const int gap : {0, 5, 6, 13, 21}) {
    std::printf("gap %2d: factor %.4f\n", gap, decay(gap, 0.0f));
  }

  // A row of three numbers is pulled towards 1 whenever it is touched.
  using Update = coldrow::RowUpdate<float, float, coldrow::SGD, HalfLifeWarmup, coldrow::Nearest>;
  constexpr float kLr = 0.5f;
  float weight[3] = {0.5f, 0.0f, -2.0f}, grad[3];
  std::int32_t prev_iter = 0;  // step of the last touch, 0: never
  double dense[3] = {0.5, 0.0, -2.0}, worst = 0.0;
  int untouched = 0;

  for (std::int32_t step = 1; step <= 100; ++step) {
    const bool touched = step == 3 || step == 4 || step == 9 || step % 20 == 0;

    // Lazily: whoever reads the row multiplies it by what is owed, and a touch settles it.
    const float owed = coldrow::read_factor(decay, step, prev_iter, kLr);
    for (int d = 0; d < 3; ++d) {
      grad[d] = owed * weight[d] - 1.0f;
      worst = std::fmax(worst, std::fabs(owed * weight[d] - dense[d]));
    }
    const bool known = prev_iter != 0;  // decay begins with the first touch
    if (touched) {
      const auto update = Update::at(step, kLr, {}, decay);
      update(coldrow::Serial{}, {weight, &prev_iter, {}, {}}, grad, 3, {});
    }

    // Densely: one step of decay in every step.
    untouched = known ? untouched + 1 : 0;
    const double fade = untouched > 5 ? std::exp2(-1.0 / 8.0) : 1.0;
    for (double& w : dense) w = fade * w - (touched ? kLr * (w - 1.0) : 0.0);
    if (touched) untouched = 0;
  }
  std::printf("lazy and dense differ by at most %.1e\n", worst);
  return worst < 1e-6 && decay(13, 0.0f) == 0.5f ? 0 : 1;
}
