// The update of tables of one type behind function pointers: what the driver of several tables
// (table_batch.cuh) knows of policies, so that each optimizer is compiled in a translation unit of its own.
// The host's counterpart is host/rows.hpp.
#pragma once

#include <new>

#include "../policy/any_decay.hpp"
#include "../policy/builtin.hpp"
#include "../table/any.hpp"
#include "apply.cuh"

COLDROW_BEGIN

namespace device {

// One RowUpdate type. Tables, recipes and prepared updates are arrays of its own structs, known here
// by their sizes.
struct UpdateKernels {
  std::size_t table_bytes, recipe_bytes, update_bytes;
  // Make *table and *recipe, in host memory.
  void (*describe)(const AnyTable& args, Scalar<double> lr, OnNonfinite on_nonfinite, void* table,
                   void* recipe);
  std::int64_t (*sums_floats)(const Extent& extent);
  void (*prepare)(Queue& queue, const StepInputs& inputs, const void* recipes,
                  const std::int32_t* numbers, std::int32_t count, void* updates, Report* report);
  void (*apply)(Queue& queue, const void* tables, const std::int32_t* numbers, const void* updates,
                std::int32_t count, const Layout& layout, const Extent& extent,
                const Gradient& grad, const Entries& sorted, const Runs& runs,
                const ApplySpace& space, Pass pass, Report* report);
};

template <Numeric Weight, OptimizerPolicy Optimizer, RoundingPolicy Rounding>
struct CompiledUpdate {
  using Update = RowUpdate<Weight, float, Optimizer, AnyDecay, Rounding>;
  using TableType = TableOf<Update>;
  using RecipeType = Recipe<Update>;

  static void describe(const AnyTable& args, Scalar<double> lr, OnNonfinite on_nonfinite,
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
    Rounding rounding{};
    if constexpr (!std::is_empty_v<Rounding>) {
      rounding = *static_cast<const Rounding*>(args.update.rounding);
    }
    new (recipe) RecipeType{*static_cast<const Optimizer*>(args.update.optimizer),
                            *static_cast<const AnyDecay*>(args.update.decay),
                            rounding,
                            args.update.decay_state,
                            on_nonfinite,
                            lr};
  }
  static std::int64_t sums_floats(const Extent& extent) {
    return choose_apply<Update>(extent).workspace_floats;
  }
  static void prepare(Queue& queue, const StepInputs& inputs, const void* recipes,
                      const std::int32_t* numbers, std::int32_t count, void* updates,
                      Report* report) {
    prepare_updates(queue, inputs, static_cast<const RecipeType*>(recipes), numbers, count,
                    static_cast<Update*>(updates), report);
  }
  static void apply(Queue& queue, const void* tables, const std::int32_t* numbers,
                    const void* updates, std::int32_t count, const Layout& layout,
                    const Extent& extent, const Gradient& grad, const Entries& sorted,
                    const Runs& runs, const ApplySpace& space, Pass pass, Report* report) {
    const TableGroup<Update> group{static_cast<const TableType*>(tables), numbers,
                                   static_cast<const Update*>(updates), count};
    device::apply(queue, group, layout, extent, grad, sorted, runs, space, pass, report);
  }
  static constexpr UpdateKernels kernels{
      sizeof(TableType), sizeof(RecipeType), sizeof(Update), describe, sums_floats, prepare, apply};
};

// Of one optimizer: what AnyUpdate::optimizer_functions of a table on a device points to.
struct OptimizerUpdates {
  // By NumericType, then by the rounding's number.
  const UpdateKernels* of_type[StoredTypes::size][BuiltinRoundings::size];

  template <OptimizerPolicy Optimizer>
  static constexpr OptimizerUpdates of() {
    OptimizerUpdates u{};
    StoredTypes::for_each([&](auto weight) {
      BuiltinRoundings::for_each([&](auto rounding) {
        using Weight = typename decltype(weight)::type;
        using Rounding = typename decltype(rounding)::type;
        u.of_type[StoredTypes::number<Weight>][BuiltinRoundings::number<Rounding>] =
            &CompiledUpdate<Weight, Optimizer, RoundingOf<Weight, Rounding>>::kernels;
      });
    });
    return u;
  }
};

}  // namespace device

COLDROW_END
