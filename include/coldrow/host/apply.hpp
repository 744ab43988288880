// Backward and update on the host: for each run of equal rows, sum the gradients that reach the row
// and call the row update once.
#pragma once

#include "../row/update.hpp"
#include "../table/table.hpp"
#include "gradients.hpp"
#include "segment.hpp"

COLDROW_BEGIN

namespace host {

enum class Pass : std::int32_t {
  check,   // find what would have to be refused; write nothing
  update,  // write
};

// Rows that a pass over some runs found: how many, and the first of them.
struct FoundRows {
  std::int64_t count = 0;
  std::int32_t table = -1;
  std::int64_t row = -1;

  void add(std::int64_t r) {
    if (count++ == 0) row = r;
  }
  void merge(const FoundRows& other) {
    if (other.count == 0) return;
    if (count == 0 || other.table < table || (other.table == table && other.row < row)) {
      table = other.table;
      row = other.row;
    }
    count += other.count;
  }
};

struct ApplyReport {
  FoundRows nonfinite;
  FoundRows stale;  // prev_iter is not before this step; looked for by Pass::check alone

  void merge(const ApplyReport& other) {
    nonfinite.merge(other.nonfinite);
    stale.merge(other.stale);
  }
};

// A touched row and its summed gradient, [dim].
struct RowGradient {
  std::int64_t row;
  const float* grad;
};

// Updates rows, no row twice, or with Pass::check finds what would have to be refused.
template <class Update>
void update_rows(const Update& update,
                 const Table<typename Update::weight_type, typename Update::optimizer_type>& table,
                 Pass pass, const RowGradient* rows, int count, ApplyReport& report) {
  for (; count > kChunkRows; rows += kChunkRows, count -= kChunkRows) {
    update_rows(update, table, pass, rows, kChunkRows, report);
  }
  using Optimizer = typename Update::optimizer_type;
  const Serial group;
  typename Update::template Plans<kChunkRows> plans;
  if (count < kChunkRows) plans = {};  // zeros for the rows that are not there
  with_width(table.dim, [&](auto width) {
    const int dim = width() > 0 ? width() : table.dim;
    const auto columns = static_cast<std::size_t>(dim);
    for (int i = 0; i < count; ++i) {
      const auto row = table.row(rows[i].row);
      prefetch_near(row.weight, columns * sizeof(*row.weight));
      for (int s = 0; s < Optimizer::vector_states; ++s) prefetch_near(row.vectors[s], columns * 4);
      update.read(group, row, rows[i].grad, dim, plans, i);
    }
  });
  visit(update.decay, [&](const auto& decay) {
    touch_factors(decay, update.step, plans.prev_iter, update.lr, plans.shrink);
  });
  update.decide(table.dim, plans);
  if (pass == Pass::check) {
    for (int i = 0; i < count; ++i) {
      const std::int64_t r = rows[i].row;
      if (plans.prev_iter[i] >= update.step) report.stale.add(r);
      if (!update.finite(group, plans, i, table.row(r), rows[i].grad, table.dim)) {
        report.nonfinite.add(r);
      }
    }
    return;
  }
  with_width(table.dim, [&](auto width) {
    const int dim = width() > 0 ? width() : table.dim;
    for (int i = 0; i < count; ++i) {
      const std::int64_t r = rows[i].row;
      if (!update.write(group, plans, i, table.row(r), rows[i].grad, dim, table.key(r))) {
        report.nonfinite.add(r);
      }
    }
  });
}

// Where the rows of a table and their state lie, for prefetching alone.
class RowMemory {
 public:
  void add(const void* data, std::int64_t stride_bytes, std::size_t bytes) {
    for (int i = 0; i < count_; ++i) {  // of one record: fetched with what was added before
      const auto apart = static_cast<const char*>(data) - parts_[i].data;
      if (stride_bytes == parts_[i].stride && apart > -64 && apart < 64) return;
    }
    if (count_ < kParts) parts_[count_++] = {static_cast<const char*>(data), stride_bytes, bytes};
  }
  void fetch(std::int64_t row) const {
    for (int i = 0; i < count_; ++i) {
      prefetch(parts_[i].data + row * parts_[i].stride, parts_[i].bytes);
    }
  }

  template <Numeric Weight, OptimizerPolicy Optimizer>
  static RowMemory of(const Table<Weight, Optimizer>& t) {
    const auto dim = static_cast<std::size_t>(t.dim);
    RowMemory m;
    m.add(t.weight, static_cast<std::int64_t>(dim * sizeof(Weight)), dim * sizeof(Weight));
    m.add(t.prev_iter.data, t.prev_iter.stride * 4, 4);
    for (int s = 0; s < Optimizer::scalar_states; ++s) {
      m.add(t.scalars[s].data, t.scalars[s].stride * 4, 4);
    }
    for (int s = 0; s < Optimizer::vector_states; ++s) {
      m.add(t.vectors[s], static_cast<std::int64_t>(dim * 4), dim * 4);
    }
    return m;
  }

 private:
  static constexpr int kParts = 8;
  struct Part {
    const char* data;
    std::int64_t stride;
    std::size_t bytes;
  } parts_[kParts];
  int count_ = 0;
};

inline int chunk_rows(int dim) { return max_of(1, min_of(kChunkRows, kChunkFloats / (dim + 15))); }
// Floats of scratch that apply_runs() needs.
inline std::int64_t scratch_floats(int dim) {
  return static_cast<std::int64_t>(chunk_rows(dim)) * padded(dim);
}

// apply_runs() for rows of Width columns, or, where that is 0, of dim_of_any. (Inlined by force, as
// apply_runs() is: as a call of its own the loop takes a twentieth longer.)
template <int Width, class Entry, Numeric Grad, class Rows>
COLDROW_HOST_INLINE void apply_runs_of_width(const Entry* sorted, std::int64_t lo, std::int64_t hi,
                                             std::int64_t base, int dim_of_any,
                                             const GradientRows<Grad>& grads,
                                             const RowMemory& memory, float* scratch,
                                             const Rows& rows) {
  const int dim = Width > 0 ? Width : dim_of_any;
  const std::size_t grad_bytes = sizeof(Grad) * static_cast<std::size_t>(dim);
  const auto row_of = [&](std::int64_t i) {
    return static_cast<std::int64_t>(sorted[i].key) - base;
  };
  const auto fetch = [&](std::int64_t i) {
    prefetch(grads.row(sorted[i].out_row), grad_bytes);
    if (i == lo || sorted[i].key != sorted[i - 1].key) memory.fetch(row_of(i));
  };
  RowGradient chunk[kChunkRows];
  const int chunk_size = chunk_rows(dim);
  const int stride = padded(dim);
  int waiting = 0;
  for (std::int64_t i = lo; i < min_of(hi, lo + kPrefetchDistance); ++i) fetch(i);
  for (std::int64_t i = lo, end; i < hi; i = end) {
    end = i + 1;
    while (end < hi && sorted[end].key == sorted[i].key) ++end;
    const std::int64_t ahead = min_of(hi, end + kPrefetchDistance);
    // (The gradients of a long run are fetched while it is summed.)
    for (std::int64_t j = end - i > kLongRun ? end : i + kPrefetchDistance; j < ahead; ++j)
      fetch(j);
    chunk[waiting] = {row_of(i),
                      sum_run<Width>(grads, sorted + i, end - i, dim, scratch + waiting * stride)};
    if (++waiting == chunk_size) {
      rows(chunk, waiting);
      waiting = 0;
    }
  }
  if (waiting > 0) rows(chunk, waiting);
}

// Runs of one table: sorted[lo, hi), keys counted from `base`. scratch: scratch_floats(dim).
// rows(const RowGradient*, int count) takes the summed gradients, a few rows at a time.
template <class Entry, Numeric Grad, class Rows>
COLDROW_HOST_INLINE void apply_runs(const Entry* sorted, std::int64_t lo, std::int64_t hi,
                                    std::int64_t base, int dim, const GradientRows<Grad>& grads,
                                    const RowMemory& memory, float* scratch, const Rows& rows) {
  with_width(dim, [&](auto width) {
    apply_runs_of_width<decltype(width)::value>(sorted, lo, hi, base, dim, grads, memory, scratch,
                                                rows);
  });
}

// The same for one update known at compile time.
template <class Update, class Entry, Numeric Grad>
ApplyReport apply_runs(
    const Update& update,
    const Table<typename Update::weight_type, typename Update::optimizer_type>& table,
    const Entry* sorted, std::int64_t lo, std::int64_t hi, std::int64_t base, Pass pass,
    const GradientRows<Grad>& grads, float* scratch) {
  ApplyReport report;
  apply_runs(sorted, lo, hi, base, table.dim, grads, RowMemory::of(table), scratch,
             [&](const RowGradient* rows, int count) {
               update_rows(update, table, pass, rows, count, report);
             });
  return report;
}

}  // namespace host

COLDROW_END
