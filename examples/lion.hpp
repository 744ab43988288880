// An optimizer of your own: Lion, which moves every weight by lr, in the direction in which an
// average of past gradients and the newest one agree.
//     w -= lr * sign(beta1*m + (1-beta1)*g);   m = beta2*m + (1-beta2)*g
// Its weight decay is decoupled: coldrow::Constant(weight_decay), or any other decay.
// Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (NeurIPS 2023).
#pragma once

#include <coldrow/policy/optimizer.hpp>

struct Lion {
  float beta1 = 0.9f;
  float beta2 = 0.99f;

  // State: nothing per row, one float per element.
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 1;
  static constexpr const char* state_name(int) { return "momentum1"; }
  static constexpr bool elements_finite = true;  // finite numbers in, finite numbers out

  // Once per row: what element() needs to know.
  COLDROW_HD coldrow::RowMultiplier row(float*, float, float lr, std::int32_t) const {
    return {lr};
  }
  // Once per element: advances the state, returns what is subtracted from the weight.
  COLDROW_HD float element(const coldrow::RowMultiplier& row, float g, float* state) const {
    const float direction = coldrow::math::fma(beta1, state[0], (1.0f - beta1) * g);
    state[0] = coldrow::math::fma(beta2, state[0], (1.0f - beta2) * g);
    return direction > 0.0f ? row.multiplier : direction < 0.0f ? -row.multiplier : 0.0f;
  }
};
