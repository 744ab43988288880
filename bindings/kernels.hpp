// What the module asks of its kernels: plain structs, the same for every instruction-set build of
// kernels.cpp. Nothing here includes coldrow: its types carry the name of the build they belong to.
#pragma once

#include <cstddef>
#include <cstdint>

namespace coldrow_module {

enum class DType : std::int32_t { f32, f16, bf16 };
enum class IndexType : std::int32_t { i32, i64 };
// In the order of the list in kernels.cpp. (Adam's two kinds differ in their state.)
enum class OptimizerKind : std::int32_t {
  sgd,
  rowwise_rmsprop,
  rowwise_adagrad,
  adagrad,
  adam,
  adam_by_touches,
  partial_rowwise_adam,
  partial_rowwise_adam_by_touches,
  external,
};
enum class RoundingKind : std::int32_t { nearest, stochastic };
enum class OnNonfinite : std::int32_t { raise, skip, propagate };
// Same values as coldrow::DecayKind.
enum class DecayName : std::int32_t {
  none,
  linear_clipped,
  cumulative_linear,
  exponential,
  constant,
  epoch_reset,
  external,
};

inline constexpr int kMaxScalars = 4;
inline constexpr int kMaxVectors = 4;

struct UpdateArgs {
  OptimizerKind optimizer;
  double eps, beta1, beta2;        // beta1 is RowwiseRMSprop's ema_beta too
  const void* external_optimizer;  // coldrow::host::OptimizerKernels of one compiled at run time
  const void* optimizer_policy;    // its fields
  DecayName decay;
  bool epoch_gated;
  double alpha, min_shrinkage, weight_decay, half_life;
  const void* external_decay;  // coldrow::ExternalDecay of one compiled at run time
  const void* decay_policy;    // its fields
  const float* decay_table;    // CumulativeLinear's, or null
  std::int32_t decay_table_size;
  bool decay_state;
  RoundingKind rounding;
  std::uint64_t seed;
};

struct TableArgs {
  const char* name;
  void* weight;  // [rows, dim]
  DType dtype;
  std::int64_t rows;
  std::int32_t dim;
  std::int32_t* prev_iter;  // null where no state is needed (forward, charge="touch")
  std::int64_t prev_iter_stride;
  float* scalars[kMaxScalars];
  std::int64_t scalar_strides[kMaxScalars];
  float* vectors[kMaxVectors];
  std::uint64_t key;  // for stochastic rounding, with the offsets of a shard
  std::int64_t row_offset, col_offset;
  UpdateArgs update;
  double lr;
};

// coldrow::Feature, see include/coldrow/table/batch.hpp.
struct FeatureArgs {
  std::int32_t table, dim;
  std::int64_t first_bag, bags, first_position, positions, first_row, out_offset, out_stride;
};

struct BatchArgs {
  const TableArgs* tables;
  std::int32_t num_tables;
  FeatureArgs* features;  // positions are filled in by check_batch()
  std::int32_t num_features;
  IndexType index_type;
  const void* indices;
  const void* offsets;  // null: every index is a bag of its own
  std::int64_t bags, positions;
  bool pooled, mean;
  const float* per_sample_weights;
  std::int64_t step;  // the step this batch belongs to: clock + 1; 2^31 for a read after the last
  std::int32_t epoch_start;
  int threads;
};

struct Problem {
  enum Kind : std::int32_t { none, offsets_start, offsets_decrease, offsets_end, index_range };
  Kind kind;
  std::int64_t position, value;
  std::int32_t feature;
};

// How many rows, and the first of them.
struct RowsFound {
  std::int64_t count;
  std::int32_t table;
  std::int64_t row;
};

struct UpdateReport {
  RowsFound nonfinite;
  RowsFound stale;  // prev_iter not before this step
  bool refused;     // because of one of them; then nothing was written
};

// The state that an optimizer declares.
struct StateArgs {
  int scalar_states, vector_states;
  const char* names[kMaxScalars + kMaxVectors];  // scalar states first
};

// One build of kernels.cpp.
struct Kernels {
  const char* name;
  StateArgs (*state)(const UpdateArgs& update);
  // Offsets, then indices. Call it before anything else; the others trust the batch.
  Problem (*check_batch)(BatchArgs& batch);
  // Forward. read: charge the decay owed by each row read. workspace: lookup_bytes().
  std::size_t (*lookup_bytes)(const BatchArgs& batch, bool read);
  void (*lookup)(const BatchArgs& batch, bool read, void* out, DType out_type, void* workspace);
  // Gradient of per_sample_weights: out [positions].
  void (*weight_gradients)(const BatchArgs& batch, bool read, const void* grad, DType grad_type,
                           float* out, void* workspace);
  // Backward and update. check_step: refuse rows whose prev_iter is not before step. check_only:
  // look for what would be refused and write nothing.
  std::size_t (*update_bytes)(const BatchArgs& batch);
  UpdateReport (*update)(const BatchArgs& batch, const void* grad, DType grad_type,
                         OnNonfinite on_nonfinite, bool check_step, bool check_only,
                         void* workspace);
  // The factor of a touch at `step` (prev_iter 0: first touch) or of a read before it.
  float (*factor)(const UpdateArgs& update, std::int32_t prev_iter, std::int32_t step, double lr,
                  std::int32_t epoch_start, bool read);
};

// Builds this machine can run, best first, ended by null.
const Kernels* const* available_kernels();

}  // namespace coldrow_module
