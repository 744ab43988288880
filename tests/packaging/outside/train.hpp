#pragma once

#include <coldrow/coldrow.hpp>

#include "half_life.hpp"

using Update =
    coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop, WarmHalfLife, coldrow::Nearest>;

// One touch of the row at `step`.
void train(std::int32_t step, const Update::RowType& row, const float* grad, int dim);
