#include "update.cuh"

namespace coldrow_module::cuda {
const OptimizerUpdates kPartialRowwiseAdamByTouches =
    OptimizerUpdates::of<PartialRowwiseAdam<BiasCorrection::row>>();
}  // namespace coldrow_module::cuda
