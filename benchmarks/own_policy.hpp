// The benchmark's own policies, compiled at run time (coldrow.jit): formulas that coldrow does not have,
// so that what is measured is not a special case of it.
#pragma once

#include <coldrow/policy/decay.hpp>
#include <coldrow/policy/optimizer.hpp>

// A row keeps its values for `warmup` steps after a touch and then fades like 1 / (1 + steps / scale).
struct Hyperbola {
  float warmup;
  float scale;

  COLDROW_HD float operator()(std::int32_t gap, float) const {
    const float fading = static_cast<float>(gap) - warmup;
    return fading <= 0.0f ? 1.0f : scale / (scale + fading);
  }
};

// Row-wise, scaled by the largest mean square seen of a row, which is slowly forgotten.
//     v = max(beta*v, mean(g^2));   w -= lr/(sqrt(v)+eps) * g
struct RowwiseMax {
  float eps;
  float beta;

  static constexpr int scalar_states = 1;
  static constexpr int vector_states = 0;
  static constexpr bool elements_finite = true;

  COLDROW_HD coldrow::RowMultiplier row(float* scalars, float mean_square, float lr,
                                        std::int32_t) const {
    scalars[0] = coldrow::max_of(beta * scalars[0], mean_square);
    return {lr / (coldrow::math::sqrt(scalars[0]) + eps)};
  }
  COLDROW_HD float element(const coldrow::RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};
