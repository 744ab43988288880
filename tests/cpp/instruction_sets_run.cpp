// Compiled once per instruction set, COLDROW_ABI naming the build: header code alone, since an
// inline function of another library could end up with this build's instructions.
#include "instruction_sets.hpp"

#include <coldrow/coldrow.hpp>

namespace coldrow_test {
namespace COLDROW_ABI {

using namespace coldrow;

namespace {

template <class W, class Optimizer, class Rounding>
void train_with(const Training& t, const Optimizer& optimizer, const Rounding& rounding) {
  Table<W, Optimizer> table;
  table.weight = static_cast<W*>(t.weight);
  table.rows = t.rows;
  table.dim = t.dim;
  table.prev_iter = {t.prev_iter};
  for (int i = 0; i < Optimizer::scalar_states; ++i) table.scalars[i] = {t.scalars[i]};
  for (int i = 0; i < Optimizer::vector_states; ++i) table.vectors[i] = t.vectors[i];
  AnyDecay decay;
  for (std::int32_t step = 1; step <= 40; ++step) {
    const AnyDecay decays[] = {NoDecay{},
                               LinearClipped{0.3f, 0.1f},
                               CumulativeLinear{0.01},
                               Exponential{0.7},
                               Constant{0.7f},
                               EpochReset{}};
    decay = decays[step % 6];
    const auto update = RowUpdate<W, float, Optimizer, AnyDecay, Rounding>::at(
        step, 0.05, optimizer, decay, rounding, step % 2 == 0, step > 20 ? 20 : 0);
    for (std::int64_t r = 0; r < t.rows; ++r) {
      if ((r * 7 + step) % 5 != 0) continue;
      const float* grad = t.grad + (r + step) % t.rows * t.dim;
      update(Serial{}, table.row(r), grad, t.dim, table.key(r));
    }
  }

  // One bag of three rows each.
  for (std::int64_t r = 0; r < t.rows; ++r) {
    const std::int64_t indices[3] = {r, (r + 1) % t.rows, r};
    const std::int64_t offsets[2] = {0, 3};
    float scale[3];
    host::read_scales(prepare(decay, 49, 0.05, 20), 50, 0.05f,
                      Strided<const std::int32_t>{t.prev_iter}, indices, 0, 3, nullptr, scale);
    const host::Bags<W, std::int64_t> bags{table.weight, t.dim, indices, offsets, 0, 1, 3,
                                           scale,        true};
    host::lookup_bags(bags, t.read + r * t.dim, t.dim);
  }
}

template <class Optimizer>
void train_optimizer(const Training& t, const Optimizer& optimizer) {
  const auto rounded = [&](auto weight) {
    using W = decltype(weight);
    if constexpr (std::same_as<W, float>) {
      train_with<W>(t, optimizer, Nearest{});  // stored unrounded
    } else if (t.stochastic) {
      train_with<W>(t, optimizer, Stochastic{3});
    } else {
      train_with<W>(t, optimizer, Nearest{});
    }
  };
  switch (t.weight_type) {
    case WeightType::f32:
      return rounded(float{});
    case WeightType::f16:
      return rounded(half{});
    case WeightType::bf16:
      return rounded(bfloat16{});
  }
}

}  // namespace

void train(const Training& t) {
  switch (t.optimizer) {
    case OptimizerType::sgd:
      return train_optimizer(t, SGD{});
    case OptimizerType::rowwise_rmsprop:
      return train_optimizer(t, RowwiseRMSprop{});
    case OptimizerType::rowwise_adagrad:
      return train_optimizer(t, RowwiseAdagrad{});
    case OptimizerType::adagrad:
      return train_optimizer(t, Adagrad{});
    case OptimizerType::adam:
      return train_optimizer(t, Adam<BiasCorrection::clock>{});
    case OptimizerType::adam_by_touches:
      return train_optimizer(t, Adam<BiasCorrection::row>{});
    case OptimizerType::partial_rowwise_adam:
      return train_optimizer(t, PartialRowwiseAdam<BiasCorrection::clock>{});
    case OptimizerType::partial_rowwise_adam_by_touches:
      return train_optimizer(t, PartialRowwiseAdam<BiasCorrection::row>{});
  }
}

}  // namespace COLDROW_ABI
}  // namespace coldrow_test
