#include "update.cuh"

namespace coldrow_module::cuda {
const OptimizerUpdates kRowwiseAdagrad = OptimizerUpdates::of<RowwiseAdagrad>();
}  // namespace coldrow_module::cuda
