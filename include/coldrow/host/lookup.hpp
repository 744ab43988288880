// Forward on the host: gather rows, scale, pool. Also the gradient of per_sample_weights.
#pragma once

#include "../table/table.hpp"
#include "segment.hpp"

COLDROW_BEGIN

namespace host {

// Some bags of one feature.
template <Numeric Weight, class Index>
struct Bags {
  const Weight* weight;  // [rows, dim]
  int dim;
  const Index* indices;        // of the whole batch
  const Index* offsets;        // null: bag b is position b
  std::int64_t begin, end;     // bags
  std::int64_t positions_end;  // where the feature's indices end: prefetching stops there
  const float* scale;          // [positions] or null: what a row is multiplied by
  bool mean;

  std::int64_t first(std::int64_t bag) const {
    return offsets == nullptr ? bag : static_cast<std::int64_t>(offsets[bag]);
  }
};

template <int Blocks, Numeric Weight, class Index, Numeric Out>
void pool_columns(const Bags<Weight, Index>& bags, std::int64_t lo, std::int64_t hi, int column,
                  float bag_scale, Out* out) {
  float acc[Blocks][16] = {};
  for (std::int64_t p = lo; p < hi; ++p) {
    const Weight* row = bags.weight + static_cast<std::int64_t>(bags.indices[p]) * bags.dim;
    const float scale = bags.scale != nullptr ? bags.scale[p] : 1.0f;
    for (int b = 0; b < Blocks; ++b) {
      float w[16];
      if constexpr (Blocks == 1) {
        load_columns<16>(row, column, bags.dim, w);
      } else {
        load_block<16>(row + column + 16 * b, w);
      }
      COLDROW_LANES
      for (int k = 0; k < 16; ++k) acc[b][k] = fma(scale, w[k], acc[b][k]);
    }
  }
  const std::uint32_t none[16] = {};
  for (int b = 0; b < Blocks; ++b) {
    COLDROW_LANES
    for (int k = 0; k < 16; ++k) acc[b][k] *= bag_scale;
    if constexpr (Blocks == 1) {
      store_columns<16>(out, column, bags.dim, acc[b], Nearest{}, none);
    } else {
      store_block<16>(out + column + 16 * b, acc[b], Nearest{}, none);
    }
  }
}

// Writes one output row per bag, from `out` on, out_stride elements apart.
template <Numeric Weight, class Index, Numeric Out>
void lookup_bags(const Bags<Weight, Index>& bags, Out* out, std::int64_t out_stride) {
  const std::size_t row_bytes = sizeof(Weight) * static_cast<std::size_t>(bags.dim);
  const auto fetch = [&](std::int64_t p) {
    prefetch(bags.weight + static_cast<std::int64_t>(bags.indices[p]) * bags.dim, row_bytes);
  };
  std::int64_t fetched = bags.first(bags.begin);
  for (std::int64_t b = bags.begin; b < bags.end; ++b, out += out_stride) {
    const std::int64_t lo = bags.first(b);
    const std::int64_t hi = bags.first(b + 1);
    const std::int64_t ahead = min_of(bags.positions_end, hi + kPrefetchDistance);
    for (; fetched < ahead; ++fetched) fetch(fetched);
    const float bag_scale = bags.mean && hi > lo ? 1.0f / static_cast<float>(hi - lo) : 1.0f;
    int c = 0;
    for (; c + 64 <= bags.dim; c += 64) pool_columns<4>(bags, lo, hi, c, bag_scale, out);
    for (; c < bags.dim; c += 16) pool_columns<1>(bags, lo, hi, c, bag_scale, out);
  }
}

// scale[p] = read factor of the row at position p, times its per-sample weight if there is one.
// decay is prepared as of step - 1.
template <DecayPolicy Decay, class Index>
void read_scales(const Decay& decay, std::int32_t step, float lr,
                 const Strided<const std::int32_t>& prev_iter, const Index* indices,
                 std::int64_t lo, std::int64_t hi, const float* per_sample_weights, float* scale) {
  for (std::int64_t p = lo; p < hi; ++p) {
    if (p + kPrefetchDistance < hi) prefetch(&prev_iter[indices[p + kPrefetchDistance]], 1);
    const float factor = read_factor(decay, step, prev_iter[indices[p]], lr);
    scale[p] = per_sample_weights != nullptr ? factor * per_sample_weights[p] : factor;
  }
}

// out[p] = scale[p] * <gradient of the bag of p, weight row of p>: the gradient of
// per_sample_weights, where scale is the read factor (null: 1).
template <Numeric Weight, class Index, Numeric Grad>
void weight_gradients(const Bags<Weight, Index>& bags, const Grad* grad, std::int64_t grad_stride,
                      float* out) {
  const std::size_t row_bytes = sizeof(Weight) * static_cast<std::size_t>(bags.dim);
  for (std::int64_t b = bags.begin; b < bags.end; ++b, grad += grad_stride) {
    for (std::int64_t p = bags.first(b); p < bags.first(b + 1); ++p) {
      const auto row = [&](std::int64_t q) {
        return bags.weight + static_cast<std::int64_t>(bags.indices[q]) * bags.dim;
      };
      if (p + kPrefetchDistance < bags.positions_end)
        prefetch(row(p + kPrefetchDistance), row_bytes);
      float acc[16] = {};
      for (int c = 0; c < bags.dim; c += 16) {
        float w[16], g[16];
        load_columns<16>(row(p), c, bags.dim, w);
        load_columns<16>(grad, c, bags.dim, g);
        COLDROW_LANES
        for (int k = 0; k < 16; ++k) acc[k] = fma(w[k], g[k], acc[k]);
      }
      for (int half = 8; half > 0; half /= 2) {
        for (int k = 0; k < half; ++k) acc[k] += acc[k + half];
      }
      out[p] = bags.scale != nullptr ? bags.scale[p] * acc[0] : acc[0];
    }
  }
}

}  // namespace host

COLDROW_END
