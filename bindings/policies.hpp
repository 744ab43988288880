// From the plain structs of kernels.hpp to coldrow's own types. Included where kernels are compiled.
#pragma once

#include <coldrow/policy/any_decay.hpp>
#include <coldrow/policy/optimizer.hpp>
#include <coldrow/table/batch.hpp>

#include "kernels.hpp"

namespace coldrow_module {
namespace {

using namespace coldrow;

inline AnyDecay to_decay(const UpdateArgs& u) {
  AnyDecay d;
  d.kind = static_cast<DecayKind>(u.decay);
  d.epoch_gated = u.epoch_gated;
  d.linear_clipped = {static_cast<float>(u.alpha), static_cast<float>(u.min_shrinkage)};
  d.cumulative_linear = {u.alpha, u.decay_table, u.decay_table_size};
  d.exponential = {u.weight_decay, u.half_life};
  d.constant = {static_cast<float>(u.weight_decay)};
  d.external = static_cast<const ExternalDecay*>(u.external_decay);
  d.external_policy = u.decay_policy;
  return d;
}

inline Feature to_feature(const FeatureArgs& f) {
  return {f.table,     f.dim,       f.first_bag,  f.bags,      f.first_position,
          f.positions, f.first_row, f.out_offset, f.out_stride};
}

// Calls f with the optimizer's struct.
template <class F>
auto with_optimizer(const UpdateArgs& u, const F& f) {
  const auto eps = static_cast<float>(u.eps);
  switch (u.optimizer) {
    case OptimizerKind::sgd:
      return f(SGD{});
    case OptimizerKind::rowwise_adagrad:
      return f(RowwiseAdagrad{eps});
    case OptimizerKind::adagrad:
      return f(Adagrad{eps});
    case OptimizerKind::adam:
      return f(Adam<BiasCorrection::clock>{u.eps, u.beta1, u.beta2});
    case OptimizerKind::adam_by_touches:
      return f(Adam<BiasCorrection::row>{u.eps, u.beta1, u.beta2});
    case OptimizerKind::partial_rowwise_adam:
      return f(PartialRowwiseAdam<BiasCorrection::clock>{u.eps, u.beta1, u.beta2});
    case OptimizerKind::partial_rowwise_adam_by_touches:
      return f(PartialRowwiseAdam<BiasCorrection::row>{u.eps, u.beta1, u.beta2});
    case OptimizerKind::rowwise_rmsprop:
    case OptimizerKind::external:
      break;
  }
  return f(RowwiseRMSprop{eps, static_cast<float>(u.beta1)});
}

}  // namespace
}  // namespace coldrow_module
