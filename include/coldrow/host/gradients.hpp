// The gradients that reach a row, summed in float32, in the order of table/run.hpp.
#pragma once

#include "../table/batch.hpp"
#include "../table/run.hpp"
#include "columns.hpp"
#include "parallel.hpp"

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

// The gradients of some entries as Columns, from `column` on: those of a part, a slice, a run.
template <int Blocks, bool Whole, class Entry, Numeric Grad>
struct ColumnSums {
  const GradientRows<Grad>& grads;
  int column, count;

  COLDROW_HOST_INLINE const Grad* row(const Entry& entry) const {
    return grads.row(entry.out_row) + column;
  }
  COLDROW_HOST_INLINE Columns<Blocks> part(const Entry* begin, const Entry* end) const {
    Columns<Blocks> sum;
    for (; begin < end; ++begin) sum.template add<Whole>(begin->scale, row(*begin), count);
    return sum;
  }
  // Parts of a long run are too much to be fetched beforehand. last: of the run.
  COLDROW_HOST_INLINE Columns<Blocks> slice(const Entry* begin, const Entry* end,
                                            const Entry* last) const {
    Columns<Blocks> sum;
    while (begin < end) {
      const Entry* const part_end = begin + min_of<std::int64_t>(kPart, end - begin);
      Columns<Blocks> of_part;
      for (; begin < part_end; ++begin) {
        const Entry* const ahead = begin + min_of(kPrefetchDistance, last - begin);
        prefetch(row(*ahead), 16 * Blocks * sizeof(Grad));
        of_part.template add<Whole>(begin->scale, row(*begin), count);
      }
      sum += of_part;
    }
    return sum;
  }
  COLDROW_HOST_INLINE Columns<Blocks> run(const Entry* begin, const Entry* end) const {
    if (end - begin <= kLongRun) return part(begin, end);
    Columns<Blocks> sum;
    const std::int64_t step = slice_length(end - begin);
    for (const Entry* const last = end - 1; begin < end; begin += min_of(step, end - begin)) {
      sum += slice(begin, begin + min_of(step, end - begin), last);
    }
    return sum;
  }
};

// The sum of a run's gradients: a pointer to them where there is but one of them, or to `scratch`,
// [padded(dim)], where it has been written.
template <int Width = 0, class Entry, Numeric Grad>
COLDROW_HOST_INLINE const float* sum_run(const GradientRows<Grad>& grads, const Entry* run,
                                         std::int64_t length, int dim, float* scratch) {
  if constexpr (std::same_as<Grad, float>) {
    if (length == 1 && run->scale == 1.0f) return grads.row(run->out_row);
  }
  for_columns<Width>(dim, [&](auto blocks, auto whole, int c) {
    using Sums = ColumnSums<decltype(blocks)::value, decltype(whole)::value, Entry, Grad>;
    Sums{grads, c, dim - c}.run(run, run + length).write(scratch + c);
  });
  return scratch;
}

// A long run by several threads: slices[s], [padded(dim)] each and one after another, is the
// sum of slice s, and sum_slices() then that of the run, which it writes to the first of them.
template <class Entry, Numeric Grad>
void sum_slice(const GradientRows<Grad>& grads, const Entry* run, std::int64_t length, int s,
               int dim, float* slices) {
  const std::int64_t step = slice_length(length);
  const Entry* const begin = run + s * step;
  const Entry* const end = begin + min_of(step, length - s * step);
  float* const out = slices + s * padded(dim);
  for_columns<0>(dim, [&](auto blocks, auto whole, int c) {
    using Sums = ColumnSums<decltype(blocks)::value, decltype(whole)::value, Entry, Grad>;
    Sums{grads, c, dim - c}.slice(begin, end, run + length - 1).write(out + c);
  });
}
inline int slices_of(std::int64_t length) {
  return static_cast<int>(divide_up(length, slice_length(length)));
}
inline const float* sum_slices(int count, int dim, float* slices) {
  const int stride = padded(dim);
  for (int c = 0; c < stride; c += 16) {
    Columns<1> sum;
    for (int s = 0; s < count; ++s) sum.add<true>(1.0f, slices + s * stride + c, 16);
    sum.write(slices + c);
  }
  return slices;
}

}  // namespace host

COLDROW_END
