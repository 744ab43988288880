// Optimizer policies: from the summed gradient of a row to what is subtracted from its weights.
//
// An optimizer is a small struct that declares its state and has two functions:
//     static constexpr int scalar_states;   // float32 values per row (momentum1, ...)
//     static constexpr int vector_states;   // float32 arrays of D per row
//     auto row(float* scalars, float mean_square, float lr, std::int32_t step) const;
//         once per row: advances the scalar states in place and returns what element() needs, an
//         object with `bool finite() const`.
//     float element(const auto& row, float g, float* vectors) const;
//         per element: advances vectors[0 .. vector_states) in place, returns the amount
//         subtracted.
// mean_square is mean_d(g^2). The clock (prev_iter) is kept by the row update, not by the
// optimizer.
#pragma once

#include "../numeric/math.hpp"

COLDROW_BEGIN

template <class O>
concept OptimizerPolicy = std::is_trivially_copyable_v<O> &&
                          requires(const O o, float* state, float x, std::int32_t step) {
                            { O::scalar_states } -> std::convertible_to<int>;
                            { O::vector_states } -> std::convertible_to<int>;
                            { o.row(state, x, x, step).finite() } -> std::same_as<bool>;
                            {
                              o.element(o.row(state, x, x, step), x, state)
                            } -> std::same_as<float>;
                          };

// One multiplier for the whole row.
struct RowMultiplier {
  float multiplier;
  COLDROW_HD bool finite() const { return is_finite(multiplier); }
};

// Row-wise RMSprop: one second moment per row.
//     v = beta*v + (1-beta)*mean(g^2);   w -= lr/(sqrt(v)+eps) * g
// Source: FBGEMM's ROWWISE_RMSPROP_AR (its order of roundings, so that results agree).
struct RowwiseRMSprop {
  float eps = 1e-8f;
  float ema_beta = 0.99f;

  static constexpr int scalar_states = 1;  // momentum1
  static constexpr int vector_states = 0;

  COLDROW_HD RowMultiplier row(float* scalars, float mean_square, float lr, std::int32_t) const {
    scalars[0] = math::fma(ema_beta, scalars[0], (1.0f - ema_beta) * mean_square);
    return {lr / (math::sqrt(scalars[0]) + eps)};
  }
  COLDROW_HD float element(const RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};

COLDROW_END
