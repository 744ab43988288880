// Tables, policies and a batch of lookups whose types are known at run time only: what the driver of several
// tables (host/table_batch.hpp) and its kin for devices (device/table_batch.cuh) work on.
//
// Plain structs of numbers and pointers, outside the namespace of a build: a program that has several
// builds of the drivers, one per instruction set, makes them once and hands them to any.
#pragma once

#include "../numeric/types.hpp"
#include "batch.hpp"

namespace coldrow {

enum class IndexType : std::int32_t { i32, i64 };

// The state that an optimizer may have.
inline constexpr int kMaxScalars = 4;
inline constexpr int kMaxVectors = 4;

// The policies of a table. The structs pointed to have the same layout in every build of one version of
// these headers. host::UpdateOf (host/table_batch.hpp) makes one.
struct AnyUpdate {
  // host::OptimizerKernels; of a table on a device, device::OptimizerUpdates.
  const void* optimizer_functions = nullptr;
  const void* optimizer = nullptr;     // the policy's struct
  const void* decay = nullptr;         // AnyDecay
  const void* rounding = nullptr;      // the policy's struct
  std::int32_t optimizer_number = -1;  // in BuiltinOptimizers; -1: none of them
  std::int32_t rounding_number = 0;    // in BuiltinRoundings
  bool decay_state = false;
};

// A table in the caller's memory.
struct AnyTable {
  const char* name = nullptr;  // of no meaning here
  void* weight = nullptr;      // [rows, dim], contiguous
  NumericType dtype = NumericType::float32;
  std::int64_t rows = 0;
  std::int32_t dim = 0;
  std::int32_t* prev_iter = nullptr;  // [rows]; null where no state is needed: a lookup as stored
  std::int64_t prev_iter_stride = 1;  // in elements
  float* scalars[kMaxScalars] = {};   // the optimizer's state per row, [rows] each
  std::int64_t scalar_strides[kMaxScalars] = {};
  float* vectors[kMaxVectors] = {};  // and per element, [rows, dim] each, contiguous
  std::uint64_t key = 0;  // for stochastic rounding: hash of the name of the whole table,
  std::int64_t row_offset = 0, col_offset = 0;  // and where in it this one begins
  AnyUpdate update{};
  double lr = 0.0;
};

// A batch of lookups, as in table/batch.hpp.
struct AnyBatch {
  const AnyTable* tables = nullptr;
  std::int32_t num_tables = 0;
  Feature* features =
      nullptr;  // in order of first_bag; check_batch() finds where their indices lie
  std::int32_t num_features = 0;
  IndexType index_type = IndexType::i64;
  const void* indices = nullptr;  // [positions], rows of their tables
  const void* offsets = nullptr;  // [bags + 1]; null: every index is a bag of its own
  std::int64_t bags = 0, positions = 0;
  bool pooled = true, mean = false;
  const float* per_sample_weights = nullptr;  // [positions] or null; with pooling by sum only
  // The step this batch belongs to: clock + 1, the first is 1. 2^31 for a read after the last.
  std::int64_t step = 1;
  std::int32_t epoch_start = 0;  // first step of the running epoch, 0: none was declared
  int threads = 1;               // of the host
};

// How many rows, and the first of them.
struct RowsFound {
  std::int64_t count = 0;
  std::int32_t table = -1;
  std::int64_t row = -1;
};

struct UpdateReport {
  RowsFound nonfinite;
  RowsFound stale;       // prev_iter not before this step
  bool refused = false;  // because of one of them; then nothing was written
};

}  // namespace coldrow
