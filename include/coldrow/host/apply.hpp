// Backward and update on the host: for each run of equal rows, sum the gradients that reach the row
// and call the row update once.
#pragma once

#include "../table/table.hpp"
#include "segment.hpp"

COLDROW_BEGIN

namespace host {

// The gradient of the output, by output row, for the features of one table.
template <Numeric Grad>
struct GradientRows {
  const Grad* data;
  const Feature* features;  // of this table, in order of first_row
  int num_features;

  COLDROW_HOST_INLINE const Grad* row(std::uint32_t out_row) const {
    int f = num_features - 1;
    while (f > 0 && features[f].first_row > static_cast<std::int64_t>(out_row)) --f;
    return data + features[f].out_offset +
           (out_row - features[f].first_row) * features[f].out_stride;
  }
};

// Sums 16 * Blocks columns of a run, from `column` on, in registers. Whole: all of them exist; else
// Blocks is 1 and `count` do.
template <int Blocks, bool Whole, class Entry, Numeric Grad>
COLDROW_HOST_INLINE void sum_columns(const GradientRows<Grad>& grads, const Entry* run,
                                     std::int64_t length, int column, int count, float* out) {
  Lanes<16> acc[Blocks];
  for (auto& a : acc) broadcast(a, 0.0f);
  for (std::int64_t i = 0; i < length; ++i) {
    const Grad* row = grads.row(run[i].out_row) + column;
    Lanes<16> scale;
    broadcast(scale, run[i].scale);
    for (int b = 0; b < Blocks; ++b) {
      Lanes<16> g;
      if constexpr (Whole) {
        load(g, row + 16 * b);
      } else {
        load_partial(g, row + 16 * b, count);
      }
      multiply_add(acc[b], scale, g);
    }
  }
  for (int b = 0; b < Blocks; ++b) {
    float sums[16];
    to_array(acc[b], sums);
    for (int k = 0; k < 16; ++k) out[16 * b + k] = sums[k];
  }
}

// The float32 sum of a run's gradients, in the order of the batch. scratch: [dim rounded up to 16].
template <class Entry, Numeric Grad>
COLDROW_HOST_INLINE const float* sum_run(const GradientRows<Grad>& grads, const Entry* run,
                                         std::int64_t count, int dim, float* scratch) {
  if constexpr (std::same_as<Grad, float>) {
    if (count == 1 && run->scale == 1.0f) return grads.row(run->out_row);
  }
  int c = 0;
  const auto sum = [&](auto blocks, auto whole) {
    constexpr int kBlocks = decltype(blocks)::value;
    sum_columns<kBlocks, decltype(whole)::value>(grads, run, count, c, dim - c, scratch + c);
    c += 16 * kBlocks;
  };
  using std::integral_constant;
  while (c + 128 <= dim) sum(integral_constant<int, 8>{}, std::true_type{});
  if (c + 64 <= dim) sum(integral_constant<int, 4>{}, std::true_type{});
  if (c + 32 <= dim) sum(integral_constant<int, 2>{}, std::true_type{});
  if (c + 16 <= dim) sum(integral_constant<int, 1>{}, std::true_type{});
  if (c < dim) sum(integral_constant<int, 1>{}, std::false_type{});
  return scratch;
}

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
  const Serial group;
  for (int i = 0; i < count; ++i) {
    const std::int64_t r = rows[i].row;
    const auto row = table.row(r);
    if (pass == Pass::check && *row.prev_iter >= update.step) report.stale.add(r);
    const bool finite = pass == Pass::check
                            ? update.finite(group, row, rows[i].grad, table.dim)
                            : update(group, row, rows[i].grad, table.dim, table.key(r));
    if (!finite) report.nonfinite.add(r);
  }
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

// Rows are updated a few at a time, so that the driver need not be compiled for every update:
// their summed gradients wait in a scratch area that stays in the first-level cache.
inline constexpr int kChunkRows = 16;
inline constexpr int kChunkFloats = 4096;

inline int chunk_rows(int dim) { return max_of(1, min_of(kChunkRows, kChunkFloats / (dim + 15))); }
// Floats of scratch that apply_runs() needs.
inline std::int64_t scratch_floats(int dim) {
  return static_cast<std::int64_t>(chunk_rows(dim)) * ((dim + 15) / 16 * 16);
}

// Runs of one table: sorted[lo, hi), keys counted from `base`. scratch: scratch_floats(dim).
// rows(const RowGradient*, int count) takes the summed gradients, a few rows at a time.
template <class Entry, Numeric Grad, class Rows>
void apply_runs(const Entry* sorted, std::int64_t lo, std::int64_t hi, std::int64_t base, int dim,
                const GradientRows<Grad>& grads, const RowMemory& memory, float* scratch,
                const Rows& rows) {
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
  const int stride = (dim + 15) / 16 * 16;
  int waiting = 0;
  for (std::int64_t i = lo; i < min_of(hi, lo + kPrefetchDistance); ++i) fetch(i);
  for (std::int64_t i = lo, end; i < hi; i = end) {
    end = i + 1;
    while (end < hi && sorted[end].key == sorted[i].key) ++end;
    const std::int64_t ahead = min_of(hi, end + kPrefetchDistance);
    for (std::int64_t j = i + kPrefetchDistance; j < ahead; ++j) fetch(j);
    chunk[waiting] = {row_of(i),
                      sum_run(grads, sorted + i, end - i, dim, scratch + waiting * stride)};
    if (++waiting == chunk_size) {
      rows(chunk, waiting);
      waiting = 0;
    }
  }
  if (waiting > 0) rows(chunk, waiting);
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
