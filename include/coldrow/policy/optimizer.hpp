// Optimizer policies: from the summed gradient of a row to what is subtracted from its weights.
//
// An optimizer is a small struct that declares its state and has two functions:
//     static constexpr int scalar_states;   // float32 values per row
//     static constexpr int vector_states;   // float32 arrays of D per row ("element-wise" state)
//     auto row(float* scalars, float mean_square, float lr, std::int32_t step) const;
//         once per row: advances the scalar states in place and returns what element() needs, a
//         struct of plain fields with `bool finite() const`. Without branches it is run for many
//         rows at a time, in vectors.
//     float element(const auto& row, float g, float* vectors) const;
//         per element: advances vectors[0 .. vector_states) in place, returns the amount
//         subtracted.
// All state begins as zero. mean_square is mean_d(g^2). The clock (prev_iter) is kept by the row
// update, not by the optimizer. Three members are optional:
//     static constexpr const char* state_name(int i);   // scalar states, then vector states
//     auto prepare(std::int32_t step, double lr) const;
//         what is evaluated at `step`, with the same state; run once per step and table. row() and
//         element() may then be functions of what it returns alone.
//     static constexpr bool elements_finite = true;
//         element() is finite wherever row().finite() and its input are. Without it the row update
//         evaluates every element once more before it writes, and skips a row with one that is not.
//
// One that is built in stands in the list at the end of this file, and has a name and fields() as a
// built-in decay has (policy/decay.hpp).
#pragma once

#include "../numeric/math.hpp"
#include "../numeric/type_list.hpp"

COLDROW_BEGIN

// (Compilers quote the line that is not satisfied, its comment included.)
// clang-format off
template <class O>
concept EvaluatedOptimizer =
    std::is_trivially_copyable_v<O> &&  // needed: plain fields, no container or virtual function
    requires(const O o, float* state, float x, std::int32_t t) {
      { O::scalar_states } -> std::convertible_to<int>;  // needed: a static constexpr int
      { O::vector_states } -> std::convertible_to<int>;  // needed: a static constexpr int
      { o.row(state, x, x, t).finite() } -> std::same_as<bool>;  // needed: row().finite()
      decltype(o.row(state, x, x, t)){};  // needed: what row() returns, a struct of plain fields
      { o.element(o.row(state, x, x, t), x, state) } -> std::same_as<float>;  // needed: element()
    };
// clang-format on

// The policy as it is evaluated at one step.
template <class O>
COLDROW_HD auto prepare(const O& optimizer, std::int32_t step, double lr) {
  if constexpr (requires { optimizer.prepare(step, lr); }) {
    return optimizer.prepare(step, lr);
  } else {
    return optimizer;
  }
}
template <class O>
using PreparedOptimizer = decltype(prepare(std::declval<const O&>(), 0, 0.0));

// clang-format off: what is needed stands in the line that the compiler quotes
template <class O>
concept OptimizerPolicy =
    std::is_trivially_copyable_v<O> && EvaluatedOptimizer<PreparedOptimizer<O>> &&
    requires {
      requires O::scalar_states == PreparedOptimizer<O>::scalar_states;  // needed: prepare() keeps the state
      requires O::vector_states == PreparedOptimizer<O>::vector_states;  // needed: prepare() keeps the state
    } &&
    // An optional member with other arguments would not be called, and nobody would say so.
    (!requires { &O::prepare; } || requires(const O o) {
       o.prepare(0, 0.0);  // needed: auto prepare(std::int32_t, double) const
     }) &&
    (!requires { &O::state_name; } || requires {
       { O::state_name(0) } -> std::same_as<const char*>;  // needed: static constexpr const char* state_name(int)
     });
// clang-format on

template <class O>
inline constexpr bool kElementsFinite = requires { requires O::elements_finite; };

// Name of state i: scalar states first, then vector states.
template <OptimizerPolicy O>
constexpr const char* state_name(int i) {
  if constexpr (requires { O::state_name(i); }) {
    return O::state_name(i);
  } else {
    constexpr const char* names[] = {"state1", "state2", "state3", "state4"};
    static_assert(O::scalar_states + O::vector_states <= 4,
                  "an optimizer with more than four states must have state_name()");
    return names[i];
  }
}

// One multiplier for the whole row.
struct RowMultiplier {
  float multiplier;
  COLDROW_HD bool finite() const { return is_finite(multiplier); }
};

// Stochastic gradient descent, no state.
//     w -= lr * g
struct SGD {
  static constexpr const char* name = "sgd";
  template <class Self, class F>
  static constexpr void fields(Self&, const F&) {}

  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 0;
  static constexpr bool elements_finite = true;

  COLDROW_HD RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  COLDROW_HD float element(const RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};

// Row-wise RMSprop: one second moment per row.
//     v = beta*v + (1-beta)*mean(g^2);   w -= lr/(sqrt(v)+eps) * g
// Source: FBGEMM's ROWWISE_RMSPROP_AR (its order of roundings, so that results agree).
struct RowwiseRMSprop {
  float eps = 1e-8f;
  float ema_beta = 0.99f;

  static constexpr const char* name = "rowwise_rmsprop";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("eps", self.eps);
    f("ema_beta", self.ema_beta);
  }

  static constexpr int scalar_states = 1;
  static constexpr int vector_states = 0;
  static constexpr const char* state_name(int) { return "momentum1"; }
  static constexpr bool elements_finite = true;

  COLDROW_HD RowMultiplier row(float* scalars, float mean_square, float lr, std::int32_t) const {
    scalars[0] = math::fma(ema_beta, scalars[0], (1.0f - ema_beta) * mean_square);
    return {lr / (math::sqrt(scalars[0]) + eps)};
  }
  COLDROW_HD float element(const RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};

// Row-wise Adagrad: one sum of squares per row.
//     v += mean(g^2);   w -= lr/(sqrt(v)+eps) * g
// Source: FBGEMM's EXACT_ROWWISE_ADAGRAD.
struct RowwiseAdagrad {
  float eps = 1e-8f;

  static constexpr const char* name = "rowwise_adagrad";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("eps", self.eps);
  }

  static constexpr int scalar_states = 1;
  static constexpr int vector_states = 0;
  static constexpr const char* state_name(int) { return "momentum1"; }
  static constexpr bool elements_finite = true;

  COLDROW_HD RowMultiplier row(float* scalars, float mean_square, float lr, std::int32_t) const {
    scalars[0] += mean_square;
    return {lr / (math::sqrt(scalars[0]) + eps)};
  }
  COLDROW_HD float element(const RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};

// Adagrad: one sum of squares per element, which ends at the largest float32. eps > 0.
//     v += g^2;   w -= lr * g / (sqrt(v)+eps)
// Source: Duchi, Hazan & Singer (JMLR 2011), as torch.optim.Adagrad has it.
struct Adagrad {
  float eps = 1e-10f;

  static constexpr const char* name = "adagrad";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("eps", self.eps);
  }

  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 1;
  static constexpr const char* state_name(int) { return "momentum1"; }
  static constexpr bool elements_finite = true;

  COLDROW_HD RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  COLDROW_HD float element(const RowMultiplier& row, float g, float* vectors) const {
    vectors[0] = min_of(math::fma(g, g, vectors[0]), kLargestFloat);
    return row.multiplier * (g / (math::sqrt(vectors[0]) + eps));
  }
};

// What the bias corrections of Adam count: optimizer steps, or the row's own touches (a rarely
// touched row's moments are then corrected as if it had been trained alone). Touches are kept as one
// more state per row, a float32: exact up to 2^24, where the corrections have long become 1.
enum class BiasCorrection : std::int32_t { clock, row };

// What the two Adams below have in common at one step.
struct AdamStep {
  // The multipliers of a row after n steps.
  struct Corrected {
    float rate;         // lr / (1 - beta1^n)
    float square_rate;  // 1 / (1 - beta2^n)
    COLDROW_HD bool finite() const { return is_finite(rate) && is_finite(square_rate); }
  };

  float beta1, new1;  // new1 = 1 - beta1, computed in double: 1 - 0.999f is off by 1e-5
  float beta2, new2;
  float eps;
  double log2_beta1, log2_beta2;
  Corrected by_clock;

  COLDROW_HD AdamStep(double b1, double b2, double epsilon, std::int32_t step, double lr)
      : beta1(static_cast<float>(b1)),
        new1(static_cast<float>(1.0 - b1)),
        beta2(static_cast<float>(b2)),
        new2(static_cast<float>(1.0 - b2)),
        eps(static_cast<float>(epsilon)),
        log2_beta1(log2(b1)),
        log2_beta2(log2(b2)),
        by_clock(corrected(step, lr)) {}

  COLDROW_HD Corrected corrected(double n, double lr) const {
    return {static_cast<float>(lr / (1.0 - exp2_fixed(log2_beta1 * n))),
            static_cast<float>(1.0 / (1.0 - exp2_fixed(log2_beta2 * n)))};
  }
  template <BiasCorrection Bias>
  COLDROW_HD Corrected of_row([[maybe_unused]] float* touches, [[maybe_unused]] float lr) const {
    if constexpr (Bias == BiasCorrection::row) {
      *touches += 1.0f;
      return corrected(*touches, lr);
    } else {
      return by_clock;
    }
  }
  COLDROW_HD float first_moment(float m, float g) const { return math::fma(beta1, m, new1 * g); }
  COLDROW_HD float second_moment(float v, float square) const {
    return math::fma(beta2, v, new2 * square);
  }

 private:
  static COLDROW_HD double log2(double beta) {
    return beta <= 0.0 ? -1e300 : math::log1p(beta - 1.0) * 1.4426950408889634;
  }
};

// Adam: two moments per element, which age only when the row is touched. eps > 0; betas in [0, 1).
//     m = beta1*m + (1-beta1)*g;   v = beta2*v + (1-beta2)*g^2
//     w -= lr * (m / (1-beta1^n)) / (sqrt(v / (1-beta2^n)) + eps)
// n: the step, or with BiasCorrection::row the row's touches.
// Source: Kingma & Ba (ICLR 2015), algorithm 1, as torch.optim.Adam and FBGEMM's ADAM have it.
template <BiasCorrection Bias = BiasCorrection::clock>
struct Adam {
  double eps = 1e-8;
  double beta1 = 0.9;
  double beta2 = 0.999;

  static constexpr const char* name = Bias == BiasCorrection::row ? "adam_by_touches" : "adam";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("eps", self.eps);
    f("beta1", self.beta1);
    f("beta2", self.beta2);
  }

  static constexpr int scalar_states = Bias == BiasCorrection::row ? 1 : 0;
  static constexpr int vector_states = 2;
  static constexpr const char* state_name(int i) {
    constexpr const char* names[] = {"touches", "momentum1", "momentum2"};
    return names[i + 1 - scalar_states];
  }

  struct AtStep : AdamStep {
    using AdamStep::AdamStep;
    static constexpr int scalar_states = Adam::scalar_states;
    static constexpr int vector_states = Adam::vector_states;
    static constexpr bool elements_finite = true;

    COLDROW_HD Corrected row(float* scalars, float, float lr, std::int32_t) const {
      return of_row<Bias>(scalars, lr);
    }
    COLDROW_HD float element(const Corrected& row, float g, float* vectors) const {
      vectors[0] = first_moment(vectors[0], g);
      vectors[1] = second_moment(vectors[1], g * g);
      return row.rate * (vectors[0] / (math::sqrt(vectors[1] * row.square_rate) + eps));
    }
  };
  COLDROW_HD AtStep prepare(std::int32_t step, double lr) const {
    return {beta1, beta2, eps, step, lr};
  }
};

// Adam with one second moment per row. eps > 0; betas in [0, 1).
//     m = beta1*m + (1-beta1)*g;   v = beta2*v + (1-beta2)*mean(g^2)
//     w -= lr * (m / (1-beta1^n)) / (sqrt(v / (1-beta2^n)) + eps)
// Source: FBGEMM's PARTIAL_ROWWISE_ADAM.
template <BiasCorrection Bias = BiasCorrection::clock>
struct PartialRowwiseAdam {
  double eps = 1e-8;
  double beta1 = 0.9;
  double beta2 = 0.999;

  static constexpr const char* name =
      Bias == BiasCorrection::row ? "partial_rowwise_adam_by_touches" : "partial_rowwise_adam";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("eps", self.eps);
    f("beta1", self.beta1);
    f("beta2", self.beta2);
  }

  static constexpr int scalar_states = Bias == BiasCorrection::row ? 2 : 1;
  static constexpr int vector_states = 1;
  static constexpr const char* state_name(int i) {
    if (i == scalar_states) return "momentum1";
    return i == 0 ? "momentum2" : "touches";
  }

  struct AtStep : AdamStep {
    using AdamStep::AdamStep;
    static constexpr int scalar_states = PartialRowwiseAdam::scalar_states;
    static constexpr int vector_states = PartialRowwiseAdam::vector_states;
    static constexpr bool elements_finite = true;

    COLDROW_HD RowMultiplier row(float* scalars, float mean_square, float lr, std::int32_t) const {
      scalars[0] = second_moment(scalars[0], mean_square);
      const Corrected r = of_row<Bias>(scalars + 1, lr);
      return {r.rate / (math::sqrt(scalars[0] * r.square_rate) + eps)};
    }
    COLDROW_HD float element(const RowMultiplier& row, float g, float* vectors) const {
      vectors[0] = first_moment(vectors[0], g);
      return row.multiplier * vectors[0];
    }
  };
  COLDROW_HD AtStep prepare(std::int32_t step, double lr) const {
    return {beta1, beta2, eps, step, lr};
  }
};

// The built-in optimizers: those that the Python module knows. (CMake counts the entries: each is compiled
// for devices in a file of its own.)
using BuiltinOptimizers =
    TypeList<SGD, RowwiseRMSprop, RowwiseAdagrad, Adagrad, Adam<BiasCorrection::clock>,
             Adam<BiasCorrection::row>, PartialRowwiseAdam<BiasCorrection::clock>,
             PartialRowwiseAdam<BiasCorrection::row>>;

COLDROW_END
