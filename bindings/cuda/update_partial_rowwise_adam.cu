#include "update.cuh"

namespace coldrow_module::cuda {
const OptimizerUpdates kPartialRowwiseAdam =
    OptimizerUpdates::of<PartialRowwiseAdam<BiasCorrection::clock>>();
}  // namespace coldrow_module::cuda
