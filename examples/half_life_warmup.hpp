// A decay of your own: rows keep their values for `warmup` steps after a touch, then halve every
// `half_life` steps.
#pragma once

#include <coldrow/policy/decay.hpp>

struct HalfLifeWarmup {
  float half_life;
  float warmup;

  // gap: steps since the row was last touched. lr, the learning rate, plays no part here.
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    const double fading = static_cast<double>(gap) - warmup;
    return fading <= 0.0 ? 1.0f : static_cast<float>(coldrow::exp2_fixed(-fading / half_life));
  }
};
