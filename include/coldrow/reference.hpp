// The reference: the semantics of coldrow in float64, serial and slow, written from the definitions
// and sharing no arithmetic with the library. It is the only second copy of any formula; tests
// compare everything else with it.
//
// A policy is its number in the list of its kind (BuiltinOptimizers, BuiltinDecays) and its fields in
// float64. Each has one function here, which is told by the policy's struct.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "policy/builtin.hpp"

COLDROW_BEGIN

namespace reference {

// The fields of a policy, by name.
struct Fields {
  static constexpr int kMost = 8;
  const char* name[kMost] = {};
  double value[kMost] = {};
  int count = 0;

  double operator[](const char* field) const {
    for (int i = 0; i < count; ++i) {
      if (same_text(name[i], field)) return value[i];
    }
    return std::nan("");
  }
  bool set(const char* field, double x) {
    for (int i = 0; i < count; ++i) {
      if (!same_text(name[i], field)) continue;
      value[i] = x;
      return true;
    }
    return false;
  }
  template <BuiltinPolicy P>
  static Fields of(const P& policy) {
    Fields out;
    P::fields(policy, [&](const char* field, const auto& x) {
      out.name[out.count] = field;
      out.value[out.count++] = static_cast<double>(x);
    });
    return out;
  }
};

// --------------------------------------------------------------------------------------------- decays

// The factors after `gap` steps, gap >= 0.

inline double factor(Type<NoDecay>, const Fields&, double, double) { return 1.0; }

inline double factor(Type<LinearClipped>, const Fields& p, double gap, double lr) {
  return std::fmax(p["min_shrinkage"], 1.0 - std::fmin(1.0, lr * p["alpha"] * gap));
}

inline double factor(Type<CumulativeLinear>, const Fields& p, double gap, double) {
  const double alpha = p["alpha"];
  double product = 1.0;
  if (alpha == 0.0) return product;  // and not 2^31 times 1
  for (double j = 1.0; j < gap && product > 1e-300; ++j) {
    product *= 1.0 - std::fmin(1.0, alpha * j);
  }
  return product > 1e-300 ? product : 0.0;
}

inline double factor(Type<Exponential>, const Fields& p, double gap, double lr) {
  if (p["half_life"] > 0.0) return std::exp2(-gap / p["half_life"]);
  return std::pow(std::fmax(0.0, 1.0 - lr * p["weight_decay"]), gap);
}

inline double factor(Type<Constant>, const Fields& p, double gap, double lr) {
  return gap > 0.0 ? std::fmax(0.0, 1.0 - lr * p["weight_decay"]) : 1.0;
}

// Of rows that the epoch's gate is open for; for the others it is 1 as under any gate.
inline double factor(Type<EpochReset>, const Fields&, double, double) { return 0.0; }

struct Decay {
  int number = BuiltinDecays::number<NoDecay>;
  Fields fields{};
  bool epoch_gated = false;

  Decay() = default;
  template <DecayPolicy D>
    requires(BuiltinDecays::has<D>)
  Decay(const D& decay, bool gated = false)
      : number(BuiltinDecays::number<D>), fields(Fields::of(decay)), epoch_gated(gated) {}

  // The factor after `gap` steps, for a row last touched at `last` (0: never; then gap is 1).
  double operator()(std::int64_t gap, std::int64_t last, double lr,
                    std::int64_t epoch_start) const {
    const bool gated = epoch_gated || number == BuiltinDecays::number<EpochReset>;
    const bool faded_epoch = last != 0 && epoch_start != 0 && last < epoch_start;
    if (gated && !faded_epoch) return 1.0;
    const auto steps = static_cast<double>(gap > 0 ? gap : 0);
    return with_type_at<BuiltinDecays>(number, [&](auto decay) {
      static_assert(
          requires { factor(decay, fields, steps, lr); },
          "a built-in decay has a factor() in coldrow/reference.hpp");
      return factor(decay, fields, steps, lr);
    });
  }
};

// ----------------------------------------------------------------------------------------- optimizers

// The state of one table: those arrays that the optimizer has.
struct State {
  std::int64_t* prev_iter;      // [rows]
  double* momentum1 = nullptr;  // [rows], or [rows, dim] where element-wise
  double* momentum2 = nullptr;  // likewise
  double* touches = nullptr;    // [rows]

  // The array of that name, or null where there is no such name.
  double** named(const char* name) {
    return same_text(name, "momentum1")   ? &momentum1
           : same_text(name, "momentum2") ? &momentum2
           : same_text(name, "touches")   ? &touches
                                          : nullptr;
  }
};

// What an optimizer sees of a row at one step.
struct RowStep {
  const State& state;
  std::int64_t row, dim;
  double lr;
  double step;         // the clock
  double fade;         // what the old state is multiplied by
  const double* g;     // [dim], the summed gradient
  double mean_square;  // of it
  double* amount;      // [dim], out: what is subtracted from the weights

  // The exponential average of what `old` was and x.
  double average(double beta, double old, double x) const {
    return beta * fade * old + (1.0 - beta) * x;
  }
  // x without the bias of an average that began as 0, n steps ago.
  static double unbiased(double beta, double n, double x) { return x / (1.0 - std::pow(beta, n)); }
  // What Adam's bias corrections count: steps, or the touches of the row.
  double count(BiasCorrection bias) const {
    if (bias == BiasCorrection::clock) return step;
    return state.touches[row] = fade * state.touches[row] + 1.0;
  }
};

inline void optimize(Type<SGD>, const Fields&, const RowStep& r) {
  for (std::int64_t d = 0; d < r.dim; ++d) r.amount[d] = r.lr * r.g[d];
}

inline void optimize(Type<RowwiseRMSprop>, const Fields& p, const RowStep& r) {
  double& v = r.state.momentum1[r.row];
  v = r.average(p["ema_beta"], v, r.mean_square);
  for (std::int64_t d = 0; d < r.dim; ++d) r.amount[d] = r.lr * r.g[d] / (std::sqrt(v) + p["eps"]);
}

inline void optimize(Type<RowwiseAdagrad>, const Fields& p, const RowStep& r) {
  double& v = r.state.momentum1[r.row];
  v = r.fade * v + r.mean_square;
  for (std::int64_t d = 0; d < r.dim; ++d) r.amount[d] = r.lr * r.g[d] / (std::sqrt(v) + p["eps"]);
}

inline void optimize(Type<Adagrad>, const Fields& p, const RowStep& r) {
  for (std::int64_t d = 0; d < r.dim; ++d) {
    double& v = r.state.momentum1[r.row * r.dim + d];
    v = r.fade * v + r.g[d] * r.g[d];
    r.amount[d] = r.lr * r.g[d] / (std::sqrt(v) + p["eps"]);
  }
}

template <BiasCorrection Bias>
void optimize(Type<Adam<Bias>>, const Fields& p, const RowStep& r) {
  const double beta1 = p["beta1"], beta2 = p["beta2"], eps = p["eps"], n = r.count(Bias);
  for (std::int64_t d = 0; d < r.dim; ++d) {
    double& m = r.state.momentum1[r.row * r.dim + d];
    double& v = r.state.momentum2[r.row * r.dim + d];
    m = r.average(beta1, m, r.g[d]);
    v = r.average(beta2, v, r.g[d] * r.g[d]);
    r.amount[d] = r.lr * r.unbiased(beta1, n, m) / (std::sqrt(r.unbiased(beta2, n, v)) + eps);
  }
}

template <BiasCorrection Bias>
void optimize(Type<PartialRowwiseAdam<Bias>>, const Fields& p, const RowStep& r) {
  const double beta1 = p["beta1"], beta2 = p["beta2"], eps = p["eps"], n = r.count(Bias);
  double& v = r.state.momentum2[r.row];
  v = r.average(beta2, v, r.mean_square);
  for (std::int64_t d = 0; d < r.dim; ++d) {
    double& m = r.state.momentum1[r.row * r.dim + d];
    m = r.average(beta1, m, r.g[d]);
    r.amount[d] = r.lr * r.unbiased(beta1, n, m) / (std::sqrt(r.unbiased(beta2, n, v)) + eps);
  }
}

struct Optimizer {
  int number = BuiltinOptimizers::number<RowwiseRMSprop>;
  Fields fields = Fields::of(RowwiseRMSprop{});

  Optimizer() = default;
  template <OptimizerPolicy O>
    requires(BuiltinOptimizers::has<O>)
  Optimizer(const O& optimizer)
      : number(BuiltinOptimizers::number<O>), fields(Fields::of(optimizer)) {}

  void operator()(const RowStep& row) const {
    with_type_at<BuiltinOptimizers>(number, [&](auto optimizer) {
      static_assert(
          requires { optimize(optimizer, fields, row); },
          "a built-in optimizer has an optimize() in coldrow/reference.hpp");
      optimize(optimizer, fields, row);
    });
  }
};

// --------------------------------------------------------------------------------------------- update

struct Update {
  Optimizer optimizer{};
  Decay decay{};
  bool decay_state = false;
};

// The update of one row at `step`; g: its summed gradient.
inline void apply_row(const Update& update, double* weight, std::int64_t dim, const State& state,
                      std::int64_t row, const double* g, std::int64_t step, double lr,
                      std::int64_t epoch_start) {
  double mean_square = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) mean_square += g[d] * g[d] / static_cast<double>(dim);
  const std::int64_t last = state.prev_iter[row];
  const double shrink = update.decay(last != 0 ? step - last : 1, last, lr, epoch_start);
  std::vector<double> amount(static_cast<std::size_t>(dim));
  update.optimizer({state, row, dim, lr, static_cast<double>(step),
                    update.decay_state ? shrink : 1.0, g, mean_square, amount.data()});
  for (std::int64_t d = 0; d < dim; ++d) {
    double& w = weight[row * dim + d];
    w = shrink * w - amount[static_cast<std::size_t>(d)];
  }
  state.prev_iter[row] = step;
}

// One step. weight: [rows, dim]; grad: [n, dim], one row per index, duplicates are summed first.
inline void apply(const Update& update, double* weight, std::int64_t dim, const State& state,
                  const double* grad, const std::int64_t* indices, std::int64_t n,
                  std::int64_t step, double lr, std::int64_t epoch_start) {
  std::vector<bool> done(static_cast<std::size_t>(n), false);
  std::vector<double> sum(static_cast<std::size_t>(dim));
  for (std::int64_t first = 0; first < n; ++first) {
    if (done[static_cast<std::size_t>(first)]) continue;
    sum.assign(static_cast<std::size_t>(dim), 0.0);
    for (std::int64_t i = first; i < n; ++i) {
      if (indices[i] != indices[first]) continue;
      done[static_cast<std::size_t>(i)] = true;
      for (std::int64_t d = 0; d < dim; ++d) sum[static_cast<std::size_t>(d)] += grad[i * dim + d];
    }
    apply_row(update, weight, dim, state, indices[first], sum.data(), step, lr, epoch_start);
  }
}

// What a read-charged forward before `step` multiplies a row by.
inline double read_factor(const Update& update, std::int64_t prev_iter, std::int64_t step,
                          double lr, std::int64_t epoch_start) {
  if (prev_iter == 0) return 1.0;
  return update.decay(step - 1 - prev_iter, prev_iter, lr, epoch_start);
}

}  // namespace reference

COLDROW_END
