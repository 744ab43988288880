#include "train.hpp"

void train(std::int32_t step, const Update::RowType& row, const float* grad, int dim) {
  Update::at(step, 0.5, {}, WarmHalfLife{})(coldrow::Serial{}, row, grad, dim, {});
}
