// Backward and update: for each run of equal rows, sum the gradients that reach the row and call the
// row update once.
//
// A tile of lanes takes a run. Long runs are summed before, in parts by many tiles, so what is left of
// them is a run of partial sums. The sum of a row's gradients has one fixed order (table/run.hpp), the
// host's, so results repeat bit for bit.
#pragma once

#include "gather.cuh"
#include "segment.cuh"
#include "step.cuh"
#include "work.cuh"

COLDROW_BEGIN

namespace device {

// The gradient of the output: rows where the features say.
struct Gradient {
  const void* data = nullptr;
  NumericType type = NumericType::float32;
  Scalar<double> scale{nullptr, 1.0};  // of the loss: sums are divided by it, in float32
};

template <class Update>
using TableOf = Table<typename Update::weight_type, typename Update::optimizer_type>;

// The sums of long runs' parts, [parts, stride].
struct Partials {
  float* data = nullptr;
  std::int64_t stride = 0;
  __device__ __forceinline__ float* row(std::int64_t part) const { return data + part * stride; }
};

// Gradient rows of one table.
struct GradientRows {
  const Feature* features;
  const std::int32_t* numbers;  // of the table's features, in order of first_row
  std::int32_t count;
  bool aligned;  // every row begins at a multiple of 16 bytes and is as long as one

  __device__ static GradientRows of(const Gradient& grad, const Layout& layout,
                                    std::int32_t table) {
    const std::int32_t first = layout.first_feature[table];
    GradientRows rows{layout.features, layout.features_by_table + first,
                      layout.first_feature[table + 1] - first,
                      reinterpret_cast<std::uintptr_t>(grad.data) % 16 == 0};
    for (std::int32_t i = 0; i < rows.count; ++i) {
      const Feature& f = layout.features[rows.numbers[i]];
      rows.aligned =
          rows.aligned && (f.out_offset | f.out_stride | f.dim) * size_of(grad.type) % 16 == 0;
    }
    return rows;
  }
  // The element at which an output row begins.
  __device__ __forceinline__ std::int64_t row(std::uint32_t out_row) const {
    const std::int32_t i = last_at_or_before(
        count, [&](std::int32_t k) { return features[numbers[k]].first_row; },
        static_cast<std::int64_t>(out_row));
    const Feature& f = features[numbers[i]];
    return f.out_offset + (out_row - f.first_row) * f.out_stride;
  }
  __device__ __forceinline__ Term term(const ScaledRow& payload) const {
    return {row(payload.out_row), payload.scale};
  }
};

// Parts that a slice of a long run has.
__device__ __forceinline__ std::int32_t parts_per_slice(const LongRun& run) {
  return static_cast<std::int32_t>(divide_up(run.parts, kMaxParts));
}

// What is left to sum of a long run: every step-th of its partial sums.
struct PartialRows {
  std::int32_t first, count, step;
};
__device__ __forceinline__ PartialRows partial_rows(const LongRun& run) {
  if (run.slices == 0) return {run.first_part, run.parts, 1};
  return {run.first_part, run.slices, parts_per_slice(run)};
}

template <class Update>
struct ApplyArgs {
  // What all tables have in common.
  Layout layout;
  Entries sorted;
  Runs runs;
  Gradient grad;
  Partials partials;
  Report* report;
  // The tables that this Update is for.
  const TableOf<Update>* tables;  // [deal.parts]
  const std::int32_t* numbers;    // [deal.parts], in the layout
  const Update* updates;          // [deal.parts], of prepare_updates()
  Deal deal;
  float* sums;  // of each tile, in the workspace; null: in shared memory
  std::int64_t sums_per_block;
  // Instead of updating, note rows that would have to be refused.
  bool check, check_stale, check_finite;
};

template <class Update>
struct BlockCommon {
  Update update;
  TableOf<Update> table;
  GradientRows gradients;
  float grad_scale;
};

namespace kernel {

// partials[part] = sum of the part's gradients, for the parts of all long runs.
template <class = void>
__global__ void sum_parts(Gradient grad, Layout layout, Entries sorted, Runs runs, int lanes,
                          Partials partials, const Report* report) {
  if (refused(report)) return;
  const Tile<4> tile{lanes};
  const std::int32_t parts = runs.counts->parts;
  for (std::int64_t j = global_thread() / lanes; j < parts; j += global_threads() / lanes) {
    const std::int32_t l = last_at_or_before(
        runs.counts->long_runs, [&](std::int32_t i) { return runs.long_runs[i].first_part; },
        static_cast<std::int32_t>(j));
    const LongRun run = runs.long_runs[l];
    const std::int64_t begin = run.begin + (j - run.first_part) * kPart;
    const std::int64_t count = min_of<std::int64_t>(kPart, run.end - begin);
    const std::int32_t table = table_of(layout, sorted.key(begin));
    const GradientRows rows = GradientRows::of(grad, layout, table);
    float* const out = partials.row(j);
    with_type(grad.type, [&](auto type) {
      sum_rows<decltype(type)>(
          tile, rows.aligned, grad.data,
          [&](std::int64_t i) { return rows.term(sorted.payload(begin + i)); }, count,
          layout.tables[table].dim,
          [&](int c, const auto& values, int valid) { store_floats(out, c, values, valid); });
    });
  }
}

// Sums each slice's parts into the first of them, which no other slice reads.
template <class = void>
__global__ void sum_slices(Layout layout, Entries sorted, Runs runs, int lanes, Partials partials,
                           const Report* report) {
  if (refused(report)) return;
  const Tile<4> tile{lanes};
  const std::int32_t slices = runs.counts->slices;
  for (std::int64_t j = global_thread() / lanes; j < slices; j += global_threads() / lanes) {
    const std::int32_t l = last_at_or_before(
        runs.counts->long_runs, [&](std::int32_t i) { return runs.long_runs[i].first_slice; },
        static_cast<std::int32_t>(j));
    const LongRun run = runs.long_runs[l];
    const std::int32_t size = parts_per_slice(run);
    const std::int64_t first = (j - run.first_slice) * size;
    const std::int64_t count = min_of<std::int64_t>(size, run.parts - first);
    float* const out = partials.row(run.first_part + first);
    const int dim = layout.tables[table_of(layout, sorted.key(run.begin))].dim;
    sum_rows<float>(
        tile, dim % 4 == 0, out, [&](std::int64_t i) { return Term{i * partials.stride, 1.0f}; },
        count, dim,
        [&](int c, const auto& values, int valid) { store_floats(out, c, values, valid); });
  }
}

// Which blocks work on which table. One warp.
template <class Update>
__global__ void deal_runs(ApplyArgs<Update> a, std::int32_t* first_block) {
  constexpr int kBlock = block_for(sizeof(typename Update::weight_type));
  deal_blocks(
      a.deal,
      [&](std::int32_t i) {
        const std::int32_t t = a.numbers[i];
        return std::int64_t{a.runs.table_run[t + 1]} - a.runs.table_run[t];
      },
      [&](std::int32_t i) { return update_lanes_for(a.tables[i].dim, kBlock); }, first_block);
}

// A run, read in good time: where it is, then what its first entry says.
struct RunBounds {
  std::int32_t begin = 0, end = 0;
};
struct RunHead {
  std::int64_t row = 0;  // of its table
  std::uint32_t out_row = 0;
};

template <class Update>
__global__ void __launch_bounds__(kThreads, apply_blocks(Update::optimizer_type::vector_states))
    apply(ApplyArgs<Update> a) {
  using Weight = typename Update::weight_type;
  using Optimizer = typename Update::optimizer_type;
  static_assert(std::same_as<typename Update::grad_type, float>, "gradients are summed in float32");
  constexpr int kBlock = block_for(sizeof(Weight));
  // A check pass notes refusals of its own; those of others must not depend on which block is first.
  if (a.check ? refused_before(a.report, Refusal::stale_row) : refused(a.report)) return;

  // What is the same for the whole block is in shared memory: registers are what limits the number of
  // rows under way.
  auto& common = *reinterpret_cast<BlockCommon<Update>*>(shared_memory());
  const auto& update = common.update;
  const auto& table = common.table;
  const auto& gradients = common.gradients;
  float* const shared_sums =
      reinterpret_cast<float*>(shared_memory() + round_up_16(sizeof(BlockCommon<Update>)));
  float* const sums = a.sums == nullptr ? shared_sums : a.sums + blockIdx.x * a.sums_per_block;

  const auto lanes_of = [&](std::int32_t i) { return update_lanes_for(a.tables[i].dim, kBlock); };
  const std::int32_t blocks = a.deal.blocks();
  for (auto block = static_cast<std::int32_t>(blockIdx.x); block < blocks;
       block += static_cast<std::int32_t>(gridDim.x)) {
    const Share share = share_of(a.deal, block, lanes_of);
    __syncthreads();  // nobody needs the last share's any more
    const std::int32_t number = a.numbers[share.part];
    copy_to_shared(&common.update, a.updates + share.part);
    copy_to_shared(&common.table, a.tables + share.part);
    if (threadIdx.x == 0) {
      common.gradients = GradientRows::of(a.grad, a.layout, number);
      common.grad_scale = static_cast<float>(a.grad.scale.get());
    }
    __syncthreads();
    const std::int64_t base = a.layout.table_base[number];
    const std::int64_t first_run = a.runs.table_run[number];
    const std::int64_t last_run =
        min_of<std::int64_t>(first_run + share.last, a.runs.table_run[number + 1]);
    const int dim = table.dim;
    const Tile<kBlock> tile{update_lanes_for(dim, kBlock)};
    const int tiles = a.deal.threads / tile.lanes;
    float* const sum = sums + tile.number() * sum_stride(dim);

    const auto bounds_of = [&](std::int64_t r) {
      return r < last_run ? RunBounds{a.runs.begin[r], a.runs.begin[r + 1]} : RunBounds{};
    };
    const auto head_of = [&](const RunBounds& run) {
      if (run.end == 0) return RunHead{};
      return RunHead{static_cast<std::int64_t>(a.sorted.key(run.begin)) - base,
                     a.sorted.payload(run.begin).out_row};
    };
    const auto fetch_rows = [&](const RunBounds& run, const RunHead& head) {
      if (run.end == 0) return;
      const auto row = table.row(head.row);
      prefetch(row.prev_iter);
      for (int s = 0; s < Optimizer::scalar_states; ++s) prefetch(row.scalars[s]);
      const auto* grad = static_cast<const unsigned char*>(a.grad.data) +
                         gradients.row(head.out_row) * size_of(a.grad.type);
      for (int c = tile.rank() * kBlock; c < dim; c += tile.lanes * kBlock) {
        prefetch(row.weight + c);
        for (int s = 0; s < Optimizer::vector_states; ++s) prefetch(row.vectors[s] + c);
        prefetch(grad + c * size_of(a.grad.type));
      }
    };

    // Three runs are under way: of the one after the next its place is known, of the next its rows
    // are being fetched, one is worked on.
    std::int64_t r = first_run + share.first + tile.number();
    RunBounds run = bounds_of(r);
    RunBounds next = bounds_of(r + tiles);
    RunBounds after = bounds_of(r + 2 * tiles);
    RunHead head = head_of(run);
    RunHead next_head = head_of(next);
    for (; r < last_run; r += tiles) {
      const RunBounds far = bounds_of(r + 3 * tiles);
      const RunHead after_head = head_of(after);
      fetch_rows(next, next_head);

      const bool is_long = run.end - run.begin > kLongRun;
      PartialRows partial{};
      if (is_long) partial = partial_rows(a.runs.long_runs[long_run_at(a.runs, run.begin)]);
      with_type(is_long ? NumericType::float32 : a.grad.type, [&](auto type) {
        sum_rows<decltype(type)>(
            tile, is_long ? dim % 4 == 0 : gradients.aligned,
            is_long ? a.partials.data : a.grad.data,
            [&](std::int64_t i) {
              if (is_long)
                return Term{(partial.first + i * partial.step) * a.partials.stride, 1.0f};
              return gradients.term(a.sorted.payload(run.begin + i));
            },
            is_long ? partial.count : run.end - run.begin, dim,
            [&](int c, auto& values, int valid) {
              if (const float scale = common.grad_scale; scale != 1.0f) {
                for (auto& x : values) x /= scale;
              }
              store_floats(sum, c, values, valid);
            });
      });
      tile.sync();

      auto row = table.row(head.row);
      row.weight = in_global_memory(row.weight);
      row.prev_iter = in_global_memory(row.prev_iter);
      for (int s = 0; s < Optimizer::scalar_states; ++s) {
        row.scalars[s] = in_global_memory(row.scalars[s]);
      }
      for (int s = 0; s < Optimizer::vector_states; ++s) {
        row.vectors[s] = in_global_memory(row.vectors[s]);
      }
      if (a.check) {
        const auto key = static_cast<std::uint64_t>(base + head.row);
        const bool stale = a.check_stale && *row.prev_iter >= update.step;
        const bool finite = update.finite(tile, row, sum, dim);
        const bool bad = a.check_finite && !finite;
        if (tile.rank() == 0 && (stale || bad)) {
          note(a.report, stale ? Refusal::stale_row : Refusal::nonfinite_row, key);
          atomicAdd(&a.report->rows, 1ull);
        }
      } else if (!update(tile, row, sum, dim, table.key(head.row)) && tile.rank() == 0) {
        atomicAdd(&a.report->nonfinite_rows, 1ull);
      }
      tile.sync();  // the next sum goes where this one is

      run = next;
      next = after;
      after = far;
      head = next_head;
      next_head = after_head;
    }
  }
}

}  // namespace kernel

// ---------------------------------------------------------------------------------------- drivers

// What apply() works in, beside the segments. One serves the groups of all Update types in turn.
struct ApplySpace {
  Partials partials;
  std::int32_t* first_block = nullptr;
  float* sums = nullptr;
};

// The launch for Update's tables.
template <class Update>
ApplyLaunch choose_apply(const Extent& e) {
  return choose_apply(min_of(e.positions, e.total_rows), e.num_tables, e.widest,
                      block_for(sizeof(typename Update::weight_type)),
                      round_up_16(sizeof(BlockCommon<Update>)), e.machine);
}

// sums_floats: the largest workspace_floats of choose_apply<Update>() of the Updates in use.
inline ApplySpace take_apply_space(Workspace& w, const Extent& e, std::int64_t sums_floats) {
  ApplySpace s;
  s.partials.stride = sum_stride(e.widest);
  s.partials.data = w.take<float>(most_parts(e.positions) * s.partials.stride);
  s.first_block = w.take<std::int32_t>(e.num_tables + 1);
  s.sums = w.take<float>(sums_floats);
  return s;
}

// Sums the parts of long runs; once per batch, before apply().
inline void sum_long_runs(Queue& queue, const Layout& layout, const Extent& e, const Gradient& grad,
                          const Entries& sorted, const Runs& runs, const ApplySpace& space,
                          const Report* report) {
  const std::int64_t parts = most_parts(e.positions);
  if (parts == 0) return;
  const int lanes = lanes_for(e.widest, 4);
  queue.run(kernel::sum_parts<>, choose_flat(parts * lanes, e.machine), grad, layout, sorted, runs,
            lanes, space.partials, report);
  if (parts > kMaxParts) {
    queue.run(kernel::sum_slices<>, choose_flat(parts * lanes, e.machine), layout, sorted, runs,
              lanes, space.partials, report);
  }
}

// The tables one Update is for: views, numbers in the layout, and prepared updates, in device memory.
template <class Update>
struct TableGroup {
  const TableOf<Update>* tables = nullptr;
  const std::int32_t* numbers = nullptr;
  const Update* updates = nullptr;
  std::int32_t count = 0;
};

enum class Pass : std::int32_t {
  check_stale = 1,   // note rows whose prev_iter is not before the step; write nothing
  check_finite = 2,  // note rows whose update would not be finite; write nothing
  check_both = 3,
  update = 4,
};

// Updates (or checks) the rows of a group's tables.
template <class Update>
void apply(Queue& queue, const TableGroup<Update>& group, const Layout& layout, const Extent& e,
           const Gradient& grad, const Entries& sorted, const Runs& runs, const ApplySpace& space,
           Pass pass, Report* report) {
  if (group.count == 0 || e.positions == 0) return;
  const ApplyLaunch choice = choose_apply<Update>(e);
  ApplyArgs<Update> a{};
  a.layout = layout;
  a.sorted = sorted;
  a.runs = runs;
  a.grad = grad;
  a.partials = space.partials;
  a.report = report;
  a.tables = group.tables;
  a.numbers = group.numbers;
  a.updates = group.updates;
  a.deal = {space.first_block, group.count, choice.launch.threads, choice.rounds};
  a.sums = choice.sums_in_workspace ? space.sums : nullptr;
  a.sums_per_block = choice.workspace_floats / choice.launch.blocks;
  a.check = pass != Pass::update;
  a.check_stale = (static_cast<int>(pass) & static_cast<int>(Pass::check_stale)) != 0;
  a.check_finite = (static_cast<int>(pass) & static_cast<int>(Pass::check_finite)) != 0;
  queue.run(kernel::deal_runs<Update>, Launch{1, 32, 0}, a, space.first_block);
  queue.run(kernel::apply<Update>, choice.launch, a);
}

}  // namespace device

COLDROW_END
