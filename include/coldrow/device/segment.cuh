// From a batch of indices to runs of equal rows, and the list of what is to be summed for the long
// ones.
//
//   linearise   one entry per position: key (row, all tables numbered through), output row, scale
//   sort        by key, stable (radix_sort.cuh): duplicates keep the order of the batch
//   runs        where runs of equal keys begin, in order; long runs apart, cut into parts
//
// All numbers of the host are upper bounds: how many runs there are is known on the device only.
#pragma once

#include "batch.cuh"
#include "group.cuh"
#include "workspace.hpp"

COLDROW_BEGIN

namespace device {

// ------------------------------------------------------------------------------------------ views

// What travels with a key: the output row whose gradient it stands for, and, where weights or
// means are in play, what that gradient is multiplied by.
struct ScaledRow {
  std::uint32_t out_row;
  float scale;
};

// Sorted or not: keys of 32 bits where all rows fit, and payloads of 4 bytes where no scale is needed.
// (Wide keys always have a scale: so there are three sorts to compile, not four.)
struct Entries {
  void* keys = nullptr;
  void* payloads = nullptr;
  bool wide = false;
  bool scaled = false;

  __device__ __forceinline__ std::uint64_t key(std::int64_t i) const {
    return wide ? static_cast<const std::uint64_t*>(keys)[i]
                : static_cast<const std::uint32_t*>(keys)[i];
  }
  __device__ __forceinline__ ScaledRow payload(std::int64_t i) const {
    if (scaled) return static_cast<const ScaledRow*>(payloads)[i];
    return {static_cast<const std::uint32_t*>(payloads)[i], 1.0f};
  }
  __device__ __forceinline__ void put(std::int64_t i, std::uint64_t key, std::uint32_t out_row,
                                      float scale) const {
    if (wide) {
      static_cast<std::uint64_t*>(keys)[i] = key;
    } else {
      static_cast<std::uint32_t*>(keys)[i] = static_cast<std::uint32_t>(key);
    }
    if (scaled) {
      static_cast<ScaledRow*>(payloads)[i] = {out_row, scale};
    } else {
      static_cast<std::uint32_t*>(payloads)[i] = out_row;
    }
  }
};

// A run of more than kLongRun entries, [begin, end); its parts and slices are numbered through from
// first_part and first_slice on. slices is 0 where there are no more than kMaxParts parts.
struct LongRun {
  std::int32_t begin, end;
  std::int32_t first_part, parts;
  std::int32_t first_slice, slices;
};

struct RunCounts {
  std::int32_t runs, long_runs, parts, slices;

  __device__ friend RunCounts operator+(const RunCounts& a, const RunCounts& b) {
    return {a.runs + b.runs, a.long_runs + b.long_runs, a.parts + b.parts, a.slices + b.slices};
  }
  __device__ friend RunCounts operator-(const RunCounts& a, const RunCounts& b) {
    return {a.runs - b.runs, a.long_runs - b.long_runs, a.parts - b.parts, a.slices - b.slices};
  }
};

struct Runs {
  std::int32_t* begin = nullptr;  // [counts->runs + 1]: run r is entries [begin[r], begin[r + 1])
  LongRun* long_runs = nullptr;   // [counts->long_runs], in order
  RunCounts* counts = nullptr;    // totals
  std::int32_t* table_run = nullptr;  // [num_tables + 1]: the first run of each table
};

// The run's number among the long ones.
__device__ __forceinline__ std::int32_t long_run_at(const Runs& runs, std::int32_t begin) {
  return last_at_or_before(
      runs.counts->long_runs, [&](std::int32_t l) { return runs.long_runs[l].begin; }, begin);
}

// -------------------------------------------------------------------------------------- linearise

namespace kernel {

inline constexpr int kPositionsPerWarp = 256;

// A warp takes 256 neighbouring positions, whatever bags they belong to, so that neither many short
// bags nor a long one leave lanes idle: it looks for the bag of its first position, then holds 32
// bags' ends in its lanes, in which each lane finds its own.
template <class = void>
__global__ void linearise(Batch batch, Layout layout, Entries entries, const Report* report) {
  constexpr unsigned kAll = 0xffffffffu;
  const bool bad = refused(report);
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const std::int64_t warps = global_threads() / 32;
  const bool by_bag = !bad && batch.pooled && batch.offsets.data != nullptr;
  for (std::int64_t warp = global_thread() / 32; warp * kPositionsPerWarp < batch.positions;
       warp += warps) {
    const std::int64_t end = min_of<std::int64_t>(batch.positions, (warp + 1) * kPositionsPerWarp);
    std::int64_t first_bag = 0;
    bool search = true;
    for (std::int64_t next = warp * kPositionsPerWarp; next < end;) {
      std::int64_t stop = end;
      std::int64_t my_end = 0;  // of bag first_bag + lane
      std::int64_t window_begin = 0;
      if (by_bag) {
        if (search) {
          first_bag =
              last_at_or_before(batch.bags, [&](std::int64_t b) { return batch.offsets[b]; }, next);
        }
        my_end = batch.offsets[min_of(first_bag + lane + 1, batch.bags)];
        window_begin = batch.offsets[first_bag];
        const std::int64_t window_end = __shfl_sync(kAll, my_end, 31);
        search = window_end <= next;  // nothing but empty bags
        if (search) continue;
        stop = min_of(end, window_end);
      }
      for (std::int64_t at = next; at < stop; at += 32) {
        const std::int64_t p = at + lane;
        // The bag of p within the window: the first that ends after it.
        int bag = 0;
        std::int64_t begin = window_begin;
        std::int64_t bag_end = 0;
        if (by_bag) {
          for (int half = 16; half > 0; half /= 2) {
            const std::int64_t e = __shfl_sync(kAll, my_end, bag + half - 1);
            if (e <= p) bag += half;
          }
          const std::int64_t before = __shfl_sync(kAll, my_end, max_of(bag, 1) - 1);
          bag_end = __shfl_sync(kAll, my_end, bag);
          if (bag > 0) begin = before;
        }
        if (p >= stop) continue;
        if (bad) {  // nothing will be updated; the sort still reads what is here
          entries.put(p, 0, 0, 0.0f);
          continue;
        }
        const Feature& feature = layout.features[feature_of(layout, p)];
        const std::uint64_t key =
            static_cast<std::uint64_t>(layout.table_base[feature.table] + batch.indices[p]);
        std::int64_t out_row = feature.first_row + (p - feature.first_position);
        float scale = 1.0f;
        if (by_bag) {
          out_row = first_bag + bag;
          if (batch.mean) scale = 1.0f / static_cast<float>(bag_end - begin);
        }
        if (batch.pooled && batch.per_sample_weights != nullptr) {
          scale = batch.per_sample_weights[p];
        }
        entries.put(p, key, static_cast<std::uint32_t>(out_row), scale);
      }
      next = stop;
      first_bag += 32;
    }
  }
}

// ------------------------------------------------------------------------------------------- runs

inline constexpr int kEntriesPerWarp = 1024;

// Is entry i the first of a run, and what follows from that?
struct Head {
  bool head = false;
  LongRun run{};  // end == 0 where the run is not long
};
__device__ inline Head head_at(const Entries& sorted, std::int64_t n, std::int64_t i) {
  Head out;
  if (i >= n) return out;
  const std::uint64_t key = sorted.key(i);
  out.head = i == 0 || sorted.key(i - 1) != key;
  if (!out.head || n - i <= kLongRun || sorted.key(i + kLongRun) != key) return out;
  // Long, which is rare: look for the end.
  std::int64_t same = i + kLongRun;  // is in the run
  std::int64_t other = n;            // is not
  while (other - same > 1) {
    const std::int64_t middle = same + (other - same) / 2;
    if (sorted.key(middle) == key) {
      same = middle;
    } else {
      other = middle;
    }
  }
  out.run.begin = static_cast<std::int32_t>(i);
  out.run.end = static_cast<std::int32_t>(other);
  out.run.parts = static_cast<std::int32_t>(divide_up(other - i, kPart));
  if (out.run.parts > kMaxParts) {
    const std::int64_t parts_per_slice = divide_up(out.run.parts, kMaxParts);
    out.run.slices = static_cast<std::int32_t>(divide_up(out.run.parts, parts_per_slice));
  }
  return out;
}

// The inclusive sum over the lanes up to this one.
__device__ inline std::int32_t sum_up_to_lane(std::int32_t x) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int32_t other = __shfl_up_sync(0xffffffffu, x, distance);
    if (static_cast<int>(threadIdx.x & 31u) >= distance) x += other;
  }
  return x;
}
__device__ inline RunCounts sum_up_to_lane(const RunCounts& x) {
  return {sum_up_to_lane(x.runs), sum_up_to_lane(x.long_runs), sum_up_to_lane(x.parts),
          sum_up_to_lane(x.slices)};
}

// Each warp's entries are kEntriesPerWarp neighbours. counts: one per warp.
template <class = void>
__global__ void count_runs(Entries sorted, std::int64_t n, RunCounts* counts,
                           const Report* report) {
  if (refused(report)) return;
  const std::int64_t warps = global_threads() / 32;
  const int lane = static_cast<int>(threadIdx.x & 31u);
  for (std::int64_t warp = global_thread() / 32; warp * kEntriesPerWarp < n; warp += warps) {
    RunCounts mine{};
    for (int k = 0; k < kEntriesPerWarp; k += 32) {
      const Head h = head_at(sorted, n, warp * kEntriesPerWarp + k + lane);
      mine.runs += h.head ? 1 : 0;
      mine.long_runs += h.run.end != 0 ? 1 : 0;
      mine.parts += h.run.parts;
      mine.slices += h.run.slices;
    }
    const RunCounts sum = sum_up_to_lane(mine);
    if (lane == 31) counts[warp] = sum;
  }
}

inline constexpr int kMostScanThreads = 1024;

// Replaces counts by the sums of those before, and writes the totals. One block.
template <class = void>
__global__ void __launch_bounds__(kMostScanThreads, 1)
    scan_counts(RunCounts* counts, std::int64_t count, RunCounts* totals, const Report* report) {
  __shared__ RunCounts sums[32];  // of the block's warps up to each
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  RunCounts before{};
  if (refused(report)) count = 0;
  for (std::int64_t first = 0; first < count; first += blockDim.x) {
    const std::int64_t i = first + threadIdx.x;
    const RunCounts mine = i < count ? counts[i] : RunCounts{};
    const RunCounts sum = sum_up_to_lane(mine);
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      const RunCounts up_to = sum_up_to_lane(lane < warps ? sums[lane] : RunCounts{});
      if (lane < warps) sums[lane] = up_to;
    }
    __syncthreads();
    const RunCounts others = warp > 0 ? before + sums[warp - 1] : before;
    if (i < count) counts[i] = others + (sum - mine);
    before = before + sums[warps - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) *totals = before;
}

template <class = void>
__global__ void write_runs(Entries sorted, std::int64_t n, const RunCounts* counts, Runs runs,
                           const Report* report) {
  if (refused(report)) return;
  constexpr unsigned kAll = 0xffffffffu;
  const std::int64_t warps = global_threads() / 32;
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const unsigned below = (1u << lane) - 1u;
  for (std::int64_t warp = global_thread() / 32; warp * kEntriesPerWarp < n; warp += warps) {
    RunCounts at = counts[warp];
    for (int k = 0; k < kEntriesPerWarp; k += 32) {
      const std::int64_t i = warp * kEntriesPerWarp + k + lane;
      Head h = head_at(sorted, n, i);
      const unsigned heads = __ballot_sync(kAll, h.head);
      if (h.head) runs.begin[at.runs + __popc(heads & below)] = static_cast<std::int32_t>(i);
      at.runs += __popc(heads);
      const unsigned longs = __ballot_sync(kAll, h.run.end != 0);
      if (longs == 0) continue;
      const std::int32_t parts = sum_up_to_lane(h.run.parts);
      const std::int32_t slices = sum_up_to_lane(h.run.slices);
      if (h.run.end != 0) {
        h.run.first_part = at.parts + parts - h.run.parts;
        h.run.first_slice = at.slices + slices - h.run.slices;
        runs.long_runs[at.long_runs + __popc(longs & below)] = h.run;
      }
      at.long_runs += __popc(longs);
      at.parts += __shfl_sync(kAll, parts, 31);
      at.slices += __shfl_sync(kAll, slices, 31);
    }
  }
}

// The end of the last run, and where each table's runs begin.
template <class = void>
__global__ void find_tables(Entries sorted, std::int64_t n, Layout layout, Runs runs,
                            const Report* report) {
  const std::int32_t count = runs.counts->runs;
  const bool bad = refused(report);
  for (std::int64_t t = global_thread(); t <= layout.num_tables; t += global_threads()) {
    if (bad) {
      runs.table_run[t] = 0;
      continue;
    }
    const auto base = static_cast<std::uint64_t>(layout.table_base[t]);
    std::int32_t lo = 0, hi = count;  // the first run with a key of at least base
    while (lo < hi) {
      const std::int32_t middle = lo + (hi - lo) / 2;
      if (sorted.key(runs.begin[middle]) < base) {
        lo = middle + 1;
      } else {
        hi = middle;
      }
    }
    runs.table_run[t] = lo;
    if (t == 0) runs.begin[count] = static_cast<std::int32_t>(n);
  }
}

}  // namespace kernel

// ---------------------------------------------------------------------------------------- drivers

// What is known of a batch on the host; the sizes of its workspace follow from it.
struct Extent {
  std::int64_t positions = 0;
  std::int64_t total_rows = 0;  // of all tables
  std::int32_t num_tables = 0;
  std::int32_t widest = 0;  // largest dim of a table
  bool scaled = false;      // mean, or per_sample_weights
  Machine machine{};
};

constexpr bool wide_keys(const Extent& e) { return e.total_rows > (std::int64_t{1} << 32); }
constexpr bool scaled_payloads(const Extent& e) { return e.scaled || wide_keys(e); }

// Bits of the largest key, at least one.
constexpr int key_bits(const Extent& e) {
  int bits = 1;
  while (bits < 63 && max_of<std::int64_t>(0, e.total_rows - 1) >> bits != 0) ++bits;
  return bits;
}

// Parts of long runs there can be: a run of more than kLongRun entries has one per kPart, and one more.
constexpr std::int64_t most_parts(std::int64_t positions) {
  return positions <= kLongRun ? 0 : positions / kPart + positions / kLongRun;
}

struct SegmentSpace {
  Entries entries[2];  // one is sorted into the other and back
  RunCounts* warp_counts = nullptr;
  Runs runs;
  void* sort_temp = nullptr;
  std::size_t sort_temp_bytes = 0;
};

// Takes what segment() works in. sort_temp_bytes: of radix_sort_bytes().
inline SegmentSpace take_segment_space(Workspace& w, const Extent& e, std::size_t sort_temp_bytes) {
  SegmentSpace s;
  const std::int64_t n = e.positions;
  for (Entries& entries : s.entries) {
    entries.wide = wide_keys(e);
    entries.scaled = scaled_payloads(e);
    entries.keys = w.take<unsigned char>(n * (entries.wide ? 8 : 4));
    entries.payloads = w.take<unsigned char>(n * (entries.scaled ? 8 : 4));
  }
  s.warp_counts = w.take<RunCounts>(divide_up(n, kernel::kEntriesPerWarp));
  s.runs.begin = w.take<std::int32_t>(min_of(n, e.total_rows) + 1);
  s.runs.long_runs = w.take<LongRun>(n / kLongRun);
  s.runs.counts = w.take<RunCounts>(1);
  s.runs.table_run = w.take<std::int32_t>(e.num_tables + 1);
  s.sort_temp = w.take<unsigned char>(static_cast<std::int64_t>(sort_temp_bytes));
  s.sort_temp_bytes = sort_temp_bytes;
  return s;
}

// Step one: an entry per position, into space.entries[0].
inline void linearise(Queue& queue, const Batch& batch, const Layout& layout, const Extent& e,
                      const SegmentSpace& space, const Report* report) {
  if (e.positions == 0) return;
  const std::int64_t warps = divide_up(e.positions, kernel::kPositionsPerWarp);
  queue.run(kernel::linearise<>, choose_flat(warps * 32, e.machine), batch, layout,
            space.entries[0], report);
}

// Step three, after the sort: the runs of `sorted`.
inline void find_runs(Queue& queue, const Layout& layout, const Extent& e, const Entries& sorted,
                      const SegmentSpace& space, const Report* report) {
  const std::int64_t warps = divide_up(e.positions, kernel::kEntriesPerWarp);
  const Launch by_warp = choose_flat(warps * 32, e.machine);
  if (warps > 0) {
    queue.run(kernel::count_runs<>, by_warp, sorted, e.positions, space.warp_counts, report);
  }
  const int scan_threads = static_cast<int>(
      min_of<std::int64_t>(kernel::kMostScanThreads, divide_up(warps + 1, 32) * 32));
  queue.run(kernel::scan_counts<>, Launch{1, scan_threads, 0}, space.warp_counts, warps,
            space.runs.counts, report);
  if (warps > 0) {
    queue.run(kernel::write_runs<>, by_warp, sorted, e.positions,
              static_cast<const RunCounts*>(space.warp_counts), space.runs, report);
  }
  queue.run(kernel::find_tables<>, choose_flat(e.num_tables + 1, e.machine), sorted, e.positions,
            layout, space.runs, report);
}

}  // namespace device

COLDROW_END
