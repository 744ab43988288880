// The functional front door: one step, or one read, of single tables.
#include "call.hpp"
#include "module.hpp"

namespace coldrow_module {
namespace {

using namespace nb::literals;

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
  AnyTable& table = call.tables.emplace_back();
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
// lr, key, row_offset, col_offset) each.
std::int64_t apply_steps(nb::sequence steps, std::int64_t step, std::int64_t epoch_start,
                         const std::string& on_nonfinite, nb::handle clock, nb::handle nonfinite) {
  std::vector<Step> taken;
  std::vector<Claim::Range> memory;
  std::size_t most = 0;
  for (nb::handle each : steps) {
    const auto s = nb::cast<nb::sequence>(each);
    taken.push_back(take_step(nb::cast<const Update&>(s[0]), s[1], s[2], s[3],
                              nb::cast<nb::sequence>(s[4]), s[5], step, nb::cast<double>(s[6]),
                              epoch_start, nb::cast<std::uint64_t>(s[7]),
                              nb::cast<std::int64_t>(s[8]), nb::cast<std::int64_t>(s[9])));
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
  AnyTable& table = call.tables.emplace_back();
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

}  // namespace

void bind_functional(nb::module_& m) {
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

  m.def(
      "factor",
      [](const Update& u, std::int64_t prev_iter, std::int64_t step, double lr,
         std::int64_t epoch_start, bool read) {
        if (prev_iter < 0 || prev_iter > step) bad_value("prev_iter: accepted: 0 to step");
        return kernels->factor(u.any, static_cast<std::int32_t>(prev_iter),
                               static_cast<std::int32_t>(to_step(step)), to_lr(lr),
                               to_epoch_start(epoch_start), read);
      },
      "update"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a, "read"_a,
      "The decay factor of a touch at `step`, or of a read before it.");
}

}  // namespace coldrow_module
