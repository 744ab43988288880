// One call into the kernels of this machine's processor.
#pragma once

#include <memory>
#include <new>

#include <coldrow/host/tuning.hpp>

#include "arguments.hpp"
#include "claims.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace coldrow_module {

// ---------------------------------------------------------------------------------------- threads

inline bool forked =
    false;  // OpenMP's threads do not survive a fork: a child stays in its own thread
inline const Kernels* kernels = available_kernels()[0];

inline int threads_for(std::int64_t positions, std::int64_t dim) {
#if defined(_OPENMP)
  if (forked || omp_in_parallel()) return 1;
  return coldrow::host::threads_for(positions, dim, omp_get_max_threads());
#else
  (void)positions, (void)dim;
  return 1;
#endif
}

// Memory a call works in; kept between the calls of one TableBatch.
class Scratch {
 public:
  void* reserve(std::size_t bytes) {
    if (bytes + 64 > size_) {
      memory_.reset();
      size_ = 0;  // should there be none
      memory_.reset(new (std::nothrow) unsigned char[bytes + bytes / 4 + 64]);
      if (memory_ == nullptr) {
        PyErr_Format(PyExc_MemoryError,
                     "workspace: no memory for %zu bytes, accepted: a batch that fits (nothing was "
                     "written)",
                     bytes);
        throw nb::python_error();
      }
      size_ = bytes + bytes / 4 + 64;
    }
    const auto p = reinterpret_cast<std::uintptr_t>(memory_.get());
    return reinterpret_cast<void*>((p + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  std::size_t size_ = 0;
};

// The tables' memory, for Claim.
inline std::vector<Claim::Range> memory_of(const Call& call) {
  std::vector<Claim::Range> ranges;
  ranges.reserve(call.tables.size());
  for (const AnyTable& t : call.tables) {
    const auto* begin = static_cast<const char*>(t.weight);
    ranges.push_back({begin, begin + t.rows * t.dim * coldrow::size_of(t.dtype)});
  }
  return ranges;
}

inline void finish(Call& call, std::int64_t step, std::int64_t epoch_start) {
  close(call);
  call.batch.step = to_step(step, true);
  call.batch.epoch_start = to_epoch_start(epoch_start);
  std::int64_t widest = 1;
  for (AnyTable& t : call.tables) {
    widest = std::max<std::int64_t>(widest, t.dim);
    if (t.update.optimizer_number >= 0) {
      t.update.optimizer_functions = kernels->optimizer(t.update.optimizer_number);
    }
  }
  call.batch.threads = threads_for(call.batch.positions, widest);
}

inline void check_batch(Call& call) {
  BatchProblem p;
  {
    nb::gil_scoped_release release;
    p = kernels->check_batch(call.batch);
  }
  if (p.kind == BatchProblem::none) return;
  const AnyTable* table = p.feature < 0 ? nullptr : &call.tables[call.features[p.feature].table];
  raise_problem(p, "the number of indices, " + std::to_string(call.batch.positions),
                table == nullptr ? "" : table_label(table->name),
                table == nullptr ? 0 : table->rows);
}

// What a module counts of a step, 0-dim int64 each. Written by the call that writes the rows: Python raises
// KeyboardInterrupt between two of its instructions, and has then seen both or neither.
struct Counters {
  std::int64_t* clock = nullptr;  // steps done; must be at the one before
  std::int64_t* nonfinite = nullptr;

  static std::int64_t* take(nb::handle array, const char* name) {
    if (array.is_none()) return nullptr;
    const Array a = take_array(array, name, Access::write);
    a.require_shape({}, "one number");
    a.require_dtype("int64");
    return static_cast<std::int64_t*>(a.data);
  }
  void require_before(std::int64_t step) const {
    if (clock != nullptr && *clock + 1 != step) {
      throw std::runtime_error("clock: is at " + std::to_string(*clock) + " where step " +
                               std::to_string(step) +
                               " was to come: another thread trains these tables too");
    }
  }
  void count(std::int64_t step, std::int64_t skipped) const {
    if (clock != nullptr) *clock = step;
    if (nonfinite != nullptr) *nonfinite += skipped;
  }
};

// The caller holds a Claim to write.
inline std::int64_t run_update(Call& call, const Array& grad, const std::string& on_nonfinite,
                               bool check_step, bool check_only, Scratch& scratch) {
  to_step(call.batch.step);
  const NumericType grad_type = grad.numeric();
  const OnNonfinite mode = to_on_nonfinite(on_nonfinite);
  if (check_only && mode != OnNonfinite::raise && !check_step) return 0;
  void* workspace = scratch.reserve(kernels->update_bytes(call.batch));
  UpdateReport r;
  {
    nb::gil_scoped_release release;
    r = kernels->update(call.batch, grad.data, grad_type, mode, check_step, check_only, workspace);
  }
  if (!r.refused) return r.nonfinite.count;
  if (check_step && r.stale.count > 0) {
    const AnyTable& t = call.tables[r.stale.table];
    raise_stale(call.batch.step, r.stale.row, table_label(t.name),
                t.prev_iter[r.stale.row * t.prev_iter_stride]);
  }
  const AnyTable& t = call.tables[r.nonfinite.table];
  const std::int32_t last = t.prev_iter[r.nonfinite.row * t.prev_iter_stride];
  const auto step = static_cast<std::int32_t>(call.batch.step);
  const float factor = kernels->factor(t.update, last, step, t.lr, call.batch.epoch_start, false);
  if (!(factor >= 0.0f && factor <= 1.0f)) {
    bad_value("decay: gave the factor " + std::to_string(factor) + " for row " +
              std::to_string(r.nonfinite.row) + table_label(t.name) + " (" +
              std::to_string(r.nonfinite.count) +
              " rows are not to be updated), accepted: 0 to 1, or on_nonfinite='skip' or "
              "'propagate'");
  }
  raise_nonfinite(r.nonfinite.row, table_label(t.name), r.nonfinite.count);
}

}  // namespace coldrow_module
