// A batch of lookups in device memory, and what is wrong with it.
//
// The layout is that of table/batch.hpp. What differs: nothing is known on the host but sizes, so where
// a feature's indices lie is found on the device, and a bad batch is refused there. Whatever finds a
// problem notes it in the report; every later kernel looks at the report first and writes nothing. A
// bad index is never taken for another row.
#pragma once

#include "../table/batch.hpp"
#include "../table/table.hpp"
#include "launch.cuh"
#include "report.hpp"

COLDROW_BEGIN

namespace device {

// ----------------------------------------------------------------------------------------- views

// An int32 or int64 array. The type costs one branch that all threads take alike; as a template
// parameter it would double the kernels.
struct Integers {
  const void* data = nullptr;
  bool wide = false;  // int64
  __device__ std::int64_t operator[](std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(data)[i]
                : static_cast<const std::int32_t*>(data)[i];
  }
};

using coldrow::NumericType;

// Calls f with a zero of the type.
template <int From = 0, class F>
__device__ __forceinline__ void with_type(NumericType type, const F& f) {
  using T = StoredTypes::At<From>;
  if constexpr (From + 1 < StoredTypes::size) {
    if (type != kNumericType<T>) {
      with_type<From + 1>(type, f);
      return;
    }
  }
  f(T{});
}

// A table as those kernels see it that do not update it.
struct TableInfo {
  const void* weight = nullptr;  // [rows, dim], contiguous
  std::int64_t rows = 0;
  std::int32_t dim = 0;
  Strided<const std::int32_t> prev_iter{};  // [rows]; needed for updates and read-charged lookups
};

// Tables and features of a batch; all pointers are to device memory.
struct Layout {
  const TableInfo* tables = nullptr;  // [num_tables]
  // [num_tables + 1]: rows of all tables are numbered through, in order of the tables.
  const std::int64_t* table_base = nullptr;
  std::int32_t num_tables = 0;
  Feature* features =
      nullptr;  // [num_features], in order of first_bag; check_batch() completes them
  std::int32_t num_features = 0;
  // [num_features]: numbers of the features grouped by table, in order within one; and
  // [num_tables + 1]: where each table's begin. Needed for updates.
  const std::int32_t* features_by_table = nullptr;
  const std::int32_t* first_feature = nullptr;
};

// Fills the two host arrays of a Layout's that group features by table.
inline void group_features(const Feature* features, std::int32_t num_features,
                           std::int32_t num_tables, std::int32_t* features_by_table,
                           std::int32_t* first_feature) {
  std::int32_t next = 0;
  for (std::int32_t t = 0; t < num_tables; ++t) {
    first_feature[t] = next;
    for (std::int32_t f = 0; f < num_features; ++f) {
      if (features[f].table == t) features_by_table[next++] = f;
    }
  }
  first_feature[num_tables] = next;
}

// coldrow::Batch, with device pointers.
struct Batch {
  Integers indices;  // [positions], rows of their tables
  Integers offsets;  // [bags + 1] or null: every index is a bag of its own
  std::int64_t bags = 0;
  std::int64_t positions = 0;  // at most 2^31 - 1
  bool pooled = true;          // false: one output row per index
  bool mean = false;
  const float* per_sample_weights = nullptr;  // [positions] or null; with pooling sum only

  __device__ std::int64_t bag_begin(std::int64_t bag) const {
    return offsets.data == nullptr ? bag : offsets[bag];
  }
};

// ---------------------------------------------------------------------------------------- report

inline constexpr unsigned long long kNothing = ~0ull;

// Lower kinds and then earlier positions are smaller numbers, so that atomicMin() keeps the first,
// whatever the order in which threads find theirs.
COLDROW_HD constexpr unsigned long long pack(Refusal kind, std::uint64_t position) {
  return (static_cast<unsigned long long>(kind) << 56) | (position & ((1ull << 56) - 1));
}
__device__ __forceinline__ void note(Report* report, Refusal kind, std::uint64_t position) {
  atomicMin(&report->found, pack(kind, position));
}

__device__ __forceinline__ bool refused(const Report* report) { return report->found != kNothing; }
// For a kernel that notes problems of this kind itself: what its own blocks find must not keep the
// others from finding theirs.
__device__ __forceinline__ bool refused_before(const Report* report, Refusal kind) {
  return report->found < pack(kind, 0);
}

// The number of the table that has row `row` of all rows numbered through.
__device__ __forceinline__ std::int32_t table_of(const Layout& layout, std::uint64_t row) {
  return last_at_or_before(
      layout.num_tables,
      [&](std::int32_t t) { return static_cast<std::uint64_t>(layout.table_base[t]); }, row);
}
// The feature that has position p.
__device__ __forceinline__ std::int32_t feature_of(const Layout& layout, std::int64_t p) {
  return last_at_or_before(
      layout.num_features, [&](std::int32_t f) { return layout.features[f].first_position; }, p);
}

// --------------------------------------------------------------------------------------- kernels

// (Those without parameters are templates all the same, so that several translation units may
// include them: a kernel cannot be inline.)
namespace kernel {

template <class = void>
__global__ void begin(Report* report, bool count) {
  report->found = kNothing;
  report->rows = 0;
  if (count) ++report->batches;
}

template <class = void>
__global__ void check_offsets(Batch batch, Report* report) {
  for (std::int64_t b = global_thread(); b <= batch.bags; b += global_threads()) {
    const std::int64_t offset = batch.offsets[b];
    if (b == 0 && offset != 0) note(report, Refusal::offsets_start, 0);
    if (b < batch.bags) {
      if (offset > batch.offsets[b + 1]) note(report, Refusal::offsets_decrease, b + 1);
    } else if (offset != batch.positions) {
      note(report, Refusal::offsets_end, b);
    }
  }
}

// Where each feature's positions lie, and, unpooled, its output rows: flat, feature after feature.
// One warp.
template <class = void>
__global__ void locate_features(Batch batch, Layout layout, const Report* report) {
  const bool bad = refused(report);
  const int lane = static_cast<int>(threadIdx.x);
  std::int64_t end = 0;  // elements of the output that the features before take
  for (std::int32_t first = 0; first < layout.num_features; first += 32) {
    const std::int32_t f = first + lane;
    std::int64_t begin = 0, count = 0, elements = 0;
    if (f < layout.num_features) {
      const Feature& feature = layout.features[f];
      if (!bad) {
        begin = batch.offsets[feature.first_bag];
        count = batch.offsets[feature.first_bag + feature.bags] - begin;
      }
      elements = count * feature.dim;
    }
    std::int64_t sum = elements;  // of the lanes up to this one
    for (int distance = 1; distance < 32; distance *= 2) {
      const std::int64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (f < layout.num_features) {
      Feature& feature = layout.features[f];
      feature.first_position = begin;
      feature.positions = count;
      if (!batch.pooled) {
        feature.first_row = begin;
        feature.out_offset = end + sum - elements;
        feature.out_stride = feature.dim;
      }
    }
    end += __shfl_sync(0xffffffffu, sum, 31);
  }
}

template <class = void>
__global__ void check_indices(Batch batch, Layout layout, Report* report) {
  if (refused_before(report, Refusal::index_range)) return;
  for (std::int64_t p = global_thread(); p < batch.positions; p += global_threads()) {
    const std::int32_t table = layout.features[feature_of(layout, p)].table;
    const auto row = static_cast<std::uint64_t>(batch.indices[p]);
    if (row >= static_cast<std::uint64_t>(layout.tables[table].rows)) {
      note(report, Refusal::index_range, p);
    }
  }
}

// The end of a batch: the clock ticks, or the refusal is written down. nonfinite: takes over what the
// report has counted. One thread.
template <class = void>
__global__ void finish(Batch batch, Layout layout, Report* report, std::int64_t* clock,
                       std::int64_t* nonfinite) {
  if (!refused(report)) {
    if (clock != nullptr) ++*clock;
    if (nonfinite != nullptr) {
      *nonfinite += static_cast<std::int64_t>(report->nonfinite_rows);
      report->nonfinite_rows = 0;
    }
    return;
  }
  ++report->refused;
  if (report->kind != Refusal::none) return;
  const auto kind = static_cast<Refusal>(report->found >> 56);
  const auto position = static_cast<std::int64_t>(report->found & ((1ull << 56) - 1));
  report->kind = kind;
  report->feature = report->table = -1;
  report->position = position;
  report->value = 0;
  report->batch = report->batches;
  report->bad_rows = 0;
  report->positions = batch.positions;
  if (kind <= Refusal::offsets_end) {
    report->value = batch.offsets[position];
  } else if (kind == Refusal::index_range) {
    report->value = batch.indices[position];
    report->feature = feature_of(layout, position);
    report->table = layout.features[report->feature].table;
  } else if (kind == Refusal::step_range) {
    report->value = static_cast<std::int64_t>(report->found << 8) >> 8;
    report->position = 0;
  } else if (kind == Refusal::lr_range) {
    report->table = static_cast<std::int32_t>(position);
  } else if (kind >= Refusal::stale_row) {
    report->table = table_of(layout, static_cast<std::uint64_t>(position));
    report->position = position - layout.table_base[report->table];
    report->value = layout.tables[report->table].prev_iter[report->position];
    report->bad_rows = report->rows;
  }
}

struct Bytes {
  unsigned char data[3072];
};
template <class = void>
__global__ void store_bytes(Bytes bytes, unsigned char* to, std::int32_t count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    to[i] = bytes.data[i];
  }
}

}  // namespace kernel

// --------------------------------------------------------------------------------------- drivers

// Brings host memory to the device as parameters of kernels: asynchronous, the host memory may be
// reused at once, and a graph keeps the values of its capture (a copy from pageable memory would be
// none of these). For descriptors: some kilobytes.
inline void upload(Queue& queue, void* to, const void* from, std::size_t bytes) {
  const auto* source = static_cast<const unsigned char*>(from);
  auto* target = static_cast<unsigned char*>(to);
  for (std::size_t done = 0; done < bytes;) {
    kernel::Bytes piece{};
    const std::size_t count = min_of(bytes - done, sizeof piece.data);
    __builtin_memcpy(piece.data, source + done, count);
    queue.run(kernel::store_bytes<>, Launch{1, 256, 0}, piece, target + done,
              static_cast<std::int32_t>(count));
    done += count;
  }
}

// A new batch: nothing is wrong with it yet. count: number it (its backward is the same batch).
inline void begin_batch(Queue& queue, Report* report, bool count) {
  queue.run(kernel::begin<>, Launch{1, 1, 0}, report, count);
}

// Checks offsets and indices, and completes the layout's features.
inline void check_batch(Queue& queue, const Batch& batch, const Layout& layout, Report* report,
                        Machine machine) {
  if (batch.offsets.data != nullptr) {
    queue.run(kernel::check_offsets<>, choose_flat(batch.bags + 1, machine), batch, report);
    queue.run(kernel::locate_features<>, Launch{1, 32, 0}, batch, layout, report);
  }
  if (batch.positions > 0) {
    queue.run(kernel::check_indices<>, choose_flat(batch.positions, machine), batch, layout,
              report);
  }
}

// Ends a batch. clock: ticks unless the batch was refused; null for a forward. nonfinite: a count of
// the caller's to which the rows left alone are added, in place of the report's; or null.
inline void finish_batch(Queue& queue, const Batch& batch, const Layout& layout, Report* report,
                         std::int64_t* clock, std::int64_t* nonfinite = nullptr) {
  queue.run(kernel::finish<>, Launch{1, 1, 0}, batch, layout, report, clock, nonfinite);
}

}  // namespace device

COLDROW_END
