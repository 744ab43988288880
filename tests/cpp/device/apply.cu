// Compiled, not run: the row update's drivers for every weight type and rounding, and for policies of
// one's own, one with a state per element.
#include <coldrow/device/device.cuh>
#include <coldrow/policy/any_decay.hpp>

using namespace coldrow;

struct HalfLife {
  float half_life;
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    return gap <= 0 ? 1.0f : half_life / (half_life + static_cast<float>(gap));
  }
};

struct Momentum {
  float rate;
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 1;
  COLDROW_HD RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  COLDROW_HD float element(const RowMultiplier& row, float g, float* vectors) const {
    vectors[0] = math::fma(rate, vectors[0], g);
    return row.multiplier * vectors[0];
  }
};

template <class Update>
void drive(device::Queue& queue, const device::StepInputs& inputs, const device::Batch& batch,
           const device::Layout& layout, const device::Extent& extent,
           const device::Gradient& gradient, device::Report* report, void* memory) {
  device::Workspace w(memory);
  const auto segments = device::take_segment_space(w, extent, 0);
  const auto space =
      device::take_apply_space(w, extent, device::choose_apply<Update>(extent).workspace_floats);
  device::begin_batch(queue, report, true);
  device::check_batch(queue, batch, layout, report, extent.machine);
  device::prepare_updates<Update>(queue, inputs, nullptr, nullptr, 0, nullptr, report);
  const auto sorted = device::segment(queue, batch, layout, extent, segments, report);
  device::sum_long_runs(queue, layout, extent, gradient, sorted, segments.runs, space, report);
  device::apply(queue, device::TableGroup<Update>{}, layout, extent, gradient, sorted,
                segments.runs, space, device::Pass::update, report);
  device::finish_batch(queue, batch, layout, report, nullptr);
}

#define INSTANTIATE(Weight, Optimizer, Decay, Rounding)                                       \
  template void drive<RowUpdate<Weight, float, Optimizer, Decay, Rounding>>(                  \
      device::Queue&, const device::StepInputs&, const device::Batch&, const device::Layout&, \
      const device::Extent&, const device::Gradient&, device::Report*, void*);

INSTANTIATE(float, RowwiseRMSprop, AnyDecay, Nearest)
INSTANTIATE(half, RowwiseRMSprop, AnyDecay, Nearest)
INSTANTIATE(half, RowwiseRMSprop, AnyDecay, Stochastic)
INSTANTIATE(coldrow::bfloat16, RowwiseRMSprop, AnyDecay, Nearest)
INSTANTIATE(coldrow::bfloat16, RowwiseRMSprop, AnyDecay, Stochastic)
INSTANTIATE(float, Adam<>, AnyDecay, Nearest)
INSTANTIATE(coldrow::bfloat16, Adam<BiasCorrection::row>, AnyDecay, Stochastic)
INSTANTIATE(float, Momentum, HalfLife, Nearest)
INSTANTIATE(coldrow::bfloat16, Momentum, NoDecay, Stochastic)
