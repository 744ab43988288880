#include <coldrow/table/table.hpp>

#include "half_life.hpp"

using Update =
    coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop, WarmHalfLife, coldrow::Nearest>;

// One warp per row.
__global__ void train(Update update, coldrow::Table<float, coldrow::RowwiseRMSprop> table,
                      const float* grad) {
  const std::int64_t r = blockIdx.x;
  update(coldrow::Warp{}, table.row(r), grad + r * table.dim, table.dim, table.key(r));
}
