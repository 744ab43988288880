// The update of tables of one type behind function pointers, so that each optimizer is compiled in a
// translation unit of its own.
#pragma once

#include <coldrow/device/apply.cuh>
#include <coldrow/policy/rounding.hpp>
#include <new>

#include "../policies.hpp"

namespace coldrow_module::cuda {

// One RowUpdate type. Tables, recipes and prepared updates are arrays of its own structs, known here
// by their sizes.
struct UpdateKernels {
  std::size_t table_bytes, recipe_bytes, update_bytes;
  // Make *table and *recipe, in host memory.
  void (*describe)(const TableArgs& args, device::Scalar<double> lr, bool propagate, void* table,
                   void* recipe);
  std::int64_t (*sums_floats)(const device::Extent& extent);
  void (*prepare)(device::Queue& queue, const device::StepInputs& inputs, const void* recipes,
                  const std::int32_t* numbers, std::int32_t count, void* updates,
                  device::Report* report);
  void (*apply)(device::Queue& queue, const void* tables, const std::int32_t* numbers,
                const void* updates, std::int32_t count, const device::Layout& layout,
                const device::Extent& extent, const device::Gradient& grad,
                const device::Entries& sorted, const device::Runs& runs,
                const device::ApplySpace& space, device::Pass pass, device::Report* report);
};

template <class Optimizer>
Optimizer optimizer_of(const UpdateArgs& args) {
  Optimizer out{};
  with_optimizer(args, [&](const auto& made) {
    if constexpr (std::same_as<std::remove_cvref_t<decltype(made)>, Optimizer>) out = made;
  });
  return out;
}

template <class Rounding>
Rounding rounding_of(const UpdateArgs& args) {
  if constexpr (std::same_as<Rounding, Stochastic>) return Stochastic{args.seed};
  return Rounding{};
}

template <Numeric Weight, OptimizerPolicy Optimizer, RoundingPolicy Rounding>
struct Compiled {
  using Update = RowUpdate<Weight, float, Optimizer, AnyDecay, Rounding>;
  using TableType = device::TableOf<Update>;
  using Recipe = device::Recipe<Update>;

  static void describe(const TableArgs& args, device::Scalar<double> lr, bool propagate,
                       void* table, void* recipe) {
    auto& t = *new (table) TableType{};
    t.weight = static_cast<Weight*>(args.weight);
    t.rows = args.rows;
    t.dim = args.dim;
    t.prev_iter = {args.prev_iter, args.prev_iter_stride};
    for (int i = 0; i < Optimizer::scalar_states; ++i) {
      t.scalars[i] = {args.scalars[i], args.scalar_strides[i]};
    }
    for (int i = 0; i < Optimizer::vector_states; ++i) t.vectors[i] = args.vectors[i];
    t.origin = {args.key, args.row_offset, args.col_offset, 0};
    new (recipe) Recipe{optimizer_of<Optimizer>(args.update),
                        to_decay(args.update),
                        rounding_of<Rounding>(args.update),
                        args.update.decay_state,
                        propagate ? coldrow::OnNonfinite::propagate : coldrow::OnNonfinite::skip,
                        lr};
  }
  static std::int64_t sums_floats(const device::Extent& extent) {
    return device::choose_apply<Update>(extent).workspace_floats;
  }
  static void prepare(device::Queue& queue, const device::StepInputs& inputs, const void* recipes,
                      const std::int32_t* numbers, std::int32_t count, void* updates,
                      device::Report* report) {
    device::prepare_updates(queue, inputs, static_cast<const Recipe*>(recipes), numbers, count,
                            static_cast<Update*>(updates), report);
  }
  static void apply(device::Queue& queue, const void* tables, const std::int32_t* numbers,
                    const void* updates, std::int32_t count, const device::Layout& layout,
                    const device::Extent& extent, const device::Gradient& grad,
                    const device::Entries& sorted, const device::Runs& runs,
                    const device::ApplySpace& space, device::Pass pass, device::Report* report) {
    const device::TableGroup<Update> group{static_cast<const TableType*>(tables), numbers,
                                           static_cast<const Update*>(updates), count};
    device::apply(queue, group, layout, extent, grad, sorted, runs, space, pass, report);
  }
  static constexpr UpdateKernels kernels{
      sizeof(TableType), sizeof(Recipe), sizeof(Update), describe, sums_floats, prepare, apply};
};

// Of one optimizer: by stored type and rounding. (Of float32 nothing is rounded.)
struct OptimizerUpdates {
  const UpdateKernels *f32, *f16_nearest, *f16_stochastic, *bf16_nearest, *bf16_stochastic;

  template <OptimizerPolicy Optimizer>
  static constexpr OptimizerUpdates of() {
    return {&Compiled<float, Optimizer, Nearest>::kernels,
            &Compiled<half, Optimizer, Nearest>::kernels,
            &Compiled<half, Optimizer, Stochastic>::kernels,
            &Compiled<coldrow::bfloat16, Optimizer, Nearest>::kernels,
            &Compiled<coldrow::bfloat16, Optimizer, Stochastic>::kernels};
  }
};

// One per translation unit; in the order of OptimizerKind.
extern const OptimizerUpdates kSgd, kRowwiseRmsprop, kRowwiseAdagrad, kAdagrad, kAdam,
    kAdamByTouches, kPartialRowwiseAdam, kPartialRowwiseAdamByTouches;

}  // namespace coldrow_module::cuda
