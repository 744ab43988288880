// The updates of the built-in optimizers, each compiled in a translation unit of its own: for every entry of
// the list BuiltinOptimizers module.cmake writes a file with COLDROW_INSTANTIATE_UPDATES(its number).
#pragma once

#include <coldrow/device/update_kernels.cuh>

namespace coldrow_module::cuda {

template <class Optimizer>
const coldrow::device::OptimizerUpdates& updates_of();

}  // namespace coldrow_module::cuda

#define COLDROW_INSTANTIATE_UPDATES(number)                                             \
  namespace coldrow_module::cuda {                                                      \
  template <class Optimizer>                                                            \
  const coldrow::device::OptimizerUpdates& updates_of() {                               \
    static constexpr auto updates = coldrow::device::OptimizerUpdates::of<Optimizer>(); \
    return updates;                                                                     \
  }                                                                                     \
  template const coldrow::device::OptimizerUpdates&                                     \
  updates_of<coldrow::BuiltinOptimizers::At<number>>();                                 \
  }
