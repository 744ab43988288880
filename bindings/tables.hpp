// Tables and features of a call on several of them: names and layout, and its arguments taken and
// checked.
#pragma once

#include "arguments.hpp"

namespace coldrow_module {

// Tables and features of a TableBatchedEmbeddingBags: names and layout, no arrays.
class Tables {
 public:
  // row_offsets, col_offsets: where each table begins in the one it is a shard of; empty: all whole.
  Tables(std::vector<std::string> names, std::vector<std::uint64_t> keys,
         std::vector<std::int32_t> feature_tables, std::vector<std::int64_t> row_offsets,
         std::vector<std::int64_t> col_offsets)
      : names_(std::move(names)),
        keys_(std::move(keys)),
        feature_tables_(std::move(feature_tables)),
        row_offsets_(std::move(row_offsets)),
        col_offsets_(std::move(col_offsets)) {
    if (row_offsets_.empty()) row_offsets_.resize(names_.size());
    if (col_offsets_.empty()) col_offsets_.resize(names_.size());
    if (names_.size() != keys_.size()) bad_value("keys: accepted: one per table");
    if (names_.size() != row_offsets_.size() || names_.size() != col_offsets_.size()) {
      bad_value("row_offsets, col_offsets: accepted: one per table, or none");
    }
    for (const std::int32_t t : feature_tables_) {
      if (t < 0 || static_cast<std::size_t>(t) >= names_.size()) {
        bad_value("feature_tables: got " + std::to_string(t) + ", accepted: a table's number");
      }
    }
  }

 protected:
  // All arguments but step, lr and what is summed. with_state: prev_iter and policies too.
  Call begin(nb::sequence weights, nb::sequence prev_iters, nb::sequence updates, bool with_state,
             nb::handle indices, nb::handle offsets, nb::handle per_sample_weights,
             nb::handle batch_sizes, const std::string& pooling_name,
             Access access = Access::read) const {
    const Pooling pooling = to_pooling(pooling_name);
    Call call;
    call.tables.resize(names_.size());
    for (std::size_t t = 0; t < names_.size(); ++t) {
      AnyTable& table = call.tables[t];
      table.name = names_[t].c_str();
      table.key = keys_[t];
      table.row_offset = row_offsets_[t];
      table.col_offset = col_offsets_[t];
      take_weight(call, table, weights[t], access);
      if (with_state) {
        take_prev_iter(call, table, prev_iters[t], access);
        table.update = nb::cast<const Update&>(updates[t]).any;
      }
    }
    take_indices(call, indices);
    const Array& o = call.keep(call.read, take_array(offsets, "offsets", Access::read));
    o.require_shape({-1}, "number of bags + 1");
    o.require_contiguous();
    if (o.integer() != call.batch.index_type) {
      throw nb::type_error(("offsets: got dtype " + o.dtype_name() +
                            ", accepted: the dtype of indices, " +
                            call.read[call.read.size() - 2].dtype_name())
                               .c_str());
    }
    const std::int64_t bags = o.shape[0] - 1;
    if (bags > INT_MAX) {
      bad_value("offsets: got " + o.describe() + ", accepted: at most 2**31 - 1 bags in one batch");
    }
    const auto num_features = static_cast<std::int64_t>(feature_tables_.size());
    call.batch.offsets = o.data;
    call.batch.bags = bags;
    call.batch.pooled = pooling != Pooling::none;
    call.batch.mean = pooling == Pooling::mean;

    std::vector<std::int64_t> sizes;
    if (batch_sizes.is_none()) {
      if (bags < 0 || (num_features > 0 && bags % num_features != 0)) {
        bad_value("offsets: got " + o.describe() + ", accepted: a length of " +
                  std::to_string(num_features) + " features * batch + 1");
      }
      sizes.assign(feature_tables_.size(), num_features > 0 ? bags / num_features : 0);
    } else {
      sizes = nb::cast<std::vector<std::int64_t>>(batch_sizes);
      std::int64_t sum = 0;
      for (const std::int64_t b : sizes) {
        if (b < 0 || b > bags) {  // (larger ones could add up to anything)
          bad_value("batch_sizes: got " + std::to_string(b) + ", accepted: 0 to " +
                    std::to_string(bags) + ", the number of bags");
        }
        sum += b;
      }
      if (static_cast<std::int64_t>(sizes.size()) != num_features || sum != bags) {
        bad_value("batch_sizes: got " + std::to_string(sizes.size()) + " sizes that add up to " +
                  std::to_string(sum) + ", accepted: one per feature (" +
                  std::to_string(num_features) +
                  "), adding up to len(offsets) - 1 = " + std::to_string(bags));
      }
    }
    if (!per_sample_weights.is_none()) {
      if (pooling != Pooling::sum) {
        bad_value("per_sample_weights: given with pooling='" + pooling_name +
                  "', accepted: with pooling='sum' only");
      }
      const Array& p =
          call.keep(call.read, take_array(per_sample_weights, "per_sample_weights", Access::read));
      p.require_shape({call.batch.positions}, "one per index");
      p.require_contiguous();
      p.require_dtype("float32");
      call.batch.per_sample_weights = static_cast<const float*>(p.data);
    }

    std::int64_t total_dim = 0;
    for (const std::int32_t t : feature_tables_) total_dim += call.tables[t].dim;
    std::int64_t first_bag = 0, column = 0;
    for (std::size_t f = 0; f < sizes.size(); ++f) {
      const std::int32_t dim = call.tables[feature_tables_[f]].dim;
      Feature feature{feature_tables_[f], dim,    first_bag, sizes[f], 0, 0,
                      first_bag,          column, total_dim};
      call.features.push_back(feature);
      first_bag += sizes[f];
      column += dim;
    }
    if (!batch_sizes.is_none() && call.batch.pooled) flatten(call);
    close(call);
    return call;
  }

  // Output rows feature after feature, as where features differ in their number of rows. (Unpooled,
  // that number is known once it is known where each feature's indices lie.)
  static void flatten(Call& call) {
    std::int64_t offset = 0;
    for (Feature& f : call.features) {
      f.out_offset = offset;
      f.out_stride = f.dim;
      if (!call.batch.pooled) f.first_row = f.first_position;
      offset += (call.batch.pooled ? f.bags : f.positions) * f.dim;
    }
  }

  void take_states(Call& call, nb::sequence states, nb::sequence updates) const {
    for (std::size_t t = 0; t < names_.size(); ++t) {
      take_state(call, call.tables[t], nb::cast<const Update&>(updates[t]),
                 nb::cast<nb::sequence>(states[t]));
    }
  }

  static void require_elements(const Array& a, std::int64_t want) {
    a.require_contiguous();
    if (a.size() != want) {
      bad_value(std::string(a.name) + ": got " + a.describe() +
                ", accepted: " + std::to_string(want) + " elements for this batch");
    }
  }

  // out of weight_gradients().
  static Array take_weights_gradient(Call& call, nb::handle out) {
    Array o = take_array(out, "out", Access::write);
    o.require_shape({call.batch.positions}, "one per index");
    o.require_contiguous();
    o.require_dtype("float32");
    return o;
  }

  std::vector<std::string> names_;
  std::vector<std::uint64_t> keys_;
  std::vector<std::int32_t> feature_tables_;
  std::vector<std::int64_t> row_offsets_, col_offsets_;
};

}  // namespace coldrow_module
