// The extension module coldrow._cuda: checks arguments, then puts kernels on a stream.
//
// The two front doors of _core, with what a device asks for besides: clock, epoch and learning rates of
// a TableBatch are 0-dim arrays that the kernels read; a report says what they found in the values, and
// is looked at where the caller wants to wait; memory to work in comes from `allocate`, a callable that
// is given a number of bytes and returns an array. What shapes and types tell is checked here.
//
// The module links no torch and is importable where there is no driver.
#include <nanobind/stl/pair.h>

#include <cstdlib>
#include <tuple>

#include "../tables.hpp"
#include "kernels.hpp"

namespace coldrow_module {

// (The tests' stand-in for a device works in the processor's memory.)
#if defined(COLDROW_SIMT)
constexpr int kDeviceTypes[] = {1, 1};
#else
constexpr int kDeviceTypes[] = {2, 13};  // CUDA's own memory, and managed memory
#endif
const char* const kMemory = "CUDA memory";

void require_reachable(const char* name, int device_type, int) {
  if (device_type == kDeviceTypes[0] || device_type == kDeviceTypes[1]) return;
  const std::string place = device_type == 1   ? "cpu"
                            : device_type == 3 ? "cpu (pinned)"
                                               : "device type " + std::to_string(device_type);
  throw nb::value_error((std::string(name) + ": is on " + place +
                         ", accepted: cuda, as the arrays before it (tables and batches in host "
                         "memory are not supported on a GPU)")
                            .c_str());
}

namespace {

using namespace nb::literals;
using coldrow::device::Refusal;

void raise_if(cuda::Error error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

// ---------------------------------------------------------------------------------------- decay table

// The factors of a decay that reads them from a table, on one device, kept while an update uses it.
class DeviceTable {
 public:
  DeviceTable(int device, const std::vector<float>& values) : device_(device) {
    raise_if(cuda::copy_to_device(device, values.data(), values.size() * sizeof(float), copy_));
  }
  ~DeviceTable() { cuda::free_on_device(device_, copy_); }
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;
  const float* data() const { return static_cast<const float*>(copy_); }

 private:
  int device_;
  void* copy_ = nullptr;
};

// An Update as it runs on one device.
struct DeviceUpdate : Update {
  std::shared_ptr<DeviceTable> device_table;

  DeviceUpdate(const Update& made, int device) : Update(made) {
    if (has_external()) {
      bad_value(
          "update: has a policy compiled for the CPU by coldrow.jit, accepted on a CUDA device: "
          "built-in optimizers and decays");
    }
    any.optimizer_functions = cuda::optimizer_functions(any.optimizer_number);
    if (!table) return;
    static std::map<std::tuple<int, double, int>, std::weak_ptr<DeviceTable>>
        tables;  // (the GIL is held)
    auto& kept = tables[{decay->number, table_alpha, device}];
    device_table = kept.lock();
    if (!device_table) {
      device_table = std::make_shared<DeviceTable>(device, *table);
      kept = device_table;
    }
    // The same decay, but that it reads this table.
    coldrow::with_type_at<coldrow::BuiltinDecays>(decay->number, [&](auto one) {
      using Decay = typename decltype(one)::type;
      if constexpr (coldrow::DecayByTable<Decay>) {
        Decay own;
        std::memcpy(&own, decay->policy, sizeof own);
        own.table = device_table->data();
        decay = std::make_shared<coldrow::AnyDecay>(own, decay->epoch_gated);
        any.decay = decay.get();
      }
    });
  }
};

// ------------------------------------------------------------------------------------------- arguments

template <class T>
T* take_scalar(Call& call, nb::handle h, const char* name, const char* dtype, Access access) {
  Array a = take_array(h, name, access);
  a.require_shape({}, "0-dim");
  a.require_dtype(dtype);
  T* const data = static_cast<T*>(a.data);
  (access == Access::write ? call.written : call.read).push_back(std::move(a));
  return data;
}

// All arrays of a call are on the first one's device.
void require_one_device(const Call& call, int device, const char* name) {
  for (const auto* list : {&call.written, &call.read}) {
    for (const Array& a : *list) {
      if (a.device == device) continue;
      bad_value(std::string(a.name) + ": is on cuda:" + std::to_string(a.device) +
                ", accepted: cuda:" + std::to_string(device) + ", the device of " + name);
    }
  }
}

// Where to run; memory from `allocate` is kept until the Runner goes.
class Runner {
 public:
  Runner(Call& call, nb::handle report, std::uintptr_t stream, nb::handle allocate)
      : allocate_(allocate) {
    const Array& first = call.written.empty() ? call.read.at(0) : call.written.at(0);
    const int device = first.device;
    const char* const name = first.name;
    place.report = take_report_array(call, report);
    place.device = device;
    place.stream = reinterpret_cast<void*>(stream);
    require_one_device(call, device, name);
    place.allocate = [this](std::size_t bytes) -> void* {
      constexpr std::size_t kAlign = 256;  // more than an allocator may give
      memory_ = allocate_(bytes + kAlign);
      const Array a = take_array(memory_, "workspace", Access::write);
      if (a.size() * a.item_size < static_cast<std::int64_t>(bytes + kAlign)) {
        bad_value("allocate: got " + a.describe() + ", accepted: an array of the bytes asked for");
      }
      const auto p = reinterpret_cast<std::uintptr_t>(a.data);
      return reinterpret_cast<void*>((p + kAlign - 1) / kAlign * kAlign);
    };
  }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  static void* take_report_array(Call& call, nb::handle report) {
    Array a = take_array(report, "report", Access::write);
    a.require_shape({static_cast<std::int64_t>(cuda::kReportBytes / 8)}, "see report_size");
    a.require_contiguous();
    a.require_dtype("int64");
    void* const data = a.data;
    call.written.push_back(std::move(a));
    return data;
  }

  cuda::Place place{};

 private:
  nb::handle allocate_;
  nb::object memory_;
};

// ---------------------------------------------------------------------------------------------- report

// What the report says is wrong, as an exception. names, rows: of the tables; step: of the call, or 0
// where the device knows it.
void raise_refusal(const coldrow::device::Report& f, const std::vector<std::string>& names,
                   const std::vector<std::int64_t>& rows, std::int64_t step) {
  const auto t = static_cast<std::size_t>(std::max<std::int32_t>(0, f.table));
  const bool known = f.table >= 0 && t < names.size();
  const std::string label = known ? table_label(names[t].c_str()) : "";
  const std::string more = step > 0 ? ""
                                    : " (found on the device, batch " + std::to_string(f.batch) +
                                          "; that batch changed nothing)";
  switch (f.kind) {
    case Refusal::none:
      return;
    case Refusal::offsets_start:
    case Refusal::offsets_decrease:
    case Refusal::offsets_end:
    case Refusal::index_range:
      raise_problem({static_cast<BatchProblem::Kind>(f.kind), f.position, f.value, -1},
                    "the number of indices, " + std::to_string(f.positions), label,
                    known ? rows[t] : 0, more);
    case Refusal::step_range:
      bad_value("clock: is at " + std::to_string(f.value) +
                ", accepted: steps up to 2**31 - 1 (prev_iter is int32)" + more);
    case Refusal::lr_range:
      bad_value("lr" + label + ": is negative or not finite in float32, accepted: a number >= 0" +
                more);
    case Refusal::epoch_start_range:
      bad_value("epoch_start: is out of range, accepted: 0 to 2**31 - 1" + more);
    case Refusal::stale_row:
      raise_stale(step, f.position, label, f.value);
    case Refusal::nonfinite_row:
      raise_nonfinite(f.position, label, static_cast<std::int64_t>(f.bad_rows), more);
  }
}

// Waits for the stream; a refusal in the report is raised and taken out of it.
coldrow::device::Report wait_for(nb::handle report, std::uintptr_t stream) {
  Call call;
  cuda::Place place{};
  place.report = Runner::take_report_array(call, report);
  place.device = call.written[0].device;
  place.stream = reinterpret_cast<void*>(stream);
  coldrow::device::Report found{};
  cuda::Error error = nullptr;
  {
    nb::gil_scoped_release release;
    error = cuda::take_report(place, found);
  }
  raise_if(error);
  return found;
}

// ------------------------------------------------------------------------------------------ functional

void take_table(Call& call, const DeviceUpdate& update, nb::handle weight, nb::handle prev_iter,
                double lr, Access access) {
  AnyTable& table = call.tables.emplace_back();
  take_weight(call, table, weight, access);
  take_prev_iter(call, table, prev_iter, access);
  set_policy(table, update, lr);
}

// As a batch without offsets: step, lr and epoch are given.
void set_step(Call& call, std::int64_t step, std::int64_t epoch_start) {
  close(call);
  call.batch.step = to_step(step, true);
  call.batch.epoch_start = to_epoch_start(epoch_start);
}

void apply(const DeviceUpdate& update, nb::handle weight, nb::handle grad, nb::handle indices,
           nb::sequence state, nb::handle prev_iter, std::int64_t step, double lr,
           std::int64_t epoch_start, const std::string& on_nonfinite, std::uint64_t table_key,
           std::int64_t row_offset, std::int64_t col_offset, bool check_step, bool check_only,
           nb::handle report, std::uintptr_t stream, nb::handle allocate) {
  Call call;
  take_table(call, update, weight, prev_iter, lr, Access::write);
  AnyTable& table = call.tables[0];
  table.key = table_key;
  table.row_offset = row_offset;
  table.col_offset = col_offset;
  take_state(call, table, update, state);
  take_rows(call, indices);
  const Array g = take_by_index(call, grad, "grad", Access::read);
  set_step(call, step, epoch_start);
  to_step(step);
  call.check_overlap(true);
  Runner run(call, report, stream, allocate);
  cuda::UpdateCall u{};
  u.grad = g.data;
  u.grad_type = g.numeric();
  u.on_nonfinite = to_on_nonfinite(on_nonfinite);
  u.check_step = check_step;
  u.check_only = check_only;
  raise_if(cuda::update(call.batch, {}, u, run.place));
}

void read(const DeviceUpdate& update, nb::handle out, nb::handle weight, nb::handle indices,
          nb::handle prev_iter, std::int64_t step, double lr, std::int64_t epoch_start,
          nb::handle report, std::uintptr_t stream, nb::handle allocate) {
  Call call;
  take_table(call, update, weight, prev_iter, lr, Access::read);
  take_rows(call, indices);
  const Array o = take_by_index(call, out, "out", Access::write);
  set_step(call, step, epoch_start);
  call.check_overlap(true);
  Runner run(call, report, stream, allocate);
  constexpr std::int64_t kZeroed = 0;  // a refused call leaves `out` alone, since it will raise
  raise_if(cuda::lookup(call.batch, {}, true, o.data, o.numeric(), kZeroed, run.place));
}

// -------------------------------------------------------------------------------------------- TableBatch

class TableBatch : public Tables {
 public:
  using Tables::Tables;

  void lookup(nb::sequence weights, nb::sequence prev_iters, nb::sequence updates, nb::sequence lrs,
              nb::handle indices, nb::handle offsets, nb::handle per_sample_weights,
              nb::handle batch_sizes, const std::string& pooling, bool read, nb::handle clock,
              nb::handle epoch_start, nb::handle out, nb::handle report, std::uintptr_t stream,
              nb::handle allocate) {
    Call call = begin(weights, prev_iters, updates, read, indices, offsets, per_sample_weights,
                      batch_sizes, pooling);
    const cuda::StepArgs step = take_step(call, lrs, clock, epoch_start, read, Access::read);
    const Array o = take_elements(call, out, "out", Access::write);
    Runner run(call, report, stream, allocate);
    raise_if(cuda::lookup(call.batch, step, read, o.data, o.numeric(), o.size(), run.place));
  }

  void weight_gradients(nb::sequence weights, nb::sequence prev_iters, nb::sequence updates,
                        nb::sequence lrs, nb::handle indices, nb::handle offsets,
                        nb::handle batch_sizes, const std::string& pooling, bool read,
                        nb::handle clock, nb::handle epoch_start, nb::handle grad, nb::handle out,
                        nb::handle report, std::uintptr_t stream, nb::handle allocate) {
    Call call = begin(weights, prev_iters, updates, read, indices, offsets, nb::none(), batch_sizes,
                      pooling, Access::read);
    const cuda::StepArgs step = take_step(call, lrs, clock, epoch_start, read, Access::read);
    const Array g = take_elements(call, grad, "grad", Access::read);
    const Array o = call.keep(call.written, take_weights_gradient(call, out));
    Runner run(call, report, stream, allocate);
    raise_if(cuda::weight_gradients(call.batch, step, read, g.data, g.numeric(),
                                    static_cast<float*>(o.data), run.place));
  }

  void update(nb::sequence weights, nb::sequence states, nb::sequence prev_iters,
              nb::sequence updates, nb::sequence lrs, nb::handle indices, nb::handle offsets,
              nb::handle per_sample_weights, nb::handle batch_sizes, const std::string& pooling,
              nb::handle clock, nb::handle epoch_start, nb::handle nonfinite, nb::handle grad_scale,
              nb::handle grad, const std::string& on_nonfinite, nb::handle report,
              std::uintptr_t stream, nb::handle allocate) {
    Call call = begin(weights, prev_iters, updates, true, indices, offsets, per_sample_weights,
                      batch_sizes, pooling, Access::write);
    take_states(call, states, updates);
    const Array g = take_elements(call, grad, "grad", Access::read);
    call.check_overlap(false);
    const cuda::StepArgs step = take_step(call, lrs, clock, epoch_start, true, Access::write);
    cuda::UpdateCall u{};
    u.grad = g.data;
    u.grad_type = g.numeric();
    u.grad_scale = take_scalar<double>(call, grad_scale, "grad_scale", "float64", Access::read);
    u.on_nonfinite = to_on_nonfinite(on_nonfinite);
    u.clock = const_cast<std::int64_t*>(step.clock);
    u.nonfinite = take_scalar<std::int64_t>(call, nonfinite, "nonfinite", "int64", Access::write);
    Runner run(call, report, stream, allocate);
    raise_if(cuda::update(call.batch, step, u, run.place));
  }

  // Waits. rows: of each table.
  void check(nb::handle report, const std::vector<std::int64_t>& rows,
             std::uintptr_t stream) const {
    raise_refusal(wait_for(report, stream), names_, rows, 0);
  }

 private:
  // access: of the clock.
  static cuda::StepArgs take_step(Call& call, nb::sequence lrs, nb::handle clock,
                                  nb::handle epoch_start, bool with_lrs, Access access) {
    cuda::StepArgs step;
    step.clock = take_scalar<std::int64_t>(call, clock, "clock", "int64", access);
    step.epoch_start =
        take_scalar<std::int64_t>(call, epoch_start, "epoch_start", "int64", Access::read);
    if (!with_lrs) return step;
    for (nb::handle lr : lrs) {
      step.lrs.push_back(take_scalar<double>(call, lr, "lr", "float64", Access::read));
    }
    if (step.lrs.size() != call.tables.size()) {
      bad_value("lrs: got " + std::to_string(step.lrs.size()) + ", accepted: one per table");
    }
    return step;
  }

  // The output or its gradient. (Unpooled and of several widths, how many elements there are depends on
  // the offsets' values.)
  static Array take_elements(Call& call, nb::handle h, const char* name, Access access) {
    Array a = take_array(h, name, access);
    a.numeric();
    std::int64_t low = INT64_MAX, high = 0, pooled = 0;
    for (const Feature& f : call.features) {
      pooled += f.bags * f.dim;
      low = std::min<std::int64_t>(low, f.dim);
      high = std::max<std::int64_t>(high, f.dim);
    }
    const std::int64_t n = call.batch.positions;
    if (call.batch.pooled || call.features.empty()) {
      require_elements(a, pooled);
    } else if (low == high) {
      require_elements(a, n * low);
    } else {
      a.require_contiguous();
      if (a.size() < n * low || a.size() > n * high) require_elements(a, n * high);
    }
    return call.keep(access == Access::write ? call.written : call.read, std::move(a));
  }
};

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "Compiled part of coldrow for CUDA devices. Private: see coldrow.cuda.";
  nb::set_leak_warnings(std::getenv("COLDROW_LEAK_WARNINGS") != nullptr);
  m.attr("report_size") = cuda::kReportBytes / 8;

  bind_update(m);
  nb::class_<DeviceUpdate, Update>(m, "DeviceUpdate", "An Update with what it needs on one device.")
      .def(nb::init<const Update&, int>(), "update"_a, "device"_a);

  m.def("apply", &apply, "update"_a, "weight"_a.none(), "grad"_a.none(), "indices"_a.none(),
        "state"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a, "on_nonfinite"_a,
        "table"_a, "row_offset"_a, "col_offset"_a, "check_step"_a, "check_only"_a,
        "report"_a.none(), "stream"_a, "allocate"_a,
        "One step on one table, in place, or only its checks; what they find is in the report.");
  m.def("read", &read, "update"_a, "out"_a.none(), "weight"_a.none(), "indices"_a.none(),
        "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a, "report"_a.none(), "stream"_a,
        "allocate"_a, "out[i] = row indices[i] as a read-charged forward before `step` sees it.");
  m.def(
      "finish",
      [](nb::handle report, const std::vector<std::int64_t>& rows, std::int64_t step,
         std::uintptr_t stream) {
        const coldrow::device::Report found = wait_for(report, stream);
        const std::size_t call = found.batch > 0 ? static_cast<std::size_t>(found.batch) - 1 : 0;
        raise_refusal(found, {std::string()}, {call < rows.size() ? rows[call] : 0}, step);
        return static_cast<std::int64_t>(found.nonfinite_rows);
      },
      "report"_a.none(), "rows"_a, "step"_a, "stream"_a,
      "Waits for the calls of apply() and read() that shared this report, whose tables have `rows` "
      "rows; raises what they found, or returns the number of rows skipped as non-finite.");

  nb::class_<TableBatch>(m, "TableBatch", "Tables and features of a table-batched module.")
      .def(nb::init<std::vector<std::string>, std::vector<std::uint64_t>, std::vector<std::int32_t>,
                    std::vector<std::int64_t>, std::vector<std::int64_t>>(),
           "names"_a, "keys"_a, "feature_tables"_a, "row_offsets"_a = std::vector<std::int64_t>(),
           "col_offsets"_a = std::vector<std::int64_t>())
      .def("lookup", &TableBatch::lookup, "weights"_a, "prev_iters"_a, "updates"_a, "lrs"_a,
           "indices"_a.none(), "offsets"_a.none(), "per_sample_weights"_a.none(),
           "batch_sizes"_a.none(), "pooling"_a, "read"_a, "clock"_a.none(), "epoch_start"_a.none(),
           "out"_a.none(), "report"_a.none(), "stream"_a, "allocate"_a)
      .def("weight_gradients", &TableBatch::weight_gradients, "weights"_a, "prev_iters"_a,
           "updates"_a, "lrs"_a, "indices"_a.none(), "offsets"_a.none(), "batch_sizes"_a.none(),
           "pooling"_a, "read"_a, "clock"_a.none(), "epoch_start"_a.none(), "grad"_a.none(),
           "out"_a.none(), "report"_a.none(), "stream"_a, "allocate"_a)
      .def("update", &TableBatch::update, "weights"_a, "states"_a, "prev_iters"_a, "updates"_a,
           "lrs"_a, "indices"_a.none(), "offsets"_a.none(), "per_sample_weights"_a.none(),
           "batch_sizes"_a.none(), "pooling"_a, "clock"_a.none(), "epoch_start"_a.none(),
           "nonfinite"_a.none(), "grad_scale"_a.none(), "grad"_a.none(), "on_nonfinite"_a,
           "report"_a.none(), "stream"_a, "allocate"_a)
      .def("check", &TableBatch::check, "report"_a.none(), "rows"_a, "stream"_a,
           "Waits for the stream and raises what the kernels found since the last check.");

  m.def(
      "devices",
      [] {
        int count = 0;
        const cuda::Error error = cuda::count_devices(count);
        return std::make_pair(count, std::string(error == nullptr ? "" : error));
      },
      "Number of CUDA devices, and why there is none where that is known.");
}

}  // namespace coldrow_module
