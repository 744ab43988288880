// Forward: gather rows, scale, pool. Also the gradient of per_sample_weights.
//
// A tile of lanes takes a bag. Its lanes look up the rows, and the decay each owes, in parallel; then
// the rows are summed as in gather.cuh. The bits are those of the host's lookup.
#pragma once

#include "gather.cuh"
#include "step.cuh"
#include "work.cuh"

COLDROW_BEGIN

namespace device {

// In place of a ReadStep where charge="touch": rows are read as stored.
struct ReadStored {};

// Features whose tables have weights of one type.
template <class Read>
struct LookupArgs {
  Batch batch;
  Layout layout;
  const std::int32_t* features;  // [deal.parts], numbers in the layout
  Deal deal;
  const Read* reads;  // [num_tables] for ReadStep; unused for ReadStored
  const Report* report;
};

// Positions [lo, hi) of one output row.
struct Bag {
  std::int64_t lo, hi;
};

namespace kernel {

template <class Read>
__device__ __forceinline__ Bag bag_of(const LookupArgs<Read>& a, const Feature& f, std::int64_t i) {
  if (!a.batch.pooled) return {f.first_position + i, f.first_position + i + 1};
  return {a.batch.bag_begin(f.first_bag + i), a.batch.bag_begin(f.first_bag + i + 1)};
}

// The row at position p of a feature of `table`, and the read factor it is to be multiplied by.
template <class Read>
__device__ __forceinline__ Term row_at(const LookupArgs<Read>& a, const TableInfo& table,
                                       std::int32_t number, std::int64_t p) {
  const std::int64_t r = a.batch.indices[p];
  Term term{r * table.dim, 1.0f};
  if constexpr (!std::same_as<Read, ReadStored>) {
    term.scale = a.reads[number].factor(table.prev_iter[r]);
  }
  return term;
}

template <Numeric Weight>
__device__ __forceinline__ bool rows_aligned(const TableInfo& table) {
  return reinterpret_cast<std::uintptr_t>(table.weight) % 16 == 0 &&
         table.dim * sizeof(Weight) % 16 == 0;
}

template <Numeric Weight>
__device__ __forceinline__ int feature_lanes(const Layout& layout, std::int32_t feature) {
  return lanes_for(layout.features[feature].dim, block_for(sizeof(Weight)));
}

// Which blocks work on which feature. One warp.
template <Numeric Weight, class Read>
__global__ void deal_bags(LookupArgs<Read> a, std::int32_t* first_block) {
  deal_blocks(
      a.deal,
      [&](std::int32_t i) {
        const Feature& f = a.layout.features[a.features[i]];
        return a.batch.pooled ? f.bags : f.positions;
      },
      [&](std::int32_t i) { return feature_lanes<Weight>(a.layout, a.features[i]); }, first_block);
}

// Calls f(feature, tile, i) for the bags of this block's tiles: output row i of the feature.
template <Numeric Weight, class Read, class F>
__device__ __forceinline__ void for_bags(const LookupArgs<Read>& a, const F& f) {
  constexpr int kBlock = block_for(sizeof(Weight));
  const auto lanes_of = [&](std::int32_t i) {
    return feature_lanes<Weight>(a.layout, a.features[i]);
  };
  const std::int32_t blocks = a.deal.blocks();
  for (auto block = static_cast<std::int32_t>(blockIdx.x); block < blocks;
       block += static_cast<std::int32_t>(gridDim.x)) {
    const Share share = share_of(a.deal, block, lanes_of);
    const Feature& feature = a.layout.features[a.features[share.part]];
    const Tile<kBlock> tile{lanes_for(feature.dim, kBlock)};
    const std::int64_t last = min_of(share.last, a.batch.pooled ? feature.bags : feature.positions);
    for (std::int64_t i = share.first + tile.number(); i < last; i += a.deal.threads / tile.lanes) {
      f(feature, tile, i);
    }
  }
}

// out_elements: of the whole output; a refused batch has zeros there.
template <Numeric Weight, class Read>
__global__ void __launch_bounds__(kThreads, kLookupBlocks)
    lookup(LookupArgs<Read> a, void* out, NumericType out_type, std::int64_t out_elements) {
  if (refused(a.report)) {
    for (std::int64_t i = global_thread(); i < out_elements; i += global_threads()) {
      with_type(out_type,
                [&](auto type) { static_cast<decltype(type)*>(out)[i] = decltype(type){}; });
    }
    return;
  }
  for_bags<Weight>(a, [&](const Feature& feature, const auto& tile, std::int64_t i) {
    const TableInfo& table = a.layout.tables[feature.table];
    const Bag bag = bag_of(a, feature, i);
    const bool mean = a.batch.mean && a.batch.pooled && bag.hi > bag.lo;
    const float bag_scale = mean ? 1.0f / static_cast<float>(bag.hi - bag.lo) : 1.0f;
    const std::int64_t element = feature.out_offset + i * feature.out_stride;
    sum_rows<Weight>(
        tile, rows_aligned<Weight>(table), in_global_memory(table.weight),
        [&](std::int64_t k) {
          Term term = row_at(a, table, feature.table, bag.lo + k);
          if (a.batch.per_sample_weights != nullptr) {
            term.scale *= a.batch.per_sample_weights[bag.lo + k];
          }
          return term;
        },
        bag.hi - bag.lo, feature.dim,
        [&](int c, auto& values, int valid) {
          constexpr int K = Packed<Weight>::count;
          COLDROW_LANES
          for (int k = 0; k < K; ++k) values[k] *= bag_scale;
          const std::uint32_t none[K] = {};
          with_type(out_type, [&](auto type) {
            auto* const to = static_cast<decltype(type)*>(out) + element + c;
            if (valid == K) {
              store(values, Nearest{}, none, to);
            } else {
              store_partial(values, Nearest{}, none, to, valid);
            }
          });
        });
  });
}

// out[p] = read factor * <gradient of the bag of p, weight row of p>.
template <Numeric Weight, class Read>
__global__ void __launch_bounds__(kThreads, kWeightGradientBlocks)
    weight_gradients(LookupArgs<Read> a, const void* grad, NumericType grad_type, float* out) {
  constexpr int K = Packed<Weight>::count;
  constexpr int kUnroll = 4;
  if (refused(a.report)) {
    for (std::int64_t p = global_thread(); p < a.batch.positions; p += global_threads()) {
      out[p] = 0.0f;
    }
    return;
  }
  for_bags<Weight>(a, [&](const Feature& feature, const auto& tile, std::int64_t i) {
    const TableInfo& table = a.layout.tables[feature.table];
    const Bag bag = bag_of(a, feature, i);
    const int dim = feature.dim;
    const bool aligned = rows_aligned<Weight>(table);
    const auto* const weight = static_cast<const Weight*>(in_global_memory(table.weight));
    const std::int64_t element = feature.out_offset + i * feature.out_stride;
    for (std::int64_t base = bag.lo; base < bag.hi; base += tile.lanes) {
      const int n = static_cast<int>(min_of<std::int64_t>(tile.lanes, bag.hi - base));
      Term mine{0, 0.0f};
      if (tile.rank() < n) mine = row_at(a, table, feature.table, base + tile.rank());
      float dot = 0.0f;  // of position base + rank
      for (int j = 0; j < n; j += kUnroll) {
        Lanes<K> acc[kUnroll];
        const Weight* rows[kUnroll];
        COLDROW_LANES
        for (int u = 0; u < kUnroll; ++u) {
          broadcast(acc[u], 0.0f);
          rows[u] = weight + tile.from(mine.row, min_of(j + u, n - 1));
        }
        for (int c = tile.rank() * K; c < dim; c += tile.lanes * K) {
          Lanes<K> g;
          with_type(grad_type, [&](auto type) {
            const auto* from = static_cast<const decltype(type)*>(grad) + element + c;
            if (c + K <= dim) {
              load(g, from);
            } else {
              load_partial(g, from, dim - c);
            }
          });
          Packed<Weight> w[kUnroll];
          COLDROW_LANES
          for (int u = 0; u < kUnroll; ++u) {
            if (aligned) {
              w[u].template load<true>(rows[u], c, dim);
            } else {
              w[u].template load<false>(rows[u], c, dim);
            }
          };
          COLDROW_LANES
          for (int u = 0; u < kUnroll; ++u) {
            COLDROW_LANES
            for (int k = 0; k < K; ++k) {
              acc[u].v[k] = math::fma(w[u].value(k), g.v[k], acc[u].v[k]);
            }
          }
        }
        COLDROW_LANES
        for (int u = 0; u < kUnroll; ++u) {
          const float total = tile.sum(coldrow::sum(acc[u]));
          if (tile.rank() == j + u) dot = total;
        }
      }
      if (tile.rank() < n) out[base + tile.rank()] = mine.scale * dot;
    }
  });
}

}  // namespace kernel

// ---------------------------------------------------------------------------------------- drivers

// Features whose tables have weights of one type, in device memory.
struct FeatureGroup {
  const std::int32_t* numbers = nullptr;
  std::int32_t count = 0;
};

// first_block: [count + 1] of the workspace; one serves all groups in turn.
template <Numeric Weight, class Read>
LookupArgs<Read> deal_lookup(Queue& queue, const FeatureGroup& group, const Batch& batch,
                             const Layout& layout, const Read* reads, const Report* report,
                             std::int32_t* first_block, const TileLaunch& choice) {
  const LookupArgs<Read> a{
      batch,         layout,
      group.numbers, {first_block, group.count, choice.launch.threads, choice.rounds},
      reads,         report};
  queue.run(kernel::deal_bags<Weight, Read>, Launch{1, 32, 0}, a, first_block);
  return a;
}

inline TileLaunch choose_lookup(const Batch& batch, const FeatureGroup& group, Machine machine) {
  return choose_tiles(batch.pooled ? batch.bags : batch.positions, group.count, kThreads, machine);
}

// Writes the output rows of a group's features. reads: one per table, of prepare_reads(), or null
// with Read = ReadStored. out_elements: of the whole output, which is zeroed where the batch was
// refused.
template <Numeric Weight, class Read>
void lookup(Queue& queue, const FeatureGroup& group, const Batch& batch, const Layout& layout,
            const Read* reads, const Report* report, void* out, NumericType out_type,
            std::int64_t out_elements, std::int32_t* first_block, Machine machine) {
  if (group.count == 0) return;
  const TileLaunch choice = choose_lookup(batch, group, machine);
  const auto a =
      deal_lookup<Weight>(queue, group, batch, layout, reads, report, first_block, choice);
  queue.run(kernel::lookup<Weight, Read>, choice.launch, a, out, out_type, out_elements);
}

// Writes out[p], the gradient of per_sample_weights, for the positions of a group's features. The
// batch's weights play no part; grad is the output's gradient, laid out as the output.
template <Numeric Weight, class Read>
void weight_gradients(Queue& queue, const FeatureGroup& group, const Batch& batch,
                      const Layout& layout, const Read* reads, const Report* report,
                      const void* grad, NumericType grad_type, float* out,
                      std::int32_t* first_block, Machine machine) {
  if (group.count == 0) return;
  const TileLaunch choice = choose_lookup(batch, group, machine);
  const auto a =
      deal_lookup<Weight>(queue, group, batch, layout, reads, report, first_block, choice);
  queue.run(kernel::weight_gradients<Weight, Read>, choice.launch, a, grad, grad_type, out);
}

}  // namespace device

COLDROW_END
