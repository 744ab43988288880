// In which order the gradients of one row are summed: the same on the host and on a device, for any
// number of threads.
//
// A run, that is the lookups of one row, in the order of the batch, is summed in one go up to kLongRun of
// them. A longer one is cut, from its own beginning, into parts of kPart, each summed in the order of the
// batch; where there are more than kMaxParts of them, equal numbers of neighbouring parts are summed into
// at most kMaxParts slices first; parts, or slices, are then summed in order. So the sum of a row depends
// on its own gradients alone, and a row that half of a batch asks for is work for many threads.
#pragma once

#include "../numeric/math.hpp"

COLDROW_BEGIN

inline constexpr int kPart = 64;
inline constexpr int kLongRun = 2 * kPart;
inline constexpr int kMaxParts = 64;

// Lookups of a run of `length` that belong to one slice: those of one part where there are no slices.
COLDROW_HD constexpr std::int64_t slice_length(std::int64_t length) {
  return divide_up(divide_up(length, kPart), kMaxParts) * kPart;
}

COLDROW_END
