// One type for every built-in decay, chosen at run time: what the Python module is compiled with,
// so that decays do not multiply the number of kernels. One predictable branch per row; the
// formulas are the policies' own.
#pragma once

#include "decay.hpp"

COLDROW_BEGIN

enum class DecayKind : std::int32_t {
  none,
  linear_clipped,
  cumulative_linear,
  exponential,
  constant,
  epoch_reset,
};

struct AnyDecay {
  DecayKind kind = DecayKind::none;
  bool epoch_gated = false;
  LinearClipped linear_clipped{};
  CumulativeLinear cumulative_linear{};
  Exponential exponential{};
  Constant constant{};

  struct AtStep {
    DecayKind kind;
    bool epoch_gated;
    EpochGate gate;
    LinearClipped linear_clipped;
    CumulativeLinear cumulative_linear;
    ExponentialAtStep exponential;
    Constant constant;

    COLDROW_HD float operator()(std::int32_t gap, float lr) const {
      return epoch_gated && !gate.open(gap) ? 1.0f : ungated(gap, lr);
    }
    COLDROW_HD float first_touch(float lr) const {
      return epoch_gated || kind == DecayKind::epoch_reset ? 1.0f : ungated(1, lr);
    }

   private:
    COLDROW_HD float ungated(std::int32_t gap, float lr) const {
      switch (kind) {
        case DecayKind::linear_clipped:
          return linear_clipped(gap, lr);
        case DecayKind::cumulative_linear:
          return cumulative_linear(gap, lr);
        case DecayKind::exponential:
          return exponential(gap, lr);
        case DecayKind::constant:
          return constant(gap, lr);
        case DecayKind::epoch_reset:
          return EpochReset{gate}(gap, lr);
        case DecayKind::none:
          break;
      }
      return 1.0f;
    }
  };

  COLDROW_HD AtStep prepare(std::int32_t step, double lr, std::int32_t epoch_start) const {
    return {kind,           epoch_gated,       EpochGate::at(step, epoch_start),
            linear_clipped, cumulative_linear, exponential.prepare(step, lr, epoch_start),
            constant};
  }
  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    return prepare(0, lr, 0)(gap, lr);
  }
};

COLDROW_END
