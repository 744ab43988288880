// What a device says of the batches it was given. Nothing here needs CUDA.
#pragma once

#include "../table/batch.hpp"

COLDROW_BEGIN

namespace device {

// Why a batch was refused; the first values are those of BatchProblem. Of several problems of a batch
// the lowest kind counts, and of those the one that comes first.
enum class Refusal : std::int32_t {
  none,
  offsets_start,      // offsets[0] is not 0
  offsets_decrease,   // position: in offsets
  offsets_end,        // the last offset is not the number of indices
  index_range,        // position: in indices
  step_range,         // value: of the clock, after which there is no step, or which is below 0
  lr_range,           // position: of the table; lr is negative, not finite or beyond float32
  epoch_start_range,  // not in [0, 2^31 - 1]
  stale_row,          // position: row; value: its prev_iter, which is not before the step
  nonfinite_row,      // position: row
};

// Where the device says what it found: memory of the caller's, all zeros at first. It is read at a
// check point of the caller's choice. After reading a refusal set kind to none for the next one.
struct Report {
  unsigned long long found;  // about the batch at work: kNothing, or what pack() makes
  unsigned long long rows;   // of the batch at work: rows that a check pass found to be refused
  // The first batch refused since kind was none.
  Refusal kind;
  std::int32_t feature;  // index_range
  std::int32_t table;    // index_range, lr_range, stale_row, nonfinite_row
  std::int64_t position, value;
  std::int64_t batch;           // which: counted by begin_batch(), from 1
  unsigned long long bad_rows;  // how many rows were refused (stale_row, nonfinite_row)
  std::int64_t positions;       // of the batch
  // Totals.
  std::int64_t batches;
  std::int64_t refused;               // calls of finish() for a refused batch
  unsigned long long nonfinite_rows;  // left alone under OnNonfinite::skip; see finish_batch()
};

static_assert(static_cast<int>(Refusal::none) == BatchProblem::none &&
                  static_cast<int>(Refusal::offsets_start) == BatchProblem::offsets_start &&
                  static_cast<int>(Refusal::offsets_decrease) == BatchProblem::offsets_decrease &&
                  static_cast<int>(Refusal::offsets_end) == BatchProblem::offsets_end &&
                  static_cast<int>(Refusal::index_range) == BatchProblem::index_range,
              "a Refusal that a host finds too has the value that BatchProblem::Kind gives it");

}  // namespace device

COLDROW_END
