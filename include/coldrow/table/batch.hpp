// A batch of lookups into several tables, as views.
//
// Features are concatenated, as in FBGEMM's table-batched layout: bags are numbered feature by
// feature, bag b holds indices[offsets[b] .. offsets[b+1]), indices are row numbers within their
// table. Several features may share a table.
//
// The output (and its gradient) has one row of the table's D per bag, or per index where nothing is
// pooled. These output rows are numbered in the same order; each feature says where its own lie.
#pragma once

#include "../platform.hpp"

// (Outside the namespace of a build: plain structs that several builds hand each other.)
namespace coldrow {

struct Feature {
  std::int32_t table;
  std::int32_t dim;
  std::int64_t first_bag, bags;
  std::int64_t first_position, positions;  // its part of indices
  std::int64_t first_row;  // number of its first output row: first_bag, or first_position unpooled
  std::int64_t out_offset, out_stride;  // output row r starts at element
                                        // out_offset + (r - first_row) * out_stride
};

// The first thing wrong with a batch, if any.
struct BatchProblem {
  enum Kind : std::int32_t { none, offsets_start, offsets_decrease, offsets_end, index_range };
  Kind kind = none;
  std::int64_t position = -1;  // in offsets or indices
  std::int64_t value = 0;
  std::int32_t feature = -1;
};

}  // namespace coldrow

COLDROW_BEGIN

template <class Index>
struct Batch {
  const Index* indices;  // [positions]
  const Index* offsets;  // [bags + 1]; null: every index is a bag of its own
  std::int64_t bags;
  std::int64_t positions;
  const Feature* features;  // in order of first_bag
  std::int32_t num_features;
  bool pooled;                      // false: one output row per index
  bool mean;                        // pooled rows are divided by the bag's length
  const float* per_sample_weights;  // [positions] or null

  std::int64_t bag_begin(std::int64_t bag) const {
    return offsets == nullptr ? bag : static_cast<std::int64_t>(offsets[bag]);
  }
};

template <class Index>
BatchProblem check_offsets(const Index* offsets, std::int64_t bags, std::int64_t positions) {
  if (offsets[0] != 0) return {BatchProblem::offsets_start, 0, offsets[0], -1};
  // The sign of what is wrong, of all at once: that makes vectors. (Of two numbers that are not negative
  // the difference does not overflow.)
  std::uint64_t wrong = 0;
  for (std::int64_t b = 0; b < bags; ++b) {
    const auto here = static_cast<std::uint64_t>(std::int64_t{offsets[b]});
    const auto next = static_cast<std::uint64_t>(std::int64_t{offsets[b + 1]});
    wrong |= next | (next - here);
  }
  for (std::int64_t b = 0; static_cast<std::int64_t>(wrong) < 0 && b < bags; ++b) {
    if (offsets[b] > offsets[b + 1])
      return {BatchProblem::offsets_decrease, b + 1, offsets[b + 1], -1};
  }
  if (static_cast<std::int64_t>(offsets[bags]) != positions) {
    return {BatchProblem::offsets_end, bags, offsets[bags], -1};
  }
  return {};
}

// rows: number of rows of each table.
template <class Index>
BatchProblem check_indices(const Batch<Index>& batch, const std::int64_t* rows) {
  for (std::int32_t f = 0; f < batch.num_features; ++f) {
    const Feature& feature = batch.features[f];
    const auto last = static_cast<std::uint64_t>(rows[feature.table]) - 1;
    const Index* first = batch.indices + feature.first_position;
    std::uint64_t wrong = 0;  // its sign: some index is negative, or beyond the last row
    for (std::int64_t p = 0; p < feature.positions; ++p) {
      const auto index = static_cast<std::uint64_t>(std::int64_t{first[p]});
      wrong |= index | (last - index);
    }
    for (std::int64_t p = 0; static_cast<std::int64_t>(wrong) < 0 && p < feature.positions; ++p) {
      if (first[p] < 0 || first[p] >= rows[feature.table]) {
        return {BatchProblem::index_range, feature.first_position + p, first[p], f};
      }
    }
  }
  return {};
}

COLDROW_END
