"""Sources of policies, and what the tests of coldrow.jit share."""

from __future__ import annotations

import numpy as np
import torch

import coldrow

HALF_LIFE = """\
struct HalfLife {
  float half_life;
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    return static_cast<float>(coldrow::exp2_fixed(-1.0 / half_life * gap));
  }
};
"""
# RowwiseRMSprop, once more.
RMSPROP = """\
struct Copy {
  float eps;
  float ema_beta;
  static constexpr int scalar_states = 1;
  static constexpr int vector_states = 0;
  static constexpr const char* state_name(int) { return "square"; }
  COLDROW_HD coldrow::RowMultiplier row(float* s, float mean_square, float lr, std::int32_t) const {
    s[0] = coldrow::math::fma(ema_beta, s[0], (1.0f - ema_beta) * mean_square);
    return {lr / (coldrow::math::sqrt(s[0]) + eps)};
  }
  COLDROW_HD float element(const coldrow::RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};
"""
# Adagrad, once more: element-wise state, with the default names.
ADAGRAD = """\
struct Copy {
  float eps = 1e-10f;
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 1;
  COLDROW_HD coldrow::RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  COLDROW_HD float element(const coldrow::RowMultiplier& row, float g, float* v) const {
    v[0] = coldrow::math::fma(g, g, v[0]);
    return row.multiplier * (g / (coldrow::math::sqrt(v[0]) + eps));
  }
};
"""


def train(update, *, dtype="float32", steps=30, dim=33):
    """Some steps on one table: weight bits and state."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((20, dim)).astype(np.float32))
    weight = weight.to(getattr(torch, dtype))
    state = coldrow.init_state(update, 20, dim, weight)
    for step in range(1, steps + 1):
        grad = torch.from_numpy(rng.standard_normal((6, dim)).astype(np.float32))
        coldrow.apply_(
            update,
            weight,
            grad,
            torch.from_numpy(rng.integers(0, 20, 6)),
            state,
            step=step,
            epoch_start=15 if step >= 15 else 0,
        )
    return [weight, *(state[n] for n in update.state_names)]


def same_bits(a, b):
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )
