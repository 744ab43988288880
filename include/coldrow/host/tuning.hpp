// What the host drivers were tuned by, all in one place. No result depends on any of these numbers (the
// order of summation is table/run.hpp's). benchmarks/parts.py times the parts that they bear on; what a
// device is tuned by is in device/tuning.hpp.
#pragma once

#include "../numeric/math.hpp"

COLDROW_BEGIN

namespace host {

// ------------------------------------------------------------------------------------ prefetching

// How many entries of a batch ahead of its use a row is fetched, of the update and of the lookup; the state
// of a row that a lookup reads; and the output, in bags.
inline constexpr std::int64_t kPrefetchDistance = 64;
inline constexpr std::int64_t kLookupDistance = 64;
inline constexpr std::int64_t kStateDistance = 128;
inline constexpr std::int64_t kOutDistance = 8;

// ----------------------------------------------------------------------------------------- chunks

// Rows are updated a few at a time, so that the driver need not be compiled for every update, and what
// a row needs but once is computed for all of them in vectors. Their summed gradients, this many floats of
// them, wait in a scratch area that stays in the first-level cache.
inline constexpr int kChunkRows = 16;
inline constexpr int kChunkFloats = 4096;

// Indices whose read factors are computed before their rows are pooled: those stay in the first-level cache.
inline constexpr std::int64_t kReadChunk = 512;

// ------------------------------------------------------------------------------------------- sort

// Up to this many entries are sorted by insertion, which takes less than clearing the counters.
inline constexpr std::int64_t kInsertionSort = 48;
// Digits of the radix sort: with 11 bits the counters of a pass, 8 kB, stay in the first-level cache.
inline constexpr int kDigitBits = 11;

// ---------------------------------------------------------------------------------------- threads

// Numbers (indices times the widest dim) that one thread is worth: below that it costs more than it does.
inline constexpr std::int64_t kNumbersPerThread = 8192;
inline constexpr std::int64_t kMostThreads = 256;

// Threads that a batch of so many indices into rows of `dim` is worth, of `available`.
inline int threads_for(std::int64_t positions, std::int64_t dim, int available) {
  const std::int64_t worth = positions * dim / kNumbersPerThread + 1;
  return static_cast<int>(
      max_of<std::int64_t>(1, min_of(min_of<std::int64_t>(available, kMostThreads), worth)));
}

// Entries of one part of a table's, which goes to whichever thread is free: some parts cost more than
// others, so there are 16 to a thread where that leaves them long enough.
inline std::int64_t part_length(std::int64_t positions, int threads) {
  if (threads == 1) return INT64_MAX;  // one a table
  return max_of<std::int64_t>(2048, positions / (16 * threads));
}

// From this length on, a run of equal rows is summed by all threads together: it would keep one of them busy
// while the others have nothing left. (It is longer than a part.)
inline std::int64_t hot_length(std::int64_t positions, int threads) {
  if (threads == 1) return INT64_MAX;
  return max_of<std::int64_t>(4096, positions / (4 * threads));
}

// Whether all threads sort a table's entries together, rather than one of them.
inline bool sorted_together(std::int64_t entries, std::int64_t positions, int threads) {
  return entries > positions / (2 * threads);
}

}  // namespace host

COLDROW_END
