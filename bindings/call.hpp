// One call into the kernels of this machine's processor.
#pragma once

#include "arguments.hpp"

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
  const std::int64_t worth =
      positions * dim / 8192 + 1;  // below that a thread costs more than it does
  return static_cast<int>(std::min<std::int64_t>({omp_get_max_threads(), worth, 256}));
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
      memory_.reset(new unsigned char[bytes + bytes / 4 + 64]);
      size_ = bytes + bytes / 4 + 64;
    }
    const auto p = reinterpret_cast<std::uintptr_t>(memory_.get());
    return reinterpret_cast<void*>((p + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  std::size_t size_ = 0;
};

inline void finish(Call& call, std::int64_t step, std::int64_t epoch_start) {
  close(call);
  call.batch.step = to_step(step, true);
  call.batch.epoch_start = to_epoch_start(epoch_start);
  std::int64_t widest = 1;
  for (const TableArgs& t : call.tables) widest = std::max<std::int64_t>(widest, t.dim);
  call.batch.threads = threads_for(call.batch.positions, widest);
}

inline void check_batch(Call& call) {
  Problem p;
  {
    nb::gil_scoped_release release;
    p = kernels->check_batch(call.batch);
  }
  if (p.kind == Problem::none) return;
  const TableArgs* table = p.feature < 0 ? nullptr : &call.tables[call.features[p.feature].table];
  raise_problem(p, "the number of indices, " + std::to_string(call.batch.positions),
                table == nullptr ? "" : table_label(table->name),
                table == nullptr ? 0 : table->rows);
}

inline std::int64_t run_update(Call& call, const Array& grad, const std::string& on_nonfinite,
                               bool check_step, bool check_only, Scratch& scratch) {
  to_step(call.batch.step);
  const DType grad_type = grad.numeric();
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
    const TableArgs& t = call.tables[r.stale.table];
    raise_stale(call.batch.step, r.stale.row, table_label(t.name),
                t.prev_iter[r.stale.row * t.prev_iter_stride]);
  }
  raise_nonfinite(r.nonfinite.row, table_label(call.tables[r.nonfinite.table].name),
                  r.nonfinite.count);
}

}  // namespace coldrow_module
