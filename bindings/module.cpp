// The extension module coldrow._core: checks arguments, then calls the kernels of this machine.
//
// Two front doors, one engine: TableBatch (several tables and features, pooled or not) and the
// functional apply/read, which are a batch of one table whose every index is a bag of its own.
// Everything is checked before anything is written.
#include <pthread.h>
#include <sys/mman.h>

#include <coldrow/reference.hpp>
#include <cstdlib>

#include "call.hpp"
#include "table_batch.hpp"

namespace coldrow_module {

StateArgs state_of(const UpdateArgs& update) { return kernels->state(update); }

const char* const kMemory = "CPU memory";

void require_reachable(const char* name, int device_type, int device_id) {
  if (device_type == nb::device::cpu::value || device_type == 3 /* pinned host memory */) return;
  const std::string place = device_type == nb::device::cuda::value
                                ? "cuda:" + std::to_string(device_id)
                                : "device type " + std::to_string(device_type);
  throw nb::value_error(
      (std::string(name) + ": is on " + place + ", accepted: cpu, as the arrays before it")
          .c_str());
}

namespace {

using namespace nb::literals;

// ------------------------------------------------------------------------------------- functional

// One step on one table, taken and checked.
struct Step {
  Call call;
  Array grad;
};

Step take_step(const Update& update, nb::handle weight, nb::handle grad, nb::handle indices,
               nb::sequence state, nb::handle prev_iter, std::int64_t step, double lr,
               std::int64_t epoch_start, std::uint64_t table_key, std::int64_t row_offset,
               std::int64_t col_offset) {
  Step s;
  Call& call = s.call;
  TableArgs& table = call.tables.emplace_back();
  table.key = table_key;
  table.row_offset = row_offset;
  table.col_offset = col_offset;
  take_weight(call, table, weight, Access::write);
  take_prev_iter(call, table, prev_iter, Access::write);
  take_state(call, table, update, state);
  set_policy(table, update, lr);
  take_rows(call, indices);
  s.grad = take_by_index(call, grad, "grad", Access::read);
  finish(call, step, epoch_start);
  check_batch(call);
  call.check_overlap(true);
  return s;
}

std::int64_t apply(const Update& update, nb::handle weight, nb::handle grad, nb::handle indices,
                   nb::sequence state, nb::handle prev_iter, std::int64_t step, double lr,
                   std::int64_t epoch_start, const std::string& on_nonfinite,
                   std::uint64_t table_key, std::int64_t row_offset, std::int64_t col_offset,
                   bool check_step, bool check_only) {
  Step s = take_step(update, weight, grad, indices, state, prev_iter, step, lr, epoch_start,
                     table_key, row_offset, col_offset);
  Scratch scratch;
  const Claim claim(memory_of(s.call), true);
  return run_update(s.call, s.grad, on_nonfinite, check_step, check_only, scratch);
}

// One step on several tables: all of it, or none. steps: (update, weight, grad, indices, state, prev_iter,
// lr, key) each.
std::int64_t apply_steps(nb::sequence steps, std::int64_t step, std::int64_t epoch_start,
                         const std::string& on_nonfinite, nb::handle clock, nb::handle nonfinite) {
  std::vector<Step> taken;
  std::vector<Claim::Range> memory;
  std::size_t most = 0;
  for (nb::handle each : steps) {
    const auto s = nb::cast<nb::sequence>(each);
    taken.push_back(take_step(nb::cast<const Update&>(s[0]), s[1], s[2], s[3],
                              nb::cast<nb::sequence>(s[4]), s[5], step, nb::cast<double>(s[6]),
                              epoch_start, nb::cast<std::uint64_t>(s[7]), 0, 0));
    const auto ranges = memory_of(taken.back().call);
    memory.insert(memory.end(), ranges.begin(), ranges.end());
    most = std::max(most, kernels->update_bytes(taken.back().call.batch));
  }
  const Counters counters{Counters::take(clock, "clock"),
                          Counters::take(nonfinite, "nonfinite_rows")};
  Scratch scratch;
  scratch.reserve(most);  // nothing is allocated after the first row was written
  const Claim claim(std::move(memory), true);
  counters.require_before(step);
  const bool scan = to_on_nonfinite(on_nonfinite) == OnNonfinite::raise;
  for (Step& s : taken) {
    if (scan) run_update(s.call, s.grad, on_nonfinite, false, true, scratch);
  }
  std::int64_t skipped = 0;
  for (Step& s : taken) {
    skipped += run_update(s.call, s.grad, scan ? "skip" : on_nonfinite, false, false, scratch);
  }
  counters.count(step, skipped);
  return skipped;
}

void read(const Update& update, nb::handle out, nb::handle weight, nb::handle indices,
          nb::handle prev_iter, std::int64_t step, double lr, std::int64_t epoch_start) {
  Call call;
  TableArgs& table = call.tables.emplace_back();
  take_weight(call, table, weight, Access::read);
  take_prev_iter(call, table, prev_iter, Access::read);
  set_policy(table, update, lr);
  take_rows(call, indices);
  const Array o = take_by_index(call, out, "out", Access::write);
  finish(call, step, epoch_start);
  check_batch(call);
  call.check_overlap(true);
  Scratch scratch;
  void* workspace = scratch.reserve(kernels->lookup_bytes(call.batch, true));
  const Claim claim(memory_of(call), false);
  nb::gil_scoped_release release;
  kernels->lookup(call.batch, true, o.data, o.numeric(), workspace);
}

// A claim on tables while Python code works on them: with HeldTables(weights, write): ...
class HeldTables {
 public:
  HeldTables(nb::sequence weights, bool write) : write_(write) {
    for (nb::handle weight : weights) {
      TableArgs table{};
      Call call;
      take_weight(call, table, weight, write ? Access::write : Access::read);
      call.tables.push_back(table);
      const auto range = memory_of(call);
      ranges_.insert(ranges_.end(), range.begin(), range.end());
    }
  }
  void enter() { claim_ = std::make_unique<Claim>(ranges_, write_); }
  void exit() { claim_.reset(); }

 private:
  std::vector<Claim::Range> ranges_;
  bool write_;
  std::unique_ptr<Claim> claim_;
};

// -------------------------------------------------------------------------------------- reference

coldrow::reference::Update reference_of(const UpdateArgs& args) {
  using Kind = coldrow::reference::OptimizerKind;
  coldrow::reference::Optimizer o{args.eps, args.beta1, args.beta2};
  switch (args.optimizer) {
    case OptimizerKind::sgd:
      o.kind = Kind::sgd;
      break;
    case OptimizerKind::rowwise_rmsprop:
      break;
    case OptimizerKind::rowwise_adagrad:
      o.kind = Kind::rowwise_adagrad;
      break;
    case OptimizerKind::adagrad:
      o.kind = Kind::adagrad;
      break;
    case OptimizerKind::adam:
    case OptimizerKind::adam_by_touches:
      o.kind = Kind::adam;
      o.count_touches = args.optimizer == OptimizerKind::adam_by_touches;
      break;
    case OptimizerKind::partial_rowwise_adam:
    case OptimizerKind::partial_rowwise_adam_by_touches:
      o.kind = Kind::partial_rowwise_adam;
      o.count_touches = args.optimizer == OptimizerKind::partial_rowwise_adam_by_touches;
      break;
    case OptimizerKind::external:
      bad_value("optimizer: compiled at run time, so the float64 reference does not know it");
  }
  if (args.decay == DecayName::external) {
    bad_value("decay: compiled at run time, so the float64 reference does not know it");
  }
  return {o,
          {static_cast<coldrow::DecayKind>(args.decay), args.epoch_gated, args.alpha,
           args.min_shrinkage, args.weight_decay, args.half_life},
          args.decay_state};
}

void reference_apply(const Update& update, nb::handle weight, nb::handle grad, nb::handle indices,
                     nb::dict state, std::int64_t step, double lr, std::int64_t epoch_start) {
  const auto take = [](nb::handle h, const char* name, Access access, const char* dtype,
                       std::initializer_list<std::int64_t> shape) {
    Array a = take_array(h, name, access);
    a.require_shape(shape, "see the docstring");
    a.require_dtype(dtype);
    a.require_contiguous();
    return a;
  };
  const Array w = take(weight, "weight", Access::write, "float64", {-1, -1});
  const std::int64_t rows = w.shape[0], dim = w.shape[1];
  const Array i = take(indices, "indices", Access::read, "int64", {-1});
  const Array g = take(grad, "grad", Access::read, "float64", {i.shape[0], dim});
  coldrow::reference::State s{};
  const Array p = take(state["prev_iter"], "prev_iter", Access::write, "int64", {rows});
  s.prev_iter = static_cast<std::int64_t*>(p.data);
  const auto take_all = [&](const std::vector<std::string>& names, bool by_row) {
    for (const std::string& name : names) {
      const char* n = name.c_str();
      const Array a = by_row ? take(state[n], n, Access::write, "float64", {rows})
                             : take(state[n], n, Access::write, "float64", {rows, dim});
      double*& to = name == "momentum1"   ? s.momentum1
                    : name == "momentum2" ? s.momentum2
                                          : s.touches;
      to = static_cast<double*>(a.data);
    }
  };
  const auto reference = reference_of(update.args);
  take_all(update.scalar_states, true);
  take_all(update.vector_states, false);
  const auto* index = static_cast<const std::int64_t*>(i.data);
  for (std::int64_t k = 0; k < i.shape[0]; ++k) {
    if (index[k] < 0 || index[k] >= rows) bad_index("indices: out of range");
  }
  coldrow::reference::apply(reference, static_cast<double*>(w.data), dim, s,
                            static_cast<const double*>(g.data), index, i.shape[0], step, lr,
                            epoch_start);
}

// From two such pages on. A system that has none, or does not grant them, is no error.
bool advise_huge_pages(nb::handle array) {
  const Array a = take_array(array, "array", Access::write);
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(a.data);
  const std::uintptr_t end = begin + static_cast<std::uintptr_t>(a.size() * a.item_size);
  const std::uintptr_t from = (begin + kPage - 1) / kPage * kPage, to = end / kPage * kPage;
#if defined(MADV_HUGEPAGE)
  return a.contiguous() && to > from + kPage &&
         madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Compiled part of coldrow. Private: use the functions and classes of `coldrow`.";
  // Caches and modules still alive at exit are no leak; the leak tests ask for the report.
  nb::set_leak_warnings(std::getenv("COLDROW_LEAK_WARNINGS") != nullptr);
  pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    Claim::forget_all();
  });

  bind_update(m);

  m.def("apply", &apply, "update"_a, "weight"_a.none(), "grad"_a.none(), "indices"_a.none(),
        "state"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a, "on_nonfinite"_a,
        "table"_a, "row_offset"_a, "col_offset"_a, "check_step"_a, "check_only"_a,
        "One step on one table, in place, or only its checks. Returns the number of rows skipped "
        "as non-finite.");
  m.def("apply_steps", &apply_steps, "steps"_a, "step"_a, "epoch_start"_a, "on_nonfinite"_a,
        "clock"_a.none(), "nonfinite"_a.none(),
        "One step on several tables, in place: all of it, or none. Returns the number of rows "
        "skipped as non-finite.");
  m.def("read", &read, "update"_a, "out"_a.none(), "weight"_a.none(), "indices"_a.none(),
        "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a,
        "out[i] = row indices[i] as a read-charged forward before `step` sees it.");

  nb::class_<HeldTables>(m, "HeldTables",
                         "Tables that other threads' calls leave alone while this is entered.")
      .def(nb::init<nb::sequence, bool>(), "weights"_a, "write"_a)
      .def("__enter__", [](HeldTables& held) { held.enter(); })
      .def("__exit__", [](HeldTables& held, nb::args) { held.exit(); });

  nb::class_<TableBatch>(m, "TableBatch", "Tables and features of a table-batched module.")
      .def(nb::init<std::vector<std::string>, std::vector<std::uint64_t>, std::vector<std::int32_t>,
                    std::vector<std::int64_t>, std::vector<std::int64_t>>(),
           "names"_a, "keys"_a, "feature_tables"_a, "row_offsets"_a = std::vector<std::int64_t>(),
           "col_offsets"_a = std::vector<std::int64_t>())
      .def("lookup", &TableBatch::lookup, "weights"_a, "prev_iters"_a, "updates"_a, "lrs"_a,
           "indices"_a.none(), "offsets"_a.none(), "per_sample_weights"_a.none(),
           "batch_sizes"_a.none(), "pooling"_a, "read"_a, "step"_a, "epoch_start"_a, "out"_a.none())
      .def("weight_gradients", &TableBatch::weight_gradients, "weights"_a, "prev_iters"_a,
           "updates"_a, "lrs"_a, "indices"_a.none(), "offsets"_a.none(), "batch_sizes"_a.none(),
           "pooling"_a, "read"_a, "step"_a, "epoch_start"_a, "grad"_a.none(), "out"_a.none())
      .def("update", &TableBatch::update, "weights"_a, "states"_a, "prev_iters"_a, "updates"_a,
           "lrs"_a, "indices"_a.none(), "offsets"_a.none(), "per_sample_weights"_a.none(),
           "batch_sizes"_a.none(), "pooling"_a, "step"_a, "epoch_start"_a, "grad"_a.none(),
           "on_nonfinite"_a, "check_only"_a = false, "clock"_a.none() = nb::none(),
           "nonfinite"_a.none() = nb::none());

  m.def(
      "factor",
      [](const Update& u, std::int64_t prev_iter, std::int64_t step, double lr,
         std::int64_t epoch_start, bool read) {
        if (prev_iter < 0 || prev_iter > step) bad_value("prev_iter: accepted: 0 to step");
        return kernels->factor(u.args, static_cast<std::int32_t>(prev_iter),
                               static_cast<std::int32_t>(to_step(step)), to_lr(lr),
                               to_epoch_start(epoch_start), read);
      },
      "update"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a, "read"_a,
      "The decay factor of a touch at `step`, or of a read before it.");

  m.def("reference_apply", &reference_apply, "update"_a, "weight"_a.none(), "grad"_a.none(),
        "indices"_a.none(), "state"_a, "step"_a, "lr"_a, "epoch_start"_a,
        "The float64 reference of one step: weight float64 [rows, dim], grad float64 [n, dim], "
        "indices int64 [n]; state: a dict of prev_iter int64 [rows] and the optimizer's arrays, "
        "float64 [rows], or [rows, dim] where element-wise.");
  m.def(
      "reference_read_factor",
      [](const Update& u, std::int64_t prev_iter, std::int64_t step, double lr,
         std::int64_t epoch_start) {
        return coldrow::reference::read_factor(reference_of(u.args), prev_iter, step, lr,
                                               epoch_start);
      },
      "update"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a,
      "The float64 reference of what a read-charged forward multiplies a row by.");

  m.def("advise_huge_pages", &advise_huge_pages, "array"_a.none(),
        "Ask for 2 MiB pages under an array's memory, before it is first written; whether it was "
        "granted.");
  m.def("threads", [] { return threads_for(INT_MAX, 1); }, "Threads a large call would use now.");
  m.def(
      "builds",
      [] {
        std::vector<std::string> names;
        for (auto k = available_kernels(); *k != nullptr; ++k) names.push_back((*k)->name);
        return names;
      },
      "Instruction-set builds this machine can run, best first.");
  m.def("build", [] { return std::string(kernels->name); }, "The build in use.");
  m.def(
      "use_build",
      [](const std::string& name) {
        for (auto k = available_kernels(); *k != nullptr; ++k) {
          if (name == (*k)->name) {
            kernels = *k;
            return;
          }
        }
        bad_value("build: got '" + name + "', accepted: one of builds()");
      },
      "name"_a, "Use another build; results do not change. For tests.");
}

}  // namespace coldrow_module
