// update_rows() behind two function pointers. Drivers that know of batches and gradients but not of
// policies use it: the Python module's, so that policies do not multiply them, and an optimizer
// compiled at run time needs no driver of its own.
#pragma once

#include "../policy/any_decay.hpp"
#include "apply.hpp"

COLDROW_BEGIN

namespace host {

inline constexpr int kMaxScalars = 4;
inline constexpr int kMaxVectors = 4;

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
  std::uint64_t seed;  // of stochastic rounding
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
      if constexpr (requires { rounding.seed; }) rounding.seed = s.seed;
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

// The compositions of one optimizer: every stored type with both roundings. (float32 is stored
// unrounded.)
struct OptimizerKernels {
  int scalar_states, vector_states;
  const char* state_names[kMaxScalars + kMaxVectors];
  RowsKernel f32, f16_nearest, f16_stochastic, bf16_nearest, bf16_stochastic;

  template <OptimizerPolicy Optimizer>
  static constexpr OptimizerKernels of() {
    OptimizerKernels k{Optimizer::scalar_states,
                       Optimizer::vector_states,
                       {},
                       RowsKernel::of<float, Optimizer, Nearest>(),
                       RowsKernel::of<half, Optimizer, Nearest>(),
                       RowsKernel::of<half, Optimizer, Stochastic>(),
                       RowsKernel::of<bfloat16, Optimizer, Nearest>(),
                       RowsKernel::of<bfloat16, Optimizer, Stochastic>()};
    for (int i = 0; i < k.scalar_states + k.vector_states; ++i) {
      k.state_names[i] = state_name<Optimizer>(i);
    }
    return k;
  }
};

}  // namespace host

COLDROW_END
