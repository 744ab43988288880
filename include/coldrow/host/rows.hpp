// update_rows() behind two function pointers. Drivers that know of batches and gradients but not of
// policies use it: the Python module's, so that policies do not multiply them, and an optimizer
// compiled at run time needs no driver of its own.
#pragma once

#include "../policy/any_decay.hpp"
#include "../policy/builtin.hpp"
#include "../table/any.hpp"
#include "apply.hpp"

COLDROW_BEGIN

namespace host {

using coldrow::kMaxScalars;
using coldrow::kMaxVectors;

// One table and one step's update of it, as plain values. (Its layout is that of every build of the
// same version of these headers.)
struct RowsSpec {
  void* weight;  // [rows, dim]
  std::int64_t rows;
  std::int32_t dim;
  Strided<std::int32_t> prev_iter;
  Strided<float> scalars[kMaxScalars];
  float* vectors[kMaxVectors];
  ElementKey origin;
  const void* optimizer;  // the policy's struct
  AnyDecay decay;
  const void* rounding;  // the policy's struct; of one without fields it is not read
  double lr;
  std::int32_t step, epoch_start;
  bool decay_state;
  OnNonfinite on_nonfinite;
};

// The functions of one composition. make() fills `bytes` bytes, aligned to 64, that run() takes.
struct RowsKernel {
  static constexpr std::size_t capacity = 1024;
  void (*make)(const RowsSpec& spec, void* made);
  RowMemory (*memory)(const void* made);
  void (*run)(const void* made, Pass pass, const RowGradient* rows, int count, ApplyReport& report);

  template <Numeric Weight, OptimizerPolicy Optimizer, RoundingPolicy Rounding>
  static constexpr RowsKernel of() {
    using Update = RowUpdate<Weight, float, Optimizer, AnyDecay, Rounding>;
    struct Made {
      Update update;
      Table<Weight, Optimizer> table;
    };
    static_assert(
        Optimizer::scalar_states <= kMaxScalars && Optimizer::vector_states <= kMaxVectors,
        "an optimizer has at most four scalar and four vector states");
    static_assert(sizeof(Made) <= capacity && alignof(Made) <= 64,
                  "the optimizer's fields, once prepared, do not fit");
    RowsKernel kernel;
    kernel.make = [](const RowsSpec& s, void* made) {
      Rounding rounding{};
      if constexpr (!std::is_empty_v<Rounding>) {
        rounding = *static_cast<const Rounding*>(s.rounding);
      }
      auto update = Update::at(s.step, s.lr, *static_cast<const Optimizer*>(s.optimizer), s.decay,
                               rounding, s.decay_state, s.epoch_start);
      update.on_nonfinite = s.on_nonfinite;
      Table<Weight, Optimizer> table;
      table.weight = static_cast<Weight*>(s.weight);
      table.rows = s.rows;
      table.dim = s.dim;
      table.prev_iter = s.prev_iter;
      for (int i = 0; i < Optimizer::scalar_states; ++i) table.scalars[i] = s.scalars[i];
      for (int i = 0; i < Optimizer::vector_states; ++i) table.vectors[i] = s.vectors[i];
      table.origin = s.origin;
      const Made m{update, table};
      __builtin_memcpy(made, &m, sizeof m);
    };
    kernel.memory = [](const void* made) {
      return RowMemory::of(static_cast<const Made*>(made)->table);
    };
    kernel.run = [](const void* made, Pass pass, const RowGradient* rows, int count,
                    ApplyReport& report) {
      const auto& m = *static_cast<const Made*>(made);
      update_rows(m.update, m.table, pass, rows, count, report);
    };
    return kernel;
  }
};

// The compositions of one optimizer: every stored type with every rounding.
struct OptimizerKernels {
  int scalar_states, vector_states;
  const char* state_names[kMaxScalars + kMaxVectors];
  // By NumericType, then by the rounding's number.
  RowsKernel of_type[StoredTypes::size][BuiltinRoundings::size];

  template <Numeric Weight, RoundingPolicy Rounding>
  constexpr const RowsKernel& of_pair() const {
    return of_type[StoredTypes::number<Weight>][BuiltinRoundings::number<Rounding>];
  }

  template <OptimizerPolicy Optimizer>
  static constexpr OptimizerKernels of() {
    OptimizerKernels k{Optimizer::scalar_states, Optimizer::vector_states, {}, {}};
    for (int i = 0; i < k.scalar_states + k.vector_states; ++i) {
      k.state_names[i] = state_name<Optimizer>(i);
    }
    StoredTypes::for_each([&](auto weight) {
      BuiltinRoundings::for_each([&](auto rounding) {
        using Weight = typename decltype(weight)::type;
        using Rounding = typename decltype(rounding)::type;
        k.of_type[StoredTypes::number<Weight>][BuiltinRoundings::number<Rounding>] =
            RowsKernel::of<Weight, Optimizer, RoundingOf<Weight, Rounding>>();
      });
    });
    return k;
  }
};

}  // namespace host

COLDROW_END
