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

// Pools 16 * Blocks columns of one bag, from `column` on, in registers, and fetches the same columns
// of later rows. Whole: all of them exist; else Blocks is 1 and `count` do.
template <int Blocks, bool Whole, bool Scaled, Numeric Weight, class Index, Numeric Out>
COLDROW_HOST_INLINE void pool_columns(const Bags<Weight, Index>& bags, std::int64_t lo,
                                      std::int64_t hi, int column, int count, float bag_scale,
                                      Out* out) {
  const Index* const indices = bags.indices;
  const Weight* const weight = bags.weight + column;
  const std::int64_t last = bags.positions_end - 1;
  const std::int64_t dim = bags.dim;
  Lanes<16> acc[Blocks];
  for (auto& a : acc) broadcast(a, 0.0f);
  for (std::int64_t p = lo; p < hi; ++p) {
    const auto ahead = static_cast<std::int64_t>(indices[min_of(p + kLookupDistance, last)]);
    prefetch(weight + ahead * dim, 16 * Blocks * sizeof(Weight));
    const Weight* const row = weight + static_cast<std::int64_t>(indices[p]) * dim;
    Lanes<16> scale;
    broadcast(scale, Scaled ? bags.scale[p] : 1.0f);
    for (int b = 0; b < Blocks; ++b) {
      Lanes<16> w;
      if constexpr (Whole) {
        load(w, row + 16 * b);
      } else {
        load_partial(w, row + 16 * b, count);
      }
      multiply_add(acc[b], scale, w);
    }
  }
  const std::uint32_t none[16] = {};
  for (int b = 0; b < Blocks; ++b) {
    float pooled[16];
    to_array(acc[b], pooled);
    COLDROW_LANES
    for (int k = 0; k < 16; ++k) pooled[k] *= bag_scale;
    if constexpr (Whole) {
      store(pooled, Nearest{}, none, out + column + 16 * b);
    } else {
      store_partial(pooled, Nearest{}, none, out + column + 16 * b, count);
    }
  }
}

template <bool Scaled, Numeric Weight, class Index, Numeric Out>
void pool_bags(const Bags<Weight, Index>& bags, Out* out, std::int64_t out_stride) {
  std::int64_t lo = bags.first(bags.begin);
  for (std::int64_t b = bags.begin; b < bags.end; ++b, out += out_stride) {
    if (b + kOutDistance < bags.end) {
      prefetch(out + kOutDistance * out_stride, sizeof(Out) * static_cast<std::size_t>(bags.dim));
    }
    const std::int64_t hi = bags.first(b + 1);
    const float bag_scale = bags.mean && hi > lo ? 1.0f / static_cast<float>(hi - lo) : 1.0f;
    // (Written out: through for_columns() the same lookup takes up to half as long again.)
    int c = 0;
    const auto pool = [&](auto blocks, auto whole) {
      constexpr int kBlocks = decltype(blocks)::value;
      pool_columns<kBlocks, decltype(whole)::value, Scaled>(bags, lo, hi, c, bags.dim - c,
                                                            bag_scale, out);
      c += 16 * kBlocks;
    };
    using std::integral_constant;
    while (c + 128 <= bags.dim) pool(integral_constant<int, 8>{}, std::true_type{});
    if (c + 64 <= bags.dim) pool(integral_constant<int, 4>{}, std::true_type{});
    if (c + 32 <= bags.dim) pool(integral_constant<int, 2>{}, std::true_type{});
    if (c + 16 <= bags.dim) pool(integral_constant<int, 1>{}, std::true_type{});
    if (c < bags.dim) pool(integral_constant<int, 1>{}, std::false_type{});
    lo = hi;
  }
}

// Writes one output row per bag, from `out` on, out_stride elements apart. The rows of a bag are
// gone through once for each 128 columns; common widths are done in one go.
template <Numeric Weight, class Index, Numeric Out>
void lookup_bags(const Bags<Weight, Index>& bags, Out* out, std::int64_t out_stride) {
  if (bags.scale != nullptr) {
    pool_bags<true>(bags, out, out_stride);
  } else {
    pool_bags<false>(bags, out, out_stride);
  }
}

// scale[p] = read factor of the row at position p, times its per-sample weight if there is one.
// decay is prepared as of step - 1. end: where the positions end that will be asked for next, if they
// go on behind hi; the state of their rows is fetched.
template <DecayPolicy Decay, class Index>
void read_scales(const Decay& decay, std::int64_t step, float lr,
                 const Strided<const std::int32_t>& prev_iter, const Index* indices,
                 std::int64_t lo, std::int64_t hi, const float* per_sample_weights, float* scale,
                 std::int64_t end = 0) {
  // In pieces, so that the loop that computes has nothing else in it.
  for (std::int64_t from = lo; from < hi; from += 16) {
    const std::int64_t to = min_of(hi, from + 16);
    const std::int64_t ahead = min_of(max_of(hi, end), to + kStateDistance);
    for (std::int64_t p = from + kStateDistance; p < ahead; ++p) {
      prefetch(&prev_iter[indices[p]], 1);
    }
    std::int32_t touched[16] = {};
    float factor[16];
    for (std::int64_t p = from; p < to; ++p) touched[p - from] = prev_iter[indices[p]];
    read_factors(decay, step, touched, lr, factor);
    for (std::int64_t p = from; p < to; ++p) scale[p] = factor[p - from];
    if (per_sample_weights != nullptr) {
      for (std::int64_t p = from; p < to; ++p) scale[p] *= per_sample_weights[p];
    }
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
      Lanes<16> acc, w, g;
      broadcast(acc, 0.0f);
      int c = 0;
      for (; c + 16 <= bags.dim; c += 16) {
        load(w, row(p) + c);
        load(g, grad + c);
        multiply_add(acc, w, g);
      }
      if (c < bags.dim) {
        load_partial(w, row(p) + c, bags.dim - c);
        load_partial(g, grad + c, bags.dim - c);
        multiply_add(acc, w, g);
      }
      const float dot = coldrow::sum(acc);
      out[p] = bags.scale != nullptr ? bags.scale[p] * dot : dot;
    }
  }
}

}  // namespace host

COLDROW_END
