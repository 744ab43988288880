// Tables of types and policies known when compiling, as a batch of several tables takes them
// (table/any.hpp).
#pragma once

#include <new>

#include "../table/any.hpp"
#include "rows.hpp"

COLDROW_BEGIN

namespace host {

// Policies known when compiling, as the tables of a batch name them; it must outlive them, and stays
// where it is. The optimizer's rows are compiled for every stored type. A RowUpdate made of it is a
// plain value: threads may share both.
template <OptimizerPolicy Optimizer = RowwiseRMSprop, DecayPolicy Decay = NoDecay,
          RoundingPolicy Rounding = Nearest>
  requires(BuiltinRoundings::has<Rounding>)
class UpdateOf {
 public:
  explicit UpdateOf(const Optimizer& optimizer = {}, const Decay& decay = {},
                    const Rounding& rounding = {}, bool decay_state = false)
      : optimizer_(optimizer), decay_(decay), rounding_(rounding), decay_state_(decay_state) {
    if constexpr (BuiltinDecays::has<Decay>) {
      any_ = AnyDecay(decay);
    } else {
      static constexpr ExternalDecay functions = ExternalDecay::of<Decay>();
      any_ = AnyDecay::of(&functions, &decay_);
    }
  }
  UpdateOf(const UpdateOf&) = delete;
  UpdateOf& operator=(const UpdateOf&) = delete;

  AnyUpdate any() const {
    static constexpr OptimizerKernels functions = OptimizerKernels::of<Optimizer>();
    return {&functions,
            &optimizer_,
            &any_,
            &rounding_,
            BuiltinOptimizers::number<Optimizer>,
            BuiltinRoundings::number<Rounding>,
            decay_state_};
  }

  // A table that it trains. lr: of the next step.
  template <Numeric Weight>
  AnyTable table(const Table<Weight, Optimizer>& view, double lr) const {
    AnyTable t;
    t.weight = view.weight;
    t.dtype = kNumericType<Weight>;
    t.rows = view.rows;
    t.dim = view.dim;
    t.prev_iter = view.prev_iter.data;
    t.prev_iter_stride = view.prev_iter.stride;
    for (int i = 0; i < Optimizer::scalar_states; ++i) {
      t.scalars[i] = view.scalars[i].data;
      t.scalar_strides[i] = view.scalars[i].stride;
    }
    for (int i = 0; i < Optimizer::vector_states; ++i) t.vectors[i] = view.vectors[i];
    t.key = view.origin.table;
    t.row_offset = view.origin.row;
    t.col_offset = view.origin.col_offset;
    t.update = any();
    t.lr = lr;
    return t;
  }

 private:
  Optimizer optimizer_;
  Decay decay_;
  Rounding rounding_;
  bool decay_state_;
  AnyDecay any_;
};

// Features of `samples` bags each, side by side in the output: sample s has a row of all their widths, in
// order. feature_tables: [count], the table of each feature. Fills features, [count], and returns the
// width of the output.
inline std::int64_t side_by_side(const AnyTable* tables, const std::int32_t* feature_tables,
                                 std::int32_t count, std::int64_t samples, Feature* features) {
  std::int64_t width = 0, column = 0;
  for (std::int32_t f = 0; f < count; ++f) width += tables[feature_tables[f]].dim;
  for (std::int32_t f = 0; f < count; ++f) {
    const std::int32_t dim = tables[feature_tables[f]].dim;
    const std::int64_t first = f * samples;
    features[f] = {feature_tables[f], dim, first, samples, 0, 0, first, column, width};
    column += dim;
  }
  return width;
}

// Memory for the calls of host/table_batch.hpp to work in, aligned as they ask for; kept between calls.
// Each thread that calls needs one of its own.
class Memory {
 public:
  Memory() = default;
  ~Memory() { release(); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* reserve(std::size_t bytes) {
    if (bytes > bytes_) {
      release();
      data_ = ::operator new(bytes, std::align_val_t{kAlign});
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  static constexpr std::size_t kAlign = 64;
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{kAlign});
    data_ = nullptr;
    bytes_ = 0;
  }
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace host

COLDROW_END
