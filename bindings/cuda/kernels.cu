// The device drivers (coldrow/device/table_batch.cuh) for the module: on which device they run, and what the
// runtime says of it.
#include "kernels.hpp"

#include <coldrow/device/table_batch.cuh>
#include <mutex>
#include <vector>

#include "update.cuh"

namespace coldrow_module::cuda {
namespace {

namespace device = coldrow::device;

static_assert(sizeof(device::Report) == kReportBytes);
// (CMake has counted the entries of the list, and written a file for each.)
static_assert(coldrow::BuiltinOptimizers::size == COLDROW_OPTIMIZERS);

// ------------------------------------------------------------------------------------------ device

// The device of a call is the current one for its duration.
class OnDevice {
 public:
  OnDevice(device::Queue& queue, int number) : queue_(queue) {
    queue.add(cudaGetDevice(&before_));
    changed_ = queue.error == cudaSuccess && before_ != number;
    if (changed_) queue.add(cudaSetDevice(number));
  }
  ~OnDevice() {
    if (changed_) queue_.add(cudaSetDevice(before_));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  device::Queue& queue_;
  int before_ = 0;
  bool changed_ = false;
};

device::Machine machine_of(device::Queue& queue, int number) {
  static std::mutex mutex;
  static std::vector<int> known;
  const std::lock_guard lock(mutex);
  const auto i = static_cast<std::size_t>(number);
  if (known.size() <= i) known.resize(i + 1);
  if (known[i] == 0) {
    queue.add(cudaDeviceGetAttribute(&known[i], cudaDevAttrMultiProcessorCount, number));
  }
  return {coldrow::max_of(1, known[i])};
}

Error text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

device::Report* report_of(const Place& place) { return static_cast<device::Report*>(place.report); }

device::StepAddresses addresses(const StepArgs& step) {
  return {step.clock, step.epoch_start, step.lrs.empty() ? nullptr : step.lrs.data()};
}

}  // namespace

// --------------------------------------------------------------------------------------- interface

Error lookup(const AnyBatch& b, const StepArgs& step, bool read, void* out, NumericType out_type,
             std::int64_t out_elements, const Place& place) {
  device::Queue queue(static_cast<cudaStream_t>(place.stream));
  const OnDevice guard(queue, place.device);
  const device::Machine machine = machine_of(queue, place.device);
  device::lookup(queue, b, addresses(step), read, out, out_type, out_elements, report_of(place),
                 machine, place.allocate);
  return text(queue.error);
}

Error weight_gradients(const AnyBatch& b, const StepArgs& step, bool read, const void* grad,
                       NumericType grad_type, float* out, const Place& place) {
  device::Queue queue(static_cast<cudaStream_t>(place.stream));
  const OnDevice guard(queue, place.device);
  const device::Machine machine = machine_of(queue, place.device);
  device::weight_gradients(queue, b, addresses(step), read, grad, grad_type, out, report_of(place),
                           machine, place.allocate);
  return text(queue.error);
}

Error update(const AnyBatch& b, const StepArgs& step, const UpdateCall& call, const Place& place) {
  device::Queue queue(static_cast<cudaStream_t>(place.stream));
  const OnDevice guard(queue, place.device);
  const device::Machine machine = machine_of(queue, place.device);
  device::UpdateOptions options;
  options.on_nonfinite = call.on_nonfinite == OnNonfinite::propagate
                             ? coldrow::OnNonfinite::propagate
                             : coldrow::OnNonfinite::skip;
  options.refuse_nonfinite = call.on_nonfinite == OnNonfinite::raise;
  options.refuse_stale = call.check_step;
  options.check_only = call.check_only;
  options.clock = call.clock;
  options.nonfinite = call.nonfinite;
  const device::Gradient grad{call.grad, call.grad_type, {call.grad_scale, 1.0}};
  device::update(queue, b, addresses(step), grad, options, report_of(place), machine,
                 place.allocate);
  return text(queue.error);
}

Error take_report(const Place& place, device::Report& found) {
  device::Queue queue(static_cast<cudaStream_t>(place.stream));
  const OnDevice guard(queue, place.device);
  found = {};
  if (queue.error == cudaSuccess) {
    queue.add(
        cudaMemcpyAsync(&found, place.report, sizeof found, cudaMemcpyDeviceToHost, queue.stream));
  }
  if (queue.error == cudaSuccess) queue.add(cudaStreamSynchronize(queue.stream));
  if (queue.error == cudaSuccess && found.kind != device::Refusal::none) {
    queue.add(cudaMemsetAsync(&report_of(place)->kind, 0, sizeof found.kind, queue.stream));
  }
  return text(queue.error);
}

const void* optimizer_functions(int number) {
  return coldrow::with_type_at<coldrow::BuiltinOptimizers>(
      number, [](auto one) -> const void* { return &updates_of<typename decltype(one)::type>(); });
}

Error copy_to_device(int device, const void* from, std::size_t bytes, void*& copy) {
  device::Queue queue(nullptr);
  const OnDevice guard(queue, device);
  copy = nullptr;
  if (queue.error != cudaSuccess) return text(queue.error);
  queue.add(cudaMalloc(&copy, bytes));
  if (queue.error != cudaSuccess) return text(queue.error);
  queue.add(cudaMemcpyAsync(copy, from, bytes, cudaMemcpyHostToDevice, queue.stream));
  // (cudaMemcpy may return while the device still copies, and other streams do not wait for this one.)
  if (queue.error == cudaSuccess) queue.add(cudaStreamSynchronize(queue.stream));
  if (queue.error != cudaSuccess) {
    queue.add(cudaFree(copy));
    copy = nullptr;
  }
  return text(queue.error);
}

void free_on_device(int device, void* copy) {
  device::Queue queue(nullptr);
  const OnDevice guard(queue, device);
  if (queue.error == cudaSuccess) queue.add(cudaFree(copy));
}

Error count_devices(int& count) {
  count = 0;
  device::Queue queue(nullptr);
  queue.add(cudaGetDeviceCount(&count));
  return text(queue.error);
}

}  // namespace coldrow_module::cuda
