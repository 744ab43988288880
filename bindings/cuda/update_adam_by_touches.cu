#include "update.cuh"

namespace coldrow_module::cuda {
const OptimizerUpdates kAdamByTouches = OptimizerUpdates::of<Adam<BiasCorrection::row>>();
}  // namespace coldrow_module::cuda
