// What the module asks of its kernels: one build of the drivers in coldrow/host/table_batch.hpp, per
// instruction set. What goes in and out are the structs of coldrow/table/any.hpp, which are the same
// for every build. Nothing else of coldrow is included here: its other types carry the name of the
// build they belong to.
#pragma once

#include <coldrow/table/any.hpp>
#include <cstddef>
#include <cstdint>

namespace coldrow_module {

using coldrow::AnyBatch;
using coldrow::AnyTable;
using coldrow::AnyUpdate;
using coldrow::BatchProblem;
using coldrow::Feature;
using coldrow::IndexType;
using coldrow::kMaxScalars;
using coldrow::kMaxVectors;
using coldrow::NumericType;
using coldrow::UpdateReport;

// As Python has it. ("raise": look for such rows first, and write nothing where there are any.)
enum class OnNonfinite : std::int32_t { raise, skip, propagate };

// One build of kernels.cpp.
struct Kernels {
  const char* name;
  // The coldrow::host::OptimizerKernels of a built-in optimizer, by its number: what
  // AnyUpdate::optimizer_functions is to be while this build works on the table.
  const void* (*optimizer)(int number);
  // Offsets, then indices. Call it before anything else; the others trust the batch.
  BatchProblem (*check_batch)(const AnyBatch& batch);
  // Forward. read: charge the decay owed by each row read. workspace: lookup_bytes().
  std::size_t (*lookup_bytes)(const AnyBatch& batch, bool read);
  void (*lookup)(const AnyBatch& batch, bool read, void* out, NumericType out_type,
                 void* workspace);
  // Gradient of per_sample_weights: out [positions].
  void (*weight_gradients)(const AnyBatch& batch, bool read, const void* grad,
                           NumericType grad_type, float* out, void* workspace);
  // Backward and update. check_step: refuse rows whose prev_iter is not before step. check_only:
  // look for what would be refused and write nothing.
  std::size_t (*update_bytes)(const AnyBatch& batch);
  UpdateReport (*update)(const AnyBatch& batch, const void* grad, NumericType grad_type,
                         OnNonfinite on_nonfinite, bool check_step, bool check_only,
                         void* workspace);
  // The factor of a touch at `step` (prev_iter 0: first touch) or of a read before it.
  float (*factor)(const AnyUpdate& update, std::int32_t prev_iter, std::int32_t step, double lr,
                  std::int32_t epoch_start, bool read);
};

// Builds this machine can run, best first, ended by null.
const Kernels* const* available_kernels();

}  // namespace coldrow_module
