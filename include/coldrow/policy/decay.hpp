// Decay policies: the factor by which a row has shrunk after `gap` steps.
//
// A decay is a small struct with
//     float operator()(std::int32_t gap, float lr) const;      // in [0, 1]
// where gap = t - prev_iter counts optimizer steps since the row's last touch. (It may be called for rows
// whose factor is then not used, with any gap from 0 on: so that loops over rows become vectors.) Two
// members are optional:
//     auto prepare(std::int32_t step, double lr, std::int32_t epoch_start) const;
//         turns the policy into what is evaluated at `step` (an object that is a decay itself);
//         run once per step and table, so that costly or global quantities stay out of the row
//         loop.
//     float first_touch(float lr) const;
//         the factor for a row never touched before; without it, (*this)(1, lr).
//
// One that is built in stands in the list at the end of this file, and has two members more by which it
// is known at run time (policy/builtin.hpp):
//     static constexpr const char* name;
//     template <class Self, class F> static constexpr void fields(Self& self, const F& f);
//         calls f(field's name, self.field) for each parameter.
//
// A read before step t evaluates the policy prepared as of step t-1 with gap t-1 - prev_iter: what
// a dense optimizer would have charged by the end of step t-1.
#pragma once

#include "../numeric/math.hpp"
#include "../numeric/type_list.hpp"

COLDROW_BEGIN

// (In min_of and max_of below the computed value comes first: so a NaN stays one, and its row is
// skipped as not finite instead of wiped.)

// (Compilers quote the line that is not satisfied, its comment included.)
template <class D>
concept DecayPolicy =
    std::is_trivially_copyable_v<D> &&  // needed: plain fields, no container or virtual function
    requires(const D d, std::int32_t gap, float lr) {
      { d(gap, lr) } -> std::same_as<float>;  // needed: float operator()(std::int32_t, float) const
    } &&
    // An optional member with other arguments would not be called, and nobody would say so.
    (!requires { &D::prepare; } ||
     requires(const D d) {
       d.prepare(0, 0.0, 0);  // needed: auto prepare(std::int32_t, double, std::int32_t) const
     }) &&
    (!requires { &D::first_touch; } ||
     requires(const D d, float lr) {
       { d.first_touch(lr) } -> std::same_as<float>;  // needed: float first_touch(float) const
     });

// The policy as it is evaluated at one step.
template <DecayPolicy D>
COLDROW_HD auto prepare(const D& decay, [[maybe_unused]] std::int32_t step,
                        [[maybe_unused]] double lr, [[maybe_unused]] std::int32_t epoch_start) {
  if constexpr (requires { decay.prepare(step, lr, epoch_start); }) {
    return decay.prepare(step, lr, epoch_start);
  } else {
    return decay;
  }
}
template <DecayPolicy D>
using Prepared = decltype(prepare(std::declval<const D&>(), 0, 0.0, 0));

template <DecayPolicy D>
COLDROW_HD float first_touch(const D& decay, float lr) {
  if constexpr (requires { decay.first_touch(lr); }) {
    return decay.first_touch(lr);
  } else {
    return decay(1, lr);
  }
}

// The factors of K gaps, none of them below 0: a loop that can become vectors, or, where a decay is known
// by a function alone, one call of that.
template <int K, DecayPolicy D>
COLDROW_HD void factors(const D& decay, const std::int32_t (&gap)[K], float lr, float (&out)[K]) {
  if constexpr (requires { decay.factors(gap, K, lr, out); }) {
    decay.factors(gap, K, lr, out);
  } else {
    const D own = decay;  // which no write to out can change
    COLDROW_LANES
    for (int i = 0; i < K; ++i) out[i] = own(gap[i], lr);
  }
}

// Calls f with the decay itself where `decay` is one that stands for others (AnyDecay, CumulativeLinear): what
// a loop over many rows uses, to decide once and not per row.
template <class D, class F>
COLDROW_HOST_INLINE void visit(const D& decay, const F& f) {
  if constexpr (requires { decay.visit(f); }) {
    decay.visit(f);
  } else {
    f(decay);
  }
}

// No decay: the plain optimizer.
struct NoDecay {
  static constexpr const char* name = "none";
  template <class Self, class F>
  static constexpr void fields(Self&, const F&) {}

  COLDROW_HD float operator()(std::int32_t, float) const { return 1.0f; }
};

// max(min_shrinkage, 1 - clip(lr*alpha*gap, 0, 1)).
// Adaptive Regularization as FBGEMM's ROWWISE_RMSPROP_AR has it, rounded as there: lr*alpha in
// float32, times the gap in float64.
struct LinearClipped {
  float alpha = 0.0f;
  float min_shrinkage = 0.1f;

  static constexpr const char* name = "linear_clipped";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("alpha", self.alpha);
    f("min_shrinkage", self.min_shrinkage);
  }

  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    const float rate = lr * alpha;
    const float charge = static_cast<float>(static_cast<double>(rate) * static_cast<double>(gap));
    const float factor = max_of(1.0f - max_of(min_of(charge, 1.0f), 0.0f), min_shrinkage);
    return gap > 0 ? factor : 1.0f;  // (last, so that a loop over rows becomes vectors)
  }
};

// prod_{j=1}^{gap-1} (1 - min(1, alpha*j)), about 2^-(gap/h)^2 with alpha = 2 ln 2 / h^2.
// Source: the decay of Li & Lyu, "Adaptive Regularization" (ICLR 2026), run densely (each untouched
// step j multiplies by 1 - alpha*j), here evaluated when the row is touched.
//
// The product is 0 in float32 beyond about sqrt(175/alpha) steps, so all its values fit in a small
// table. Whoever runs the policy owns the table: make table_size(alpha) floats, fill_table() them,
// and keep them as long as the policy is used (on a device: a copy in device memory). Without a
// table the policy is right but multiplies step by step. Below alpha = 1e-8 there is no table: the
// logarithm of the product is a short series.
struct CumulativeLinear {
  // The factors from a table: table[n] = prod_{j=1}^{n} (1 - min(1, alpha*j)), n < size. The first is 1,
  // the last 0.
  struct ByTable {
    const float* table = nullptr;
    std::int32_t size = 0;
    COLDROW_HD float operator()(std::int32_t gap, float) const {
      return table[min_of(max_of(gap, 1), size) - 1];
    }
  };

  double alpha = 0.0;
  const float* table = nullptr;
  std::int32_t size = 0;

  static constexpr const char* name = "cumulative_linear";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("alpha", self.alpha);
  }

  static constexpr double kSeriesBelow = 1e-8;

  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    if (table != nullptr) return by_table()(gap, lr);
    const std::int32_t n = max_of(gap, 1) - 1;
    return alpha < kSeriesBelow ? series(n) : product(n);
  }

  COLDROW_HD ByTable by_table() const { return {table, size}; }

  // Calls f with what the rows evaluate, decided once for all of them.
  template <class F>
  void visit(const F& f) const {
    table != nullptr ? f(by_table()) : f(*this);
  }

  // Entries that are not 0 in float32, and one that is. 0 where no table is used.
  static std::int32_t table_size(double alpha) {
    if (alpha < kSeriesBelow) return 0;
    std::int32_t n = 0;
    for (double p = 1.0; p >= kSmallestNormal; p *= step_factor(alpha, n)) ++n;
    return n + 1;
  }
  static void fill_table(double alpha, float* out) {
    const std::int32_t size = table_size(alpha);
    double p = 1.0;
    for (std::int32_t n = 0; n < size; ++n) {
      p *= n == 0 ? 1.0 : step_factor(alpha, n);
      out[n] = p < kSmallestNormal ? 0.0f : static_cast<float>(p);
    }
  }

 private:
  static COLDROW_HD double step_factor(double alpha, std::int32_t j) {
    return 1.0 - min_of(alpha * j, 1.0);
  }
  COLDROW_HD float product(std::int32_t n) const {
    double p = 1.0;
    for (std::int32_t j = 1; j <= n && p >= kSmallestNormal; ++j) p *= step_factor(alpha, j);
    return p < kSmallestNormal ? 0.0f : static_cast<float>(p);
  }
  // ln prod = -sum_k alpha^k/k * (1^k + ... + n^k); the fourth term is below 3e-8 wherever the
  // result is not 0.
  COLDROW_HD float series(std::int32_t n) const {
    const double m = n;
    const double s1 = m * (m + 1.0) / 2.0;
    const double s2 = s1 * (2.0 * m + 1.0) / 3.0;
    const double s3 = s1 * s1;
    const double t1 = alpha * s1;
    if (t1 > 90.0) return 0.0f;  // e^-90 is below the smallest normal float32
    const double ln = t1 + alpha * alpha * s2 / 2.0 + alpha * alpha * alpha * s3 / 3.0;
    return static_cast<float>(exp2_fixed(-ln * 1.4426950408889634));
  }
};

// 2^(log2_base * gap): Exponential as evaluated at one step.
struct ExponentialAtStep {
  double log2_base = 0.0;
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    return gap <= 0 ? 1.0f : static_cast<float>(exp2_fixed(log2_base * gap));
  }
};

// max(0, 1 - lr*weight_decay)^gap, or 2^-(gap/half_life) where half_life > 0.
// The first form is decoupled (AdamW) weight decay evaluated lazily; it charges the whole gap at
// the lr of the step that pays, so it is exact while lr is constant. The base is kept as a
// logarithm in double: in float32 a charge of 1e-8 per step would round to no decay at all.
struct Exponential {
  double weight_decay = 0.0;
  double half_life = 0.0;

  static constexpr const char* name = "exponential";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("weight_decay", self.weight_decay);
    f("half_life", self.half_life);
  }

  COLDROW_HD ExponentialAtStep prepare(std::int32_t, double lr, std::int32_t) const {
    if (half_life > 0.0) return {-1.0 / half_life};
    const double charge = lr * weight_decay;
    return {charge >= 1.0 ? -1e300 : math::log1p(-charge) * 1.4426950408889634};
  }
  // For a caller without a prepare step; drivers evaluate the prepared form.
  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    return prepare(0, lr, 0)(gap, lr);
  }
};

// max(0, 1 - lr*weight_decay) whatever the gap: decoupled weight decay on touched rows only.
struct Constant {
  float weight_decay = 0.0f;

  static constexpr const char* name = "constant";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("weight_decay", self.weight_decay);
  }

  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    return gap <= 0 ? 1.0f : max_of(1.0f - lr * weight_decay, 0.0f);
  }
};

// The gate of the epoch-aware policies: open for a row whose last touch, step - gap, came before
// epoch_start (0: no epoch was ever declared, the gate stays shut).
struct EpochGate {
  std::int32_t open_above = INT32_MAX;
  COLDROW_HD bool open(std::int32_t gap) const { return gap > open_above; }
  static COLDROW_HD EpochGate at(std::int32_t step, std::int32_t epoch_start) {
    return {epoch_start > 0 ? step - epoch_start : INT32_MAX};
  }
};

// `decay` for rows whose last touch came before the running epoch, else 1. A row never touched has
// nothing to fade.
template <DecayPolicy Decay>
struct EpochGated {
  Decay decay{};
  EpochGate gate{};

  COLDROW_HD EpochGated<Prepared<Decay>> prepare(std::int32_t step, double lr,
                                                 std::int32_t epoch_start) const {
    return {coldrow::prepare(decay, step, lr, epoch_start), EpochGate::at(step, epoch_start)};
  }
  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    return gate.open(gap) ? decay(gap, lr) : 1.0f;
  }
  COLDROW_HD float first_touch(float) const { return 1.0f; }
};

// 0 for rows whose last touch came before the running epoch, else 1: tables re-initialised at each
// epoch, paid for row by row. Meant for tables whose initial value is zero.
// Source of the idea: multi-epoch training with re-initialised embeddings (MEDA).
struct EpochReset {
  EpochGate gate{};

  static constexpr const char* name = "epoch_reset";
  template <class Self, class F>
  static constexpr void fields(Self&, const F&) {}

  COLDROW_HD EpochReset prepare(std::int32_t step, double, std::int32_t epoch_start) const {
    return {EpochGate::at(step, epoch_start)};
  }
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    return gate.open(gap) ? 0.0f : 1.0f;
  }
  COLDROW_HD float first_touch(float) const { return 1.0f; }
};

// The built-in decays: those that the Python module knows. The first is AnyDecay's default.
using BuiltinDecays =
    TypeList<NoDecay, LinearClipped, CumulativeLinear, Exponential, Constant, EpochReset>;

COLDROW_END
