// Compiled once per instruction set, COLDROW_ABI naming the build: header code alone, since an
// inline function of another library could end up with this build's instructions.
#include "instruction_sets.hpp"

#include <coldrow/coldrow.hpp>

namespace coldrow_test {
namespace COLDROW_ABI {

using namespace coldrow;

namespace {

template <class W, class Rounding>
void train_with(const Training& t, const Rounding& rounding) {
  Table<W, RowwiseRMSprop> table;
  table.weight = static_cast<W*>(t.weight);
  table.rows = t.rows;
  table.dim = t.dim;
  table.prev_iter = {t.prev_iter};
  table.scalars[0] = {t.momentum1};
  AnyDecay decay;
  for (std::int32_t step = 1; step <= 40; ++step) {
    decay.kind = static_cast<DecayKind>(step % 6);
    decay.linear_clipped = {0.3f, 0.1f};
    decay.cumulative_linear = {0.01};
    decay.exponential = {0.7};
    decay.constant = {0.7f};
    const auto update = RowUpdate<W, float, RowwiseRMSprop, AnyDecay, Rounding>::at(
        step, 0.05, {}, decay, rounding, step % 2 == 0, step > 20 ? 20 : 0);
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

template <class W>
void train_rounded(const Training& t) {
  if (t.stochastic) {
    train_with<W>(t, Stochastic{3});
  } else {
    train_with<W>(t, Nearest{});
  }
}

}  // namespace

void train(const Training& t) {
  switch (t.weight_type) {
    case WeightType::f32:
      return train_rounded<float>(t);
    case WeightType::f16:
      return train_rounded<half>(t);
    case WeightType::bf16:
      return train_rounded<bfloat16>(t);
  }
}

}  // namespace COLDROW_ABI
}  // namespace coldrow_test
