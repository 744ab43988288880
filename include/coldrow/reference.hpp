// The reference: the semantics of coldrow in float64, serial and slow, written from the definitions
// and sharing no arithmetic with the library. It is the only second copy of any formula; tests
// compare everything else with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "policy/any_decay.hpp"  // for the names in DecayKind

COLDROW_BEGIN

namespace reference {

struct Decay {
  DecayKind kind = DecayKind::none;
  bool epoch_gated = false;
  double alpha = 0.0;
  double min_shrinkage = 0.0;
  double weight_decay = 0.0;
  double half_life = 0.0;

  // The factor after `gap` steps, for a row last touched at `last` (0: never; then gap is 1).
  double operator()(std::int64_t gap, std::int64_t last, double lr,
                    std::int64_t epoch_start) const {
    const bool faded_epoch = last != 0 && epoch_start != 0 && last < epoch_start;
    if (kind == DecayKind::epoch_reset) return faded_epoch ? 0.0 : 1.0;
    if (epoch_gated && !faded_epoch) return 1.0;
    if (gap <= 0) return 1.0;
    switch (kind) {
      case DecayKind::linear_clipped:
        return std::fmax(min_shrinkage,
                         1.0 - std::fmin(1.0, lr * alpha * static_cast<double>(gap)));
      case DecayKind::cumulative_linear: {
        double product = 1.0;
        if (alpha == 0.0) return product;  // and not 2^31 times 1
        for (std::int64_t j = 1; j < gap && product > 1e-300; ++j) {
          product *= 1.0 - std::fmin(1.0, alpha * static_cast<double>(j));
        }
        return product > 1e-300 ? product : 0.0;
      }
      case DecayKind::exponential:
        if (half_life > 0.0) return std::exp2(-static_cast<double>(gap) / half_life);
        return std::pow(std::fmax(0.0, 1.0 - lr * weight_decay), static_cast<double>(gap));
      case DecayKind::constant:
        return std::fmax(0.0, 1.0 - lr * weight_decay);
      default:
        return 1.0;
    }
  }
};

enum class OptimizerKind : std::int32_t {
  sgd,
  rowwise_rmsprop,
  rowwise_adagrad,
  adagrad,
  adam,
  partial_rowwise_adam,
};

// beta1 is RowwiseRMSprop's ema_beta too. count_touches: bias correction by the row's own touches.
struct Optimizer {
  double eps = 1e-8;
  double beta1 = 0.99;
  double beta2 = 0.999;
  OptimizerKind kind = OptimizerKind::rowwise_rmsprop;
  bool count_touches = false;
};

// The state of one table: those arrays that the optimizer has.
struct State {
  std::int64_t* prev_iter;      // [rows]
  double* momentum1 = nullptr;  // [rows], or [rows, dim] where element-wise
  double* momentum2 = nullptr;  // likewise
  double* touches = nullptr;    // [rows]
};

struct Update {
  Optimizer optimizer{};
  Decay decay{};
  bool decay_state = false;
};

// The update of one row at `step`; g: its summed gradient.
inline void apply_row(const Update& update, double* weight, std::int64_t dim, const State& state,
                      std::int64_t row, const double* g, std::int64_t step, double lr,
                      std::int64_t epoch_start) {
  const Optimizer& o = update.optimizer;
  double mean_square = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) mean_square += g[d] * g[d] / static_cast<double>(dim);
  const std::int64_t last = state.prev_iter[row];
  const double shrink = update.decay(last != 0 ? step - last : 1, last, lr, epoch_start);
  const double fade = update.decay_state ? shrink : 1.0;
  double n = static_cast<double>(step);  // what Adam's bias corrections count
  if (o.count_touches) n = state.touches[row] = fade * state.touches[row] + 1.0;
  const auto average = [&](double beta, double old, double x) {
    return beta * fade * old + (1.0 - beta) * x;
  };
  const auto unbiased = [&](double beta, double x) { return x / (1.0 - std::pow(beta, n)); };

  double row_root = 0.0;  // square root of the row's second moment, for the row-wise ones
  switch (o.kind) {
    case OptimizerKind::rowwise_rmsprop:
      row_root =
          std::sqrt(state.momentum1[row] = average(o.beta1, state.momentum1[row], mean_square));
      break;
    case OptimizerKind::rowwise_adagrad:
      row_root = std::sqrt(state.momentum1[row] = fade * state.momentum1[row] + mean_square);
      break;
    case OptimizerKind::partial_rowwise_adam:
      state.momentum2[row] = average(o.beta2, state.momentum2[row], mean_square);
      row_root = std::sqrt(unbiased(o.beta2, state.momentum2[row]));
      break;
    default:
      break;
  }
  for (std::int64_t d = 0; d < dim; ++d) {
    const std::int64_t i = row * dim + d;
    double amount = lr * g[d];
    switch (o.kind) {
      case OptimizerKind::sgd:
        break;
      case OptimizerKind::rowwise_rmsprop:
      case OptimizerKind::rowwise_adagrad:
        amount /= row_root + o.eps;
        break;
      case OptimizerKind::adagrad:
        state.momentum1[i] = fade * state.momentum1[i] + g[d] * g[d];
        amount /= std::sqrt(state.momentum1[i]) + o.eps;
        break;
      case OptimizerKind::adam:
        state.momentum1[i] = average(o.beta1, state.momentum1[i], g[d]);
        state.momentum2[i] = average(o.beta2, state.momentum2[i], g[d] * g[d]);
        amount = lr * unbiased(o.beta1, state.momentum1[i]) /
                 (std::sqrt(unbiased(o.beta2, state.momentum2[i])) + o.eps);
        break;
      case OptimizerKind::partial_rowwise_adam:
        state.momentum1[i] = average(o.beta1, state.momentum1[i], g[d]);
        amount = lr * unbiased(o.beta1, state.momentum1[i]) / (row_root + o.eps);
        break;
    }
    weight[i] = shrink * weight[i] - amount;
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
