// Views of a table in the caller's memory. Nothing here owns anything.
#pragma once

#include "../row/update.hpp"

COLDROW_BEGIN

// A 1-D array of any stride (in elements), so that momentum1 and prev_iter may share one 8-byte
// record per row: then a touch costs one cache line of state instead of two.
template <class T>
struct Strided {
  T* data = nullptr;
  std::int64_t stride = 1;
  COLDROW_HD T& operator[](std::int64_t i) const { return data[i * stride]; }
};

template <Numeric Weight, OptimizerPolicy Optimizer>
struct Table {
  using RowType = Row<Weight, Optimizer>;

  Weight* weight = nullptr;  // [rows, dim], contiguous
  std::int64_t rows = 0;
  int dim = 0;
  Strided<std::int32_t> prev_iter{};            // [rows]
  Strided<float> scalars[RowType::kScalars]{};  // [rows] each
  float* vectors[RowType::kVectors]{};          // [rows, dim] each, contiguous
  ElementKey origin{};  // table key, global row of local row 0, global column of local column 0

  COLDROW_HD RowType row(std::int64_t r) const {
    RowType out{weight + r * dim, &prev_iter[r], {}, {}};
    for (int s = 0; s < Optimizer::scalar_states; ++s) out.scalars[s] = &scalars[s][r];
    for (int s = 0; s < Optimizer::vector_states; ++s) out.vectors[s] = vectors[s] + r * dim;
    return out;
  }
  COLDROW_HD ElementKey key(std::int64_t r) const {
    ElementKey k = origin;
    k.row += r;
    return k;
  }
};

COLDROW_END
