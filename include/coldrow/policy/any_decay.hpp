// One type for every built-in decay, and for those compiled at run time, chosen when it runs: what
// the Python module is compiled with, so that decays do not multiply the number of kernels. One
// predictable branch per row; the formulas are the policies' own. Which decays there are is said by the
// list BuiltinDecays.
#pragma once

#include "decay.hpp"

COLDROW_BEGIN

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

// The list of what the built-in decays are once prepared, in the same order.
template <class Decays>
struct PreparedList;
template <class... D>
struct PreparedList<TypeList<D...>> {
  using type = TypeList<Prepared<D>...>;
};
using PreparedDecays = PreparedList<BuiltinDecays>::type;

struct AnyDecay {
  static constexpr std::int32_t kExternal = -1;

  std::int32_t number = 0;  // in BuiltinDecays, or kExternal
  bool epoch_gated = false;
  alignas(double) unsigned char policy[BuiltinDecays::bytes] = {};  // the built-in decay
  const ExternalDecay* external = nullptr;                          // or functions, and
  const void* external_policy = nullptr;                            // what they are called with

  COLDROW_HD AnyDecay() {}
  // A built-in decay.
  template <DecayPolicy D>
    requires(BuiltinDecays::has<D>)
  COLDROW_HD AnyDecay(const D& decay, bool gated = false)  // (implicit: it is one of them)
      : number(BuiltinDecays::number<D>), epoch_gated(gated) {
    static_assert(alignof(D) <= alignof(double));
    __builtin_memcpy(policy, &decay, sizeof decay);
  }
  // Any other, which must outlive this.
  static AnyDecay of(const ExternalDecay* functions, const void* decay, bool gated = false) {
    AnyDecay any;
    any.number = kExternal;
    any.epoch_gated = gated;
    any.external = functions;
    any.external_policy = decay;
    return any;
  }

  struct AtStep {
    std::int32_t number;
    bool epoch_gated;
    EpochGate gate;
    const ExternalDecay* external;
    alignas(double) unsigned char prepared[max_of<std::size_t>(ExternalDecay::capacity,
                                                               PreparedDecays::bytes)];

    COLDROW_HD float operator()(std::int32_t gap, float lr) const {
      return epoch_gated && !gate.open(gap) ? 1.0f : ungated(gap, lr);
    }
    COLDROW_HD float first_touch(float lr) const {
      if (epoch_gated) return 1.0f;
      if (number == kExternal) {
#if defined(__CUDA_ARCH__)
        return not_here();
#else
        return ExternalAtStep{external, prepared}.first_touch(lr);
#endif
      }
      return first_touch_from<0>(lr);
    }

    // Calls f with the decay itself: what a loop over many rows uses, to decide once and not per row.
    template <class F>
    void visit(const F& f) const {
      const auto call = [&](const auto& decay) {
        epoch_gated ? f(EpochGated<std::remove_cvref_t<decltype(decay)>>{decay, gate}) : f(decay);
      };
      if (number == kExternal) return call(ExternalAtStep{external, prepared});
      with_type_at<PreparedDecays>(
          number, [&](auto one) { coldrow::visit(as<typename decltype(one)::type>(), call); });
    }

   private:
    template <class D>
    COLDROW_HD const D& as() const {
      return *reinterpret_cast<const D*>(prepared);
    }
    COLDROW_HD float ungated(std::int32_t gap, float lr) const {
      if (number == kExternal) {
#if defined(__CUDA_ARCH__)
        return not_here();
#else
        return ExternalAtStep{external, prepared}(gap, lr);
#endif
      }
      return factor_from<0>(gap, lr);
    }
    template <int From>
    COLDROW_HD float factor_from(std::int32_t gap, float lr) const {
      if constexpr (From + 1 < PreparedDecays::size) {
        if (number != From) return factor_from<From + 1>(gap, lr);
      }
      return as<PreparedDecays::At<From>>()(gap, lr);
    }
    template <int From>
    COLDROW_HD float first_touch_from(float lr) const {
      if constexpr (From + 1 < PreparedDecays::size) {
        if (number != From) return first_touch_from<From + 1>(lr);
      }
      return coldrow::first_touch(as<PreparedDecays::At<From>>(), lr);
    }
#if defined(__CUDA_ARCH__)
    // NaN: a host function, no row is touched by it.
    static COLDROW_HD float not_here() { return bit_cast<float>(0x7fc00000u); }
#endif
  };

  COLDROW_HD AtStep prepare(std::int32_t step, double lr, std::int32_t epoch_start) const {
    AtStep out{number, epoch_gated, EpochGate::at(step, epoch_start), external, {}};
    if (number != kExternal) {
      prepare_from<0>(step, lr, epoch_start, out);
    } else {
#if !defined(__CUDA_ARCH__)
      external->prepare(external_policy, step, lr, epoch_start, out.prepared);
#endif
    }
    return out;
  }
  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    return prepare(0, lr, 0)(gap, lr);
  }

 private:
  template <int From>
  COLDROW_HD void prepare_from(std::int32_t step, double lr, std::int32_t epoch_start,
                               AtStep& out) const {
    if constexpr (From + 1 < BuiltinDecays::size) {
      if (number != From) return prepare_from<From + 1>(step, lr, epoch_start, out);
    }
    const auto& decay = *reinterpret_cast<const BuiltinDecays::At<From>*>(policy);
    const auto at_step = coldrow::prepare(decay, step, lr, epoch_start);
    static_assert(alignof(decltype(at_step)) <= alignof(double));
    __builtin_memcpy(out.prepared, &at_step, sizeof at_step);
  }
};

COLDROW_END
