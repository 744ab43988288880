// A decay of this project's own: nothing for the first `warm_up` steps, then half every `half_life`.
#pragma once

#include <coldrow/numeric/math.hpp>

struct WarmHalfLife {
  float half_life = 10.0f;
  std::int32_t warm_up = 3;

  COLDROW_HD float operator()(std::int32_t gap, float) const {
    if (gap <= warm_up) return 1.0f;
    return static_cast<float>(coldrow::exp2_fixed((warm_up - gap) / double{half_life}));
  }
};
