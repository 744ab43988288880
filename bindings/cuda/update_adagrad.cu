#include "update.cuh"

namespace coldrow_module::cuda {
const OptimizerUpdates kAdagrad = OptimizerUpdates::of<Adagrad>();
}  // namespace coldrow_module::cuda
