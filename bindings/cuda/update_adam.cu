#include "update.cuh"

namespace coldrow_module::cuda {
const OptimizerUpdates kAdam = OptimizerUpdates::of<Adam<BiasCorrection::clock>>();
}  // namespace coldrow_module::cuda
