// The step as a device sees it. Clock, learning rate and epoch are read by a kernel, so that neither
// a captured graph nor a compiled program freezes them: each replay sees what they are by then.
#pragma once

#include "batch.cuh"

COLDROW_BEGIN

namespace device {

// A number that lies in device memory, or, where address is null, is given.
template <class T>
struct Scalar {
  const T* address = nullptr;
  T value{};
  COLDROW_HD T get() const { return address != nullptr ? *address : value; }
};

struct StepInputs {
  Scalar<std::int64_t> clock{};        // steps done; this one is clock + 1
  Scalar<std::int64_t> epoch_start{};  // first step of the running epoch, 0: none was declared
};

// What RowUpdate::at() makes the update of one step from, for one table.
template <class Update>
struct Recipe;

template <Numeric Weight, Numeric Grad, OptimizerPolicy Optimizer, DecayPolicy Decay,
          RoundingPolicy Rounding>
struct Recipe<RowUpdate<Weight, Grad, Optimizer, Decay, Rounding>> {
  using Update = RowUpdate<Weight, Grad, Optimizer, Decay, Rounding>;
  Optimizer optimizer{};
  Decay decay{};
  Rounding rounding{};
  bool decay_state = false;
  OnNonfinite on_nonfinite = OnNonfinite::skip;
  Scalar<double> lr{};

  COLDROW_HD Update at(std::int32_t step, std::int32_t epoch_start) const {
    Update update =
        Update::at(step, lr.get(), optimizer, decay, rounding, decay_state, epoch_start);
    update.on_nonfinite = on_nonfinite;
    return update;
  }
};

// What a read-charged lookup needs of a table's update.
template <DecayPolicy Decay>
struct ReadRecipe {
  Decay decay{};
  Scalar<double> lr{};
};
template <DecayPolicy Decay>
struct ReadStep {
  Prepared<Decay> decay;  // as of step - 1
  std::int64_t step;
  float lr;

  COLDROW_HD float factor(std::int32_t prev_iter) const {
    return read_factor(decay, step, prev_iter, lr);
  }
};

// Is the step one that there is? There is a read after the last step too. Notes what is wrong.
__device__ inline bool check_step(const StepInputs& inputs, double lr, bool read,
                                  std::uint64_t table, Report* report) {
  const std::int64_t clock = inputs.clock.get();
  const std::int64_t epoch_start = inputs.epoch_start.get();
  const bool step_good = clock >= 0 && clock < std::int64_t{kLastStep} + (read ? 1 : 0);
  const bool lr_good = lr >= 0.0 && lr <= 3.4e38;
  const bool epoch_good = epoch_start >= 0 && epoch_start <= kLastStep;
  if (!step_good) note(report, Refusal::step_range, static_cast<std::uint64_t>(clock));
  if (!lr_good) note(report, Refusal::lr_range, table);
  if (!epoch_good) note(report, Refusal::epoch_start_range, 0);
  return step_good && lr_good && epoch_good;
}

namespace kernel {

template <class Update>
__global__ void prepare_updates(StepInputs inputs, const Recipe<Update>* recipes,
                                const std::int32_t* tables, std::int32_t count, Update* updates,
                                Report* report) {
  for (std::int64_t i = global_thread(); i < count; i += global_threads()) {
    const Recipe<Update>& recipe = recipes[i];
    if (check_step(inputs, recipe.lr.get(), false, static_cast<std::uint64_t>(tables[i]), report)) {
      updates[i] = recipe.at(static_cast<std::int32_t>(inputs.clock.get() + 1),
                             static_cast<std::int32_t>(inputs.epoch_start.get()));
    }
  }
}

template <DecayPolicy Decay>
__global__ void prepare_reads(StepInputs inputs, const ReadRecipe<Decay>* recipes,
                              std::int32_t count, ReadStep<Decay>* steps, Report* report) {
  for (std::int64_t t = global_thread(); t < count; t += global_threads()) {
    const double lr = recipes[t].lr.get();
    if (!check_step(inputs, lr, true, static_cast<std::uint64_t>(t), report)) continue;
    const std::int64_t clock = inputs.clock.get();
    steps[t] = {prepare(recipes[t].decay, static_cast<std::int32_t>(clock), lr,
                        static_cast<std::int32_t>(inputs.epoch_start.get())),
                clock + 1, static_cast<float>(lr)};
  }
}

}  // namespace kernel

// updates[i] = what recipes[i] is at this step, for the table with number tables[i]. A step, lr or
// epoch out of range refuses the batch.
template <class Update>
void prepare_updates(Queue& queue, const StepInputs& inputs, const Recipe<Update>* recipes,
                     const std::int32_t* tables, std::int32_t count, Update* updates,
                     Report* report) {
  queue.run(kernel::prepare_updates<Update>, choose_flat(count, {}), inputs, recipes, tables, count,
            updates, report);
}

// steps[t] = what recipes[t] is for a lookup before the next step; one per table.
template <DecayPolicy Decay>
void prepare_reads(Queue& queue, const StepInputs& inputs, const ReadRecipe<Decay>* recipes,
                   std::int32_t count, ReadStep<Decay>* steps, Report* report) {
  queue.run(kernel::prepare_reads<Decay>, choose_flat(count, {}), inputs, recipes, count, steps,
            report);
}

}  // namespace device

COLDROW_END
