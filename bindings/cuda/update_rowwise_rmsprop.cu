#include "update.cuh"

namespace coldrow_module::cuda {
const OptimizerUpdates kRowwiseRmsprop = OptimizerUpdates::of<RowwiseRMSprop>();
}  // namespace coldrow_module::cuda
