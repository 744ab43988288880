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

struct RowwiseRMSprop {
  double eps = 1e-8;
  double ema_beta = 0.99;
};

struct Update {
  RowwiseRMSprop optimizer{};
  Decay decay{};
  bool decay_state = false;
};

// One step. weight: [rows, dim]; momentum1, prev_iter: [rows]; grad: [n, dim], one row per index,
// duplicates are summed first.
inline void apply(const Update& update, double* weight, std::int64_t dim, double* momentum1,
                  std::int64_t* prev_iter, const double* grad, const std::int64_t* indices,
                  std::int64_t n, std::int64_t step, double lr, std::int64_t epoch_start) {
  std::vector<bool> done(static_cast<std::size_t>(n), false);
  std::vector<double> sum(static_cast<std::size_t>(dim));
  for (std::int64_t first = 0; first < n; ++first) {
    if (done[static_cast<std::size_t>(first)]) continue;
    const std::int64_t row = indices[first];
    sum.assign(static_cast<std::size_t>(dim), 0.0);
    for (std::int64_t i = first; i < n; ++i) {
      if (indices[i] != row) continue;
      done[static_cast<std::size_t>(i)] = true;
      for (std::int64_t d = 0; d < dim; ++d) sum[static_cast<std::size_t>(d)] += grad[i * dim + d];
    }
    double mean_square = 0.0;
    for (const double g : sum) mean_square += g * g;
    mean_square /= static_cast<double>(dim);

    const std::int64_t last = prev_iter[row];
    const std::int64_t gap = last != 0 ? step - last : 1;
    const double shrink = update.decay(gap, last, lr, epoch_start);
    const double beta = update.optimizer.ema_beta;
    double& v = momentum1[row];
    v = beta * (update.decay_state ? shrink * v : v) + (1.0 - beta) * mean_square;
    const double multiplier = lr / (std::sqrt(v) + update.optimizer.eps);
    for (std::int64_t d = 0; d < dim; ++d) {
      double& w = weight[row * dim + d];
      w = shrink * w - multiplier * sum[static_cast<std::size_t>(d)];
    }
    prev_iter[row] = step;
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
