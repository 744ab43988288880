// What a dense optimizer with Adaptive Regularization does: every row decays in every step. The
// lazy forms (a factor for the whole gap, charged when a row is read or touched) must equal it.
#pragma once

#include "support.hpp"

namespace coldrow_test {

struct DenseTable {
  std::int64_t dim;
  std::vector<double> weight, momentum1;
  std::vector<std::int64_t> since;  // steps not touched since a touch, -1 before the first

  template <Numeric W>
  DenseTable(const std::vector<W>& start, std::int64_t d)
      : dim(d),
        weight(values_of(start)),
        momentum1(start.size() / static_cast<std::size_t>(d)),
        since(momentum1.size(), -1) {}

  // One step of CumulativeLinear and row-wise RMSprop; grad has one row per index.
  void step(const std::vector<std::int64_t>& indices, const std::vector<double>& grad,
            const reference::Update& update, double lr) {
    for (std::size_t r = 0; r < since.size(); ++r) {
      std::vector<double> g(static_cast<std::size_t>(dim));
      bool in_batch = false;
      for (std::size_t i = 0; i < indices.size(); ++i) {
        if (indices[i] != static_cast<std::int64_t>(r)) continue;
        in_batch = true;
        for (std::size_t d = 0; d < g.size(); ++d) g[d] += grad[i * g.size() + d];
      }
      double factor = 1.0;
      if (since[r] >= 0) {
        factor -= std::fmin(1.0, update.decay.fields["alpha"] * static_cast<double>(since[r]));
      }
      double multiplier = 0.0;
      if (in_batch) {
        double mean_square = 0.0;
        for (const double x : g) mean_square += x * x / static_cast<double>(dim);
        double& v = momentum1[r];
        v = update.optimizer.fields["ema_beta"] * v +
            (1.0 - update.optimizer.fields["ema_beta"]) * mean_square;
        multiplier = lr / (std::sqrt(v) + update.optimizer.fields["eps"]);
      }
      for (std::size_t d = 0; d < g.size(); ++d) {
        double& w = weight[r * g.size() + d];
        w = factor * w - multiplier * g[d];
      }
      if (in_batch) {
        since[r] = 0;
      } else if (since[r] >= 0) {
        ++since[r];
      }
    }
  }
};

}  // namespace coldrow_test
