// One type for every built-in decay, and for those compiled at run time, chosen when it runs: what
// the Python module is compiled with, so that decays do not multiply the number of kernels. One
// predictable branch per row; the formulas are the policies' own.
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
  external,
};

// A decay of which only functions are known: one compiled at run time.
struct ExternalDecay {
  static constexpr int capacity = 64;  // bytes of the prepared policy

  void (*prepare)(const void* policy, std::int32_t step, double lr, std::int32_t epoch_start,
                  void* prepared) = nullptr;
  void (*factors)(const void* prepared, const std::int32_t* gap, int count, float lr,
                  float* out) = nullptr;
  float (*first_touch)(const void* prepared, float lr) = nullptr;

  template <DecayPolicy Decay>
  static constexpr ExternalDecay of() {
    using AtStep = Prepared<Decay>;
    static_assert(sizeof(AtStep) <= capacity && alignof(AtStep) <= alignof(double),
                  "a decay evaluated at run time has at most 64 bytes of fields once prepared");
    ExternalDecay functions;
    functions.prepare = [](const void* policy, std::int32_t step, double lr,
                           std::int32_t epoch_start, void* prepared) {
      const AtStep at_step =
          coldrow::prepare(*static_cast<const Decay*>(policy), step, lr, epoch_start);
      __builtin_memcpy(prepared, &at_step, sizeof at_step);
    };
    functions.factors = [](const void* prepared, const std::int32_t* gap, int count, float lr,
                           float* out) {
      const AtStep at_step = *static_cast<const AtStep*>(prepared);
      COLDROW_LANES
      for (int i = 0; i < count; ++i) out[i] = at_step(gap[i], lr);
    };
    functions.first_touch = [](const void* prepared, float lr) {
      return coldrow::first_touch(*static_cast<const AtStep*>(prepared), lr);
    };
    return functions;
  }
};

// One of those as it is evaluated at one step; on the host, where its functions are.
struct ExternalAtStep {
  const ExternalDecay* functions;
  const void* prepared;

  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    float out;
    factors(&gap, 1, lr, &out);
    return out;
  }
  COLDROW_HD void factors(const std::int32_t* gap, int count, float lr, float* out) const {
    functions->factors(prepared, gap, count, lr, out);
  }
  COLDROW_HD float first_touch(float lr) const { return functions->first_touch(prepared, lr); }
};

struct AnyDecay {
  DecayKind kind = DecayKind::none;
  bool epoch_gated = false;
  LinearClipped linear_clipped{};
  CumulativeLinear cumulative_linear{};
  Exponential exponential{};
  Constant constant{};
  const ExternalDecay* external = nullptr;
  const void* external_policy = nullptr;

  struct AtStep {
    DecayKind kind;
    bool epoch_gated;
    EpochGate gate;
    LinearClipped linear_clipped;
    CumulativeLinear cumulative_linear;
    ExponentialAtStep exponential;
    Constant constant;
    const ExternalDecay* external;
    alignas(double) unsigned char prepared[ExternalDecay::capacity];

    COLDROW_HD float operator()(std::int32_t gap, float lr) const {
      return epoch_gated && !gate.open(gap) ? 1.0f : ungated(gap, lr);
    }
    COLDROW_HD float first_touch(float lr) const {
      if (epoch_gated || kind == DecayKind::epoch_reset) return 1.0f;
#if !defined(__CUDA_ARCH__)
      if (kind == DecayKind::external) return ExternalAtStep{external, prepared}.first_touch(lr);
#endif
      return ungated(1, lr);
    }

    // Calls f with the decay itself: what a loop over many rows uses, to decide once and not per row.
    template <class F>
    void visit(const F& f) const {
      const auto call = [&](const auto& decay) {
        epoch_gated ? f(EpochGated<std::remove_cvref_t<decltype(decay)>>{decay, gate}) : f(decay);
      };
      switch (kind) {
        case DecayKind::linear_clipped:
          return call(linear_clipped);
        case DecayKind::cumulative_linear:
          return cumulative_linear.visit(call);
        case DecayKind::exponential:
          return call(exponential);
        case DecayKind::constant:
          return call(constant);
        case DecayKind::epoch_reset:
          return f(EpochReset{gate});
        case DecayKind::external:
          return call(ExternalAtStep{external, prepared});
        case DecayKind::none:
          return f(NoDecay{});
      }
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
        case DecayKind::external:
#if defined(__CUDA_ARCH__)
          return bit_cast<float>(0x7fc00000u);  // NaN: a host function, no row is touched by it
#else
          return ExternalAtStep{external, prepared}(gap, lr);
#endif
        case DecayKind::none:
          break;
      }
      return 1.0f;
    }
  };

  COLDROW_HD AtStep prepare(std::int32_t step, double lr, std::int32_t epoch_start) const {
    AtStep out{kind,           epoch_gated,       EpochGate::at(step, epoch_start),
               linear_clipped, cumulative_linear, exponential.prepare(step, lr, epoch_start),
               constant,       external,          {}};
#if !defined(__CUDA_ARCH__)
    if (kind == DecayKind::external) {
      external->prepare(external_policy, step, lr, epoch_start, out.prepared);
    }
#endif
    return out;
  }
  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    return prepare(0, lr, 0)(gap, lr);
  }
};

COLDROW_END
