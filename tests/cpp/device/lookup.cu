// Compiled, not run: lookups and the gradient of their weights, for every weight type, as stored and
// charged when read.
#include <coldrow/device/device.cuh>
#include <coldrow/policy/any_decay.hpp>

namespace coldrow::device {

#define INSTANTIATE(Weight, Read)                                                                  \
  template void lookup<Weight, Read>(Queue&, const FeatureGroup&, const Batch&, const Layout&,     \
                                     const Read*, const Report*, void*, NumericType, std::int64_t, \
                                     std::int32_t*, Machine);                                      \
  template void weight_gradients<Weight, Read>(                                                    \
      Queue&, const FeatureGroup&, const Batch&, const Layout&, const Read*, const Report*,        \
      const void*, NumericType, float*, std::int32_t*, Machine);

INSTANTIATE(float, ReadStored)
INSTANTIATE(half, ReadStored)
INSTANTIATE(coldrow::bfloat16, ReadStored)
INSTANTIATE(float, ReadStep<AnyDecay>)
INSTANTIATE(half, ReadStep<AnyDecay>)
INSTANTIATE(coldrow::bfloat16, ReadStep<AnyDecay>)
template void prepare_reads<AnyDecay>(Queue&, const StepInputs&, const ReadRecipe<AnyDecay>*,
                                      std::int32_t, ReadStep<AnyDecay>*, Report*);

}  // namespace coldrow::device
