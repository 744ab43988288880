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

  const Grad* row(std::uint32_t out_row) const {
    int f = num_features - 1;
    while (f > 0 && features[f].first_row > static_cast<std::int64_t>(out_row)) --f;
    return data + features[f].out_offset +
           (out_row - features[f].first_row) * features[f].out_stride;
  }
};

// Sums 16 * Blocks columns of a run, from `column` on, in registers. count: columns of the last block
// that exist.
template <int Blocks, class Entry, Numeric Grad>
COLDROW_INLINE void sum_columns(const GradientRows<Grad>& grads, const Entry* run,
                                std::int64_t length, int column, int count, float* out) {
  Lanes<16> acc[Blocks];
  for (auto& a : acc) broadcast(a, 0.0f);
  for (std::int64_t i = 0; i < length; ++i) {
    const Grad* row = grads.row(run[i].out_row) + column;
    Lanes<16> scale;
    broadcast(scale, run[i].scale);
    for (int b = 0; b < Blocks; ++b) {
      Lanes<16> g;
      if (count == 16) {
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
const float* sum_run(const GradientRows<Grad>& grads, const Entry* run, std::int64_t count, int dim,
                     float* scratch) {
  if constexpr (std::same_as<Grad, float>) {
    if (count == 1 && run->scale == 1.0f) return grads.row(run->out_row);
  }
  int c = 0;
  for (; c + 64 <= dim; c += 64) sum_columns<4>(grads, run, count, c, 16, scratch + c);
  for (; c + 16 <= dim; c += 16) sum_columns<1>(grads, run, count, c, 16, scratch + c);
  if (c < dim) sum_columns<1>(grads, run, count, c, dim - c, scratch + c);
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
    if (count == 0)
      *this = other;
    else
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

// Runs of one table: sorted[lo, hi), keys counted from `base`. sum(run, count) gives the summed
// gradient, prefetch_gradient(entry) fetches one that will be needed.
template <class Update, class Entry, class Sum, class PrefetchGradient>
ApplyReport apply_runs(
    const Update& update,
    const Table<typename Update::weight_type, typename Update::optimizer_type>& table,
    const Entry* sorted, std::int64_t lo, std::int64_t hi, std::int64_t base, Pass pass,
    const Sum& sum, const PrefetchGradient& prefetch_gradient) {
  const Serial group;
  const std::size_t row_bytes = sizeof(*table.weight) * static_cast<std::size_t>(table.dim);
  const auto fetch = [&](std::int64_t i) {
    prefetch_gradient(sorted[i]);
    if (i > lo && sorted[i].key == sorted[i - 1].key) return;
    const auto row = table.row(static_cast<std::int64_t>(sorted[i].key) - base);
    prefetch_to_write(row.weight, row_bytes);
    prefetch_to_write(row.prev_iter, 1);
    for (int s = 0; s < Update::optimizer_type::scalar_states; ++s) {
      prefetch_to_write(row.scalars[s], 1);
    }
    for (int s = 0; s < Update::optimizer_type::vector_states; ++s) {
      prefetch_to_write(row.vectors[s], sizeof(float) * static_cast<std::size_t>(table.dim));
    }
  };
  ApplyReport report;
  for (std::int64_t i = lo; i < min_of(hi, lo + kPrefetchDistance); ++i) fetch(i);
  for (std::int64_t i = lo, end; i < hi; i = end) {
    end = i + 1;
    while (end < hi && sorted[end].key == sorted[i].key) ++end;
    const std::int64_t ahead = min_of(hi, end + kPrefetchDistance);
    for (std::int64_t j = i + kPrefetchDistance; j < ahead; ++j) fetch(j);

    const std::int64_t r = static_cast<std::int64_t>(sorted[i].key) - base;
    const auto row = table.row(r);
    const float* grad = sum(sorted + i, end - i);
    if (pass == Pass::check && *row.prev_iter >= update.step) report.stale.add(r);
    const bool finite = pass == Pass::check ? update.finite(group, row, grad, table.dim)
                                            : update(group, row, grad, table.dim, table.key(r));
    if (!finite) report.nonfinite.add(r);
  }
  return report;
}

// The common case: one gradient type known at compile time.
template <class Update, class Entry, Numeric Grad>
ApplyReport apply_runs(
    const Update& update,
    const Table<typename Update::weight_type, typename Update::optimizer_type>& table,
    const Entry* sorted, std::int64_t lo, std::int64_t hi, std::int64_t base, Pass pass,
    const GradientRows<Grad>& grads, float* scratch) {
  const std::size_t grad_bytes = sizeof(Grad) * static_cast<std::size_t>(table.dim);
  return apply_runs(
      update, table, sorted, lo, hi, base, pass,
      [&](const Entry* run, std::int64_t count) {
        return sum_run(grads, run, count, table.dim, scratch);
      },
      [&](const Entry& e) { prefetch(grads.row(e.out_row), grad_bytes); });
}

}  // namespace host

COLDROW_END
