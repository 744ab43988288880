// A batch of lookups, or of gradients, over several tables in one call: what the Python module runs on a
// device. The counterpart of host/table_batch.hpp.
//
//   lookup             forward: pool rows, as stored or with the decay they owe (read)
//   weight_gradients   backward: the gradient of per_sample_weights
//   update             backward: for each row that the batch touches, sum its gradients and update it once
//
// Each puts its kernels on the queue and returns. It checks the batch itself, on the device; what it finds
// is in the report (batch.cuh). Memory to work in comes from `allocate`: given a number of bytes, it returns
// device memory aligned to 256 that stays until the kernels have run. The tables' AnyUpdate has
// the optimizer's device::OptimizerUpdates.
#pragma once

#include <memory>
#include <vector>

#include "apply.cuh"
#include "lookup.cuh"
#include "sort.cuh"
#include "update_kernels.cuh"

COLDROW_BEGIN

namespace device {

// Numbers that kernels read when they run, so that a captured graph does not freeze them. A null address:
// what the batch itself says.
struct StepAddresses {
  const std::int64_t* clock = nullptr;  // steps done; null: AnyBatch::step - 1
  const std::int64_t* epoch_start = nullptr;
  const double* const* lrs = nullptr;  // [num_tables]; null: AnyTable::lr
};

struct UpdateOptions {
  // What to do with a row whose update is not finite.
  OnNonfinite on_nonfinite = OnNonfinite::skip;
  // What to look for first; where it is found nothing is written: rows whose update is not finite, and
  // rows whose prev_iter is not before the step.
  bool refuse_nonfinite = false;
  bool refuse_stale = false;
  bool check_only = false;            // look, and write nothing
  std::int64_t* clock = nullptr;      // ticks unless the batch is refused; or null
  std::int64_t* nonfinite = nullptr;  // rows left alone are added; null: the report counts them
};

// ------------------------------------------------------------------------------------- descriptors

// What the host composes for the device: one block of bytes, brought there by one upload(). Pieces are
// named by their places until it is known where the block will lie.
class Descriptors {
 public:
  template <class T>
  struct Piece {
    std::size_t at = 0;
  };
  template <class T>
  Piece<T> put(const std::vector<T>& values) {
    return {put_bytes(values.data(), values.size() * sizeof(T))};
  }
  std::size_t put_bytes(const void* from, std::size_t count) {
    const std::size_t at = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(at + count);
    if (count > 0) __builtin_memcpy(bytes_.data() + at, from, count);
    return at;
  }
  void place(Workspace& w) {
    device_ = w.take<unsigned char>(static_cast<std::int64_t>(bytes_.size()));
  }
  void* at(std::size_t place) const { return device_ + place; }
  template <class T>
  T* at(Piece<T> piece) const {
    return reinterpret_cast<T*>(device_ + piece.at);
  }
  void upload(Queue& queue) const { device::upload(queue, device_, bytes_.data(), bytes_.size()); }

 private:
  std::vector<unsigned char> bytes_;
  unsigned char* device_ = nullptr;
};

// What every call has: tables and features, as the device sees them.
struct CallInputs {
  Batch batch;
  Extent extent;
  StepInputs inputs;
  Descriptors descriptors;
  Descriptors::Piece<TableInfo> tables;
  Descriptors::Piece<std::int64_t> base;
  Descriptors::Piece<Feature> features;
  Descriptors::Piece<std::int32_t> by_table, first_feature;

  CallInputs(const AnyBatch& b, const StepAddresses& step, Machine machine) {
    const bool wide = b.index_type == IndexType::i64;
    batch.indices = {b.indices, wide};
    batch.offsets = {b.offsets, wide};
    batch.bags = b.bags;
    batch.positions = b.positions;
    batch.pooled = b.pooled;
    batch.mean = b.mean;
    batch.per_sample_weights = b.per_sample_weights;
    inputs.clock = {step.clock, b.step - 1};
    inputs.epoch_start = {step.epoch_start, b.epoch_start};

    std::vector<TableInfo> infos;
    std::vector<std::int64_t> first_row{0};
    for (std::int32_t t = 0; t < b.num_tables; ++t) {
      const AnyTable& table = b.tables[t];
      infos.push_back(
          {table.weight, table.rows, table.dim, {table.prev_iter, table.prev_iter_stride}});
      first_row.push_back(first_row.back() + table.rows);
      extent.widest = max_of(extent.widest, table.dim);
    }
    const std::vector<Feature> all(b.features, b.features + b.num_features);
    std::vector<std::int32_t> grouped(all.size()), first(infos.size() + 1);
    group_features(all.data(), b.num_features, b.num_tables, grouped.data(), first.data());
    tables = descriptors.put(infos);
    base = descriptors.put(first_row);
    features = descriptors.put(all);
    by_table = descriptors.put(grouped);
    first_feature = descriptors.put(first);

    extent.positions = b.positions;
    extent.total_rows = first_row.back();
    extent.num_tables = b.num_tables;
    extent.scaled = b.per_sample_weights != nullptr || (b.mean && b.pooled);
    extent.machine = machine;
  }

  Layout layout(const AnyBatch& b) const {
    const Descriptors& d = descriptors;
    return {d.at(tables),   d.at(base),     b.num_tables,       d.at(features),
            b.num_features, d.at(by_table), d.at(first_feature)};
  }
};

inline Scalar<double> lr_of(const AnyBatch& b, const StepAddresses& step, std::int32_t table) {
  return {step.lrs == nullptr ? nullptr : step.lrs[table], b.tables[table].lr};
}

// ------------------------------------------------------------------------------------------ lookup

// The groups of features that a lookup launches for, by the type of their weights, and what is read
// with their rows.
struct LookupCall {
  CallInputs common;
  Descriptors::Piece<std::int32_t> features[StoredTypes::size];
  std::int32_t counts[StoredTypes::size] = {};
  Descriptors::Piece<ReadRecipe<AnyDecay>> recipes{};
  ReadStep<AnyDecay>* reads = nullptr;
  std::int32_t* first_block = nullptr;

  LookupCall(const AnyBatch& b, const StepAddresses& step, bool read, Machine machine)
      : common(b, step, machine) {
    for (int type = 0; type < StoredTypes::size; ++type) {
      std::vector<std::int32_t> numbers;
      for (std::int32_t f = 0; f < b.num_features; ++f) {
        if (static_cast<int>(b.tables[b.features[f].table].dtype) == type) numbers.push_back(f);
      }
      counts[type] = static_cast<std::int32_t>(numbers.size());
      features[type] = common.descriptors.put(numbers);
    }
    if (!read) return;
    std::vector<ReadRecipe<AnyDecay>> all;
    for (std::int32_t t = 0; t < b.num_tables; ++t) {
      all.push_back({*static_cast<const AnyDecay*>(b.tables[t].update.decay), lr_of(b, step, t)});
    }
    recipes = common.descriptors.put(all);
  }

  std::size_t take(const AnyBatch& b, bool read, void* base) {
    Workspace w(base);
    common.descriptors.place(w);
    first_block = w.take<std::int32_t>(b.num_features + 1);
    reads = w.take<ReadStep<AnyDecay>>(read ? b.num_tables : 0);
    return w.bytes();
  }
};

// Checks the batch and calls run(weight, group, layout, reads, call) for each type of weights.
template <class Types, class Allocate, class F>
void for_weight_types(Queue& queue, Machine machine, const AnyBatch& b, const StepAddresses& step,
                      bool read, bool count, Report* report, const Allocate& allocate,
                      const F& run) {
  LookupCall call(b, step, read, machine);
  call.take(b, read, allocate(call.take(b, read, nullptr)));
  const CallInputs& common = call.common;
  const Descriptors& d = common.descriptors;
  const Layout layout = common.layout(b);
  d.upload(queue);
  begin_batch(queue, report, count);
  check_batch(queue, common.batch, layout, report, machine);
  if (read) {
    prepare_reads<AnyDecay>(queue, common.inputs, d.at(call.recipes), b.num_tables, call.reads,
                            report);
  }
  Types::for_each([&](auto one) {
    using Weight = typename decltype(one)::type;
    constexpr int type = StoredTypes::number<Weight>;
    const FeatureGroup group{d.at(call.features[type]), call.counts[type]};
    if (read) {
      run(Weight{}, group, layout, static_cast<const ReadStep<AnyDecay>*>(call.reads), call);
    } else {
      run(Weight{}, group, layout, static_cast<const ReadStored*>(nullptr), call);
    }
  });
  finish_batch(queue, common.batch, layout, report, nullptr);
}

// Writes the output rows. read: rows as they have become, by the decay that they owe. out_elements: of the
// whole output, which a refused batch sets to zeros; 0: it leaves it alone. Types: those that weights may have.
template <class Types = StoredTypes, class Allocate>
void lookup(Queue& queue, const AnyBatch& b, const StepAddresses& step, bool read, void* out,
            NumericType out_type, std::int64_t out_elements, Report* report, Machine machine,
            const Allocate& allocate) {
  for_weight_types<Types>(queue, machine, b, step, read, true, report, allocate,
                          [&](auto weight, const FeatureGroup& group, const Layout& layout,
                              const auto* reads, const LookupCall& call) {
                            device::lookup<decltype(weight)>(
                                queue, group, call.common.batch, layout, reads, report, out,
                                out_type, out_elements, call.first_block, machine);
                          });
}

// out[p], [positions]: the gradient of per_sample_weights, where grad is that of the output.
template <class Types = StoredTypes, class Allocate>
void weight_gradients(Queue& queue, const AnyBatch& b, const StepAddresses& step, bool read,
                      const void* grad, NumericType grad_type, float* out, Report* report,
                      Machine machine, const Allocate& allocate) {
  for_weight_types<Types>(queue, machine, b, step, read, false, report, allocate,
                          [&](auto weight, const FeatureGroup& group, const Layout& layout,
                              const auto* reads, const LookupCall& call) {
                            device::weight_gradients<decltype(weight)>(
                                queue, group, call.common.batch, layout, reads, report, grad,
                                grad_type, out, call.first_block, machine);
                          });
}

// ------------------------------------------------------------------------------------------ update

// Tables that share a launch.
struct UpdateGroup {
  const UpdateKernels* kernel;
  std::int32_t count;
  std::size_t tables, recipes;  // in the descriptors
  Descriptors::Piece<std::int32_t> numbers;
  void* updates;
};

inline const UpdateKernels* rows_kernel(const AnyTable& table) {
  const auto& functions = *static_cast<const OptimizerUpdates*>(table.update.optimizer_functions);
  return functions.of_type[static_cast<int>(table.dtype)][table.update.rounding_number];
}

struct UpdateCall {
  CallInputs common;
  std::vector<UpdateGroup> groups;
  std::int64_t sums_floats = 0;
  std::size_t sort_bytes = 0;
  SegmentSpace segments;
  ApplySpace space;

  UpdateCall(Queue& queue, const AnyBatch& b, const StepAddresses& step, OnNonfinite on_nonfinite,
             Machine machine)
      : common(b, step, machine) {
    queue.add(radix_sort_bytes(common.extent, sort_bytes));
    std::vector<bool> done(static_cast<std::size_t>(b.num_tables));
    for (std::int32_t t = 0; t < b.num_tables; ++t) {
      if (done[static_cast<std::size_t>(t)]) continue;
      const UpdateKernels* const k = rows_kernel(b.tables[t]);
      std::vector<std::int32_t> numbers;
      for (std::int32_t other = t; other < b.num_tables; ++other) {
        if (rows_kernel(b.tables[other]) != k) continue;
        numbers.push_back(other);
        done[static_cast<std::size_t>(other)] = true;
      }
      // (New memory is aligned for any of these structs.)
      const std::unique_ptr<unsigned char[]> tables(
          new unsigned char[numbers.size() * k->table_bytes]);
      const std::unique_ptr<unsigned char[]> recipes(
          new unsigned char[numbers.size() * k->recipe_bytes]);
      for (std::size_t i = 0; i < numbers.size(); ++i) {
        k->describe(b.tables[numbers[i]], lr_of(b, step, numbers[i]), on_nonfinite,
                    tables.get() + i * k->table_bytes, recipes.get() + i * k->recipe_bytes);
      }
      Descriptors& d = common.descriptors;
      groups.push_back({k, static_cast<std::int32_t>(numbers.size()),
                        d.put_bytes(tables.get(), numbers.size() * k->table_bytes),
                        d.put_bytes(recipes.get(), numbers.size() * k->recipe_bytes),
                        d.put(numbers), nullptr});
      sums_floats = max_of(sums_floats, k->sums_floats(common.extent));
    }
  }

  std::size_t take(void* base) {
    Workspace w(base);
    common.descriptors.place(w);
    for (UpdateGroup& g : groups) {
      g.updates =
          w.take<unsigned char>(g.count * static_cast<std::int64_t>(g.kernel->update_bytes));
    }
    segments = take_segment_space(w, common.extent, sort_bytes);
    space = take_apply_space(w, common.extent, sums_floats);
    return w.bytes();
  }
};

// One step.
template <class Allocate>
void update(Queue& queue, const AnyBatch& b, const StepAddresses& step, const Gradient& grad,
            const UpdateOptions& options, Report* report, Machine machine,
            const Allocate& allocate) {
  UpdateCall call(queue, b, step, options.on_nonfinite, machine);
  if (queue.error != cudaSuccess) return;
  call.take(allocate(call.take(nullptr)));
  const CallInputs& common = call.common;
  const Descriptors& d = common.descriptors;
  const Layout layout = common.layout(b);

  d.upload(queue);
  // (Where the clock is on the device, the forward has counted this batch.)
  begin_batch(queue, report, step.clock == nullptr);
  check_batch(queue, common.batch, layout, report, machine);
  for (const UpdateGroup& g : call.groups) {
    g.kernel->prepare(queue, common.inputs, d.at(g.recipes), d.at(g.numbers), g.count, g.updates,
                      report);
  }
  const Entries sorted = segment(queue, common.batch, layout, common.extent, call.segments, report);
  sum_long_runs(queue, layout, common.extent, grad, sorted, call.segments.runs, call.space, report);
  const auto apply = [&](Pass pass) {
    for (const UpdateGroup& g : call.groups) {
      g.kernel->apply(queue, d.at(g.tables), d.at(g.numbers), g.updates, g.count, layout,
                      common.extent, grad, sorted, call.segments.runs, call.space, pass, report);
    }
  };
  const int checks = (options.refuse_stale ? static_cast<int>(Pass::check_stale) : 0) |
                     (options.refuse_nonfinite ? static_cast<int>(Pass::check_finite) : 0);
  if (checks != 0) apply(static_cast<Pass>(checks));
  if (!options.check_only) apply(Pass::update);
  finish_batch(queue, common.batch, layout, report, options.check_only ? nullptr : options.clock,
               options.nonfinite);
}

}  // namespace device

COLDROW_END
