#include "update.cuh"

namespace coldrow_module::cuda {
const OptimizerUpdates kSgd = OptimizerUpdates::of<SGD>();
}  // namespace coldrow_module::cuda
