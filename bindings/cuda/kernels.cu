// A call's descriptors and workspace, and the device drivers in their order (docs/device.md).
#include "kernels.hpp"

#include <coldrow/device/device.cuh>
#include <cstring>
#include <memory>
#include <mutex>

#include "update.cuh"

namespace coldrow_module::cuda {
namespace {

using device::Scalar;
using device::Workspace;

static_assert(sizeof(device::Report) == kReportBytes);
static_assert(static_cast<int>(device::Refusal::nonfinite_row) ==
              static_cast<int>(Refusal::nonfinite_row));

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
  return {max_of(1, known[i])};
}

Error text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

device::Report* report_of(const Place& place) { return static_cast<device::Report*>(place.report); }

// ------------------------------------------------------------------------------------- descriptors

// What the host composes for the device: one block of bytes, brought there by one upload(). Pieces are
// named by their places until it is known where the block will lie.
class Descriptors {
 public:
  template <class T>
  struct Piece {
    std::size_t at = 0;
  };
  template <class T>
  Piece<T> put(const std::vector<T>& values) {
    return {put_bytes(values.data(), values.size() * sizeof(T))};
  }
  std::size_t put_bytes(const void* from, std::size_t count) {
    const std::size_t at = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(at + count);
    if (count > 0) std::memcpy(bytes_.data() + at, from, count);
    return at;
  }
  void place(Workspace& w) {
    device_ = w.take<unsigned char>(static_cast<std::int64_t>(bytes_.size()));
  }
  void* at(std::size_t place) const { return device_ + place; }
  template <class T>
  T* at(Piece<T> piece) const {
    return reinterpret_cast<T*>(device_ + piece.at);
  }
  void upload(device::Queue& queue) const {
    device::upload(queue, device_, bytes_.data(), bytes_.size());
  }

 private:
  std::vector<unsigned char> bytes_;
  unsigned char* device_ = nullptr;
};

constexpr device::NumericType kNumeric[] = {
    device::NumericType::float32, device::NumericType::float16, device::NumericType::bfloat16};
device::NumericType numeric(DType type) { return kNumeric[static_cast<int>(type)]; }

// What every call has: tables and features, as the device sees them.
struct Common {
  device::Batch batch;
  device::Extent extent;
  device::StepInputs inputs;
  Descriptors descriptors;
  Descriptors::Piece<device::TableInfo> tables;
  Descriptors::Piece<std::int64_t> base;
  Descriptors::Piece<Feature> features;
  Descriptors::Piece<std::int32_t> by_table, first_feature;

  Common(const BatchArgs& b, const StepArgs& step, device::Machine machine) {
    const bool wide = b.index_type == IndexType::i64;
    batch.indices = {b.indices, wide};
    batch.offsets = {b.offsets, wide};
    batch.bags = b.bags;
    batch.positions = b.positions;
    batch.pooled = b.pooled;
    batch.mean = b.mean;
    batch.per_sample_weights = b.per_sample_weights;
    inputs.clock = {step.clock, b.step - 1};
    inputs.epoch_start = {step.epoch_start, b.epoch_start};

    std::vector<device::TableInfo> infos;
    std::vector<std::int64_t> first_row{0};
    for (std::int32_t t = 0; t < b.num_tables; ++t) {
      const TableArgs& table = b.tables[t];
      infos.push_back(
          {table.weight, table.rows, table.dim, {table.prev_iter, table.prev_iter_stride}});
      first_row.push_back(first_row.back() + table.rows);
      extent.widest = max_of(extent.widest, table.dim);
    }
    std::vector<Feature> all;
    for (std::int32_t f = 0; f < b.num_features; ++f) all.push_back(to_feature(b.features[f]));
    std::vector<std::int32_t> grouped(all.size()), first(infos.size() + 1);
    device::group_features(all.data(), b.num_features, b.num_tables, grouped.data(), first.data());
    tables = descriptors.put(infos);
    base = descriptors.put(first_row);
    features = descriptors.put(all);
    by_table = descriptors.put(grouped);
    first_feature = descriptors.put(first);

    extent.positions = b.positions;
    extent.total_rows = first_row.back();
    extent.num_tables = b.num_tables;
    extent.scaled = b.per_sample_weights != nullptr || (b.mean && b.pooled);
    extent.machine = machine;
  }

  device::Layout layout(const BatchArgs& b) const {
    const Descriptors& d = descriptors;
    return {d.at(tables),   d.at(base),     b.num_tables,       d.at(features),
            b.num_features, d.at(by_table), d.at(first_feature)};
  }
};

Scalar<double> lr_of(const BatchArgs& b, const StepArgs& step, std::int32_t table) {
  const auto i = static_cast<std::size_t>(table);
  return {step.lrs.empty() ? nullptr : step.lrs[i], b.tables[table].lr};
}

// ------------------------------------------------------------------------------------------ lookup

using Read = device::ReadStep<AnyDecay>;

// The groups of features that a lookup launches for, by the type of their weights, and what is read
// with their rows.
struct LookupJob {
  Common common;
  Descriptors::Piece<std::int32_t> features[3];
  std::int32_t counts[3] = {};
  Descriptors::Piece<device::ReadRecipe<AnyDecay>> recipes{};
  Read* reads = nullptr;
  std::int32_t* first_block = nullptr;

  LookupJob(const BatchArgs& b, const StepArgs& step, bool read, device::Machine machine)
      : common(b, step, machine) {
    for (int type = 0; type < 3; ++type) {
      std::vector<std::int32_t> numbers;
      for (std::int32_t f = 0; f < b.num_features; ++f) {
        if (static_cast<int>(b.tables[b.features[f].table].dtype) == type) numbers.push_back(f);
      }
      counts[type] = static_cast<std::int32_t>(numbers.size());
      features[type] = common.descriptors.put(numbers);
    }
    if (!read) return;
    std::vector<device::ReadRecipe<AnyDecay>> all;
    for (std::int32_t t = 0; t < b.num_tables; ++t) {
      all.push_back({to_decay(b.tables[t].update), lr_of(b, step, t)});
    }
    recipes = common.descriptors.put(all);
  }

  std::size_t take(const BatchArgs& b, bool read, void* base) {
    Workspace w(base);
    common.descriptors.place(w);
    first_block = w.take<std::int32_t>(b.num_features + 1);
    reads = w.take<Read>(read ? b.num_tables : 0);
    return w.bytes();
  }
};

// Checks the batch and calls run(weight, group, layout, reads, job) for each type of weights.
template <class Run>
Error look_up(const BatchArgs& b, const StepArgs& step, bool read, bool count, const Place& place,
              const Run& run) {
  device::Queue queue(static_cast<cudaStream_t>(place.stream));
  const OnDevice guard(queue, place.device);
  const device::Machine machine = machine_of(queue, place.device);
  LookupJob job(b, step, read, machine);
  job.take(b, read, place.allocate(job.take(b, read, nullptr)));
  device::Report* const report = report_of(place);
  const device::Layout layout = job.common.layout(b);
  job.common.descriptors.upload(queue);
  device::begin_batch(queue, report, count);
  device::check_batch(queue, job.common.batch, layout, report, machine);
  if (read) {
    device::prepare_reads<AnyDecay>(queue, job.common.inputs,
                                    job.common.descriptors.at(job.recipes), b.num_tables, job.reads,
                                    report);
  }
  const auto group = [&](DType type) {
    const int i = static_cast<int>(type);
    return device::FeatureGroup{job.common.descriptors.at(job.features[i]), job.counts[i]};
  };
  const auto with_weight = [&](auto weight, DType type) {
    if (read) {
      run(queue, weight, group(type), layout, static_cast<const Read*>(job.reads), job);
    } else {
      run(queue, weight, group(type), layout, static_cast<const device::ReadStored*>(nullptr), job);
    }
  };
  with_weight(float{}, DType::f32);
  with_weight(half{}, DType::f16);
  with_weight(coldrow::bfloat16{}, DType::bf16);
  device::finish_batch(queue, job.common.batch, layout, report, nullptr);
  return text(queue.error);
}

// ------------------------------------------------------------------------------------------ update

const OptimizerUpdates& updates_of(OptimizerKind kind) {
  const OptimizerUpdates* const all[] = {
      &kSgd,  &kRowwiseRmsprop, &kRowwiseAdagrad,     &kAdagrad,
      &kAdam, &kAdamByTouches,  &kPartialRowwiseAdam, &kPartialRowwiseAdamByTouches};
  return *all[static_cast<int>(kind)];
}

const UpdateKernels* kernels_of(const TableArgs& table) {
  const OptimizerUpdates& k = updates_of(table.update.optimizer);
  const bool stochastic = table.update.rounding == RoundingKind::stochastic;
  switch (table.dtype) {
    case DType::f16:
      return stochastic ? k.f16_stochastic : k.f16_nearest;
    case DType::bf16:
      return stochastic ? k.bf16_stochastic : k.bf16_nearest;
    case DType::f32:
      break;
  }
  return k.f32;
}

// Tables that share a launch.
struct UpdateGroup {
  const UpdateKernels* kernels;
  std::int32_t count;
  std::size_t tables, recipes;  // in the descriptors
  Descriptors::Piece<std::int32_t> numbers;
  void* updates;
};

struct UpdateJob {
  Common common;
  std::vector<UpdateGroup> groups;
  std::int64_t sums_floats = 0;
  std::size_t sort_bytes = 0;
  device::SegmentSpace segments;
  device::ApplySpace space;

  UpdateJob(device::Queue& queue, const BatchArgs& b, const StepArgs& step, bool propagate,
            device::Machine machine)
      : common(b, step, machine) {
    queue.add(device::radix_sort_bytes(common.extent, sort_bytes));
    std::vector<bool> done(static_cast<std::size_t>(b.num_tables));
    for (std::int32_t t = 0; t < b.num_tables; ++t) {
      if (done[static_cast<std::size_t>(t)]) continue;
      const UpdateKernels* const k = kernels_of(b.tables[t]);
      std::vector<std::int32_t> numbers;
      for (std::int32_t other = t; other < b.num_tables; ++other) {
        if (kernels_of(b.tables[other]) != k) continue;
        numbers.push_back(other);
        done[static_cast<std::size_t>(other)] = true;
      }
      // (New memory is aligned for any of these structs.)
      const std::unique_ptr<unsigned char[]> tables(
          new unsigned char[numbers.size() * k->table_bytes]);
      const std::unique_ptr<unsigned char[]> recipes(
          new unsigned char[numbers.size() * k->recipe_bytes]);
      for (std::size_t i = 0; i < numbers.size(); ++i) {
        k->describe(b.tables[numbers[i]], lr_of(b, step, numbers[i]), propagate,
                    tables.get() + i * k->table_bytes, recipes.get() + i * k->recipe_bytes);
      }
      Descriptors& d = common.descriptors;
      groups.push_back({k, static_cast<std::int32_t>(numbers.size()),
                        d.put_bytes(tables.get(), numbers.size() * k->table_bytes),
                        d.put_bytes(recipes.get(), numbers.size() * k->recipe_bytes),
                        d.put(numbers), nullptr});
      sums_floats = max_of(sums_floats, k->sums_floats(common.extent));
    }
  }

  std::size_t take(void* base) {
    Workspace w(base);
    common.descriptors.place(w);
    for (UpdateGroup& g : groups) {
      g.updates =
          w.take<unsigned char>(g.count * static_cast<std::int64_t>(g.kernels->update_bytes));
    }
    segments = device::take_segment_space(w, common.extent, sort_bytes);
    space = device::take_apply_space(w, common.extent, sums_floats);
    return w.bytes();
  }
};

}  // namespace

// --------------------------------------------------------------------------------------- interface

Error lookup(const BatchArgs& b, const StepArgs& step, bool read, void* out, DType out_type,
             std::int64_t out_elements, const Place& place) {
  return look_up(b, step, read, true, place,
                 [&](device::Queue& queue, auto weight, const device::FeatureGroup& group,
                     const device::Layout& layout, const auto* reads, const LookupJob& job) {
                   device::lookup<decltype(weight)>(
                       queue, group, job.common.batch, layout, reads, report_of(place), out,
                       numeric(out_type), out_elements, job.first_block, job.common.extent.machine);
                 });
}

Error weight_gradients(const BatchArgs& b, const StepArgs& step, bool read, const void* grad,
                       DType grad_type, float* out, const Place& place) {
  return look_up(b, step, read, false, place,
                 [&](device::Queue& queue, auto weight, const device::FeatureGroup& group,
                     const device::Layout& layout, const auto* reads, const LookupJob& job) {
                   device::weight_gradients<decltype(weight)>(
                       queue, group, job.common.batch, layout, reads, report_of(place), grad,
                       numeric(grad_type), out, job.first_block, job.common.extent.machine);
                 });
}

Error update(const BatchArgs& b, const StepArgs& step, const UpdateCall& call, const Place& place) {
  device::Queue queue(static_cast<cudaStream_t>(place.stream));
  const OnDevice guard(queue, place.device);
  const device::Machine machine = machine_of(queue, place.device);
  UpdateJob job(queue, b, step, call.on_nonfinite == OnNonfinite::propagate, machine);
  if (queue.error != cudaSuccess) return text(queue.error);
  job.take(place.allocate(job.take(nullptr)));
  device::Report* const report = report_of(place);
  const Common& common = job.common;
  const Descriptors& d = common.descriptors;
  const device::Layout layout = common.layout(b);
  const device::Gradient grad{call.grad, numeric(call.grad_type), {call.grad_scale, 1.0}};

  d.upload(queue);
  // A module's forward has counted this batch.
  device::begin_batch(queue, report, step.clock == nullptr);
  device::check_batch(queue, common.batch, layout, report, machine);
  for (const UpdateGroup& g : job.groups) {
    g.kernels->prepare(queue, common.inputs, d.at(g.recipes), d.at(g.numbers), g.count, g.updates,
                       report);
  }
  const device::Entries sorted =
      device::segment(queue, common.batch, layout, common.extent, job.segments, report);
  device::sum_long_runs(queue, layout, common.extent, grad, sorted, job.segments.runs, job.space,
                        report);
  const auto apply = [&](device::Pass pass) {
    for (const UpdateGroup& g : job.groups) {
      g.kernels->apply(queue, d.at(g.tables), d.at(g.numbers), g.updates, g.count, layout,
                       common.extent, grad, sorted, job.segments.runs, job.space, pass, report);
    }
  };
  const int checks =
      (call.check_step ? static_cast<int>(device::Pass::check_stale) : 0) |
      (call.on_nonfinite == OnNonfinite::raise ? static_cast<int>(device::Pass::check_finite) : 0);
  if (checks != 0) apply(static_cast<device::Pass>(checks));
  if (!call.check_only) apply(device::Pass::update);
  device::finish_batch(queue, common.batch, layout, report, call.check_only ? nullptr : call.clock,
                       call.nonfinite);
  return text(queue.error);
}

Error take_report(const Place& place, Found& found) {
  device::Queue queue(static_cast<cudaStream_t>(place.stream));
  const OnDevice guard(queue, place.device);
  device::Report host{};
  if (queue.error == cudaSuccess) {
    queue.add(
        cudaMemcpyAsync(&host, place.report, sizeof host, cudaMemcpyDeviceToHost, queue.stream));
  }
  if (queue.error == cudaSuccess) queue.add(cudaStreamSynchronize(queue.stream));
  if (queue.error == cudaSuccess && host.kind != device::Refusal::none) {
    queue.add(cudaMemsetAsync(&report_of(place)->kind, 0, sizeof host.kind, queue.stream));
  }
  found = {static_cast<Refusal>(host.kind),
           host.table,
           host.position,
           host.value,
           host.batch,
           static_cast<std::int64_t>(host.bad_rows),
           host.positions,
           static_cast<std::int64_t>(host.nonfinite_rows)};
  return text(queue.error);
}

StateArgs state(const UpdateArgs& update) {
  return with_optimizer(update, [](const auto& optimizer) {
    using Optimizer = std::remove_cvref_t<decltype(optimizer)>;
    StateArgs s{Optimizer::scalar_states, Optimizer::vector_states, {}};
    for (int i = 0; i < s.scalar_states + s.vector_states; ++i) {
      s.names[i] = state_name<Optimizer>(i);
    }
    return s;
  });
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
