// What the module _cuda asks of its kernels: plain structs, because the launchers are compiled by nvcc
// and know no Python. Calls put work on a stream and return: they neither wait nor copy anything back.
#pragma once

#include <coldrow/device/report.hpp>
#include <functional>
#include <vector>

#include "../kernels.hpp"

namespace coldrow_module::cuda {

// Where a call runs.
struct Place {
  int device;
  void* stream;
  void* report;  // kReportBytes, aligned to 8, all zeros at first
  // Device memory of that many bytes for the time of the call.
  std::function<void*(std::size_t)> allocate;
};

inline constexpr std::size_t kReportBytes = sizeof(coldrow::device::Report);

// What kernels read when they run. A null address: what the call itself says.
struct StepArgs {
  const std::int64_t* clock = nullptr;  // steps done; null: AnyBatch::step - 1
  const std::int64_t* epoch_start = nullptr;
  std::vector<const double*> lrs;  // one per table, or none: AnyTable::lr
};

struct UpdateCall {
  const void* grad;
  NumericType grad_type;
  const double* grad_scale;  // or null
  OnNonfinite on_nonfinite;
  bool check_step;          // refuse rows whose prev_iter is not before the step
  bool check_only;          // write nothing
  std::int64_t* clock;      // ticks; or null
  std::int64_t* nonfinite;  // rows skipped are added; null: the report counts them
};

// The error's text, or null.
using Error = const char*;

Error lookup(const AnyBatch& batch, const StepArgs& step, bool read, void* out,
             NumericType out_type, std::int64_t out_elements, const Place& place);
Error weight_gradients(const AnyBatch& batch, const StepArgs& step, bool read, const void* grad,
                       NumericType grad_type, float* out, const Place& place);
Error update(const AnyBatch& batch, const StepArgs& step, const UpdateCall& call,
             const Place& place);

// What the report says, copied to the host after all that is on the stream; a refusal is taken out.
Error take_report(const Place& place, coldrow::device::Report& found);

// The coldrow::device::OptimizerUpdates of a built-in optimizer, by its number.
const void* optimizer_functions(int number);

// A copy of host memory on a device, for as long as it is wanted. Waits.
Error copy_to_device(int device, const void* from, std::size_t bytes, void*& copy);
void free_on_device(int device, void* copy);

Error count_devices(int& count);

}  // namespace coldrow_module::cuda
