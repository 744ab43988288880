// Arguments of a call from Python, taken and checked. What is here is the same whatever memory the
// arrays are in: values in them are not looked at.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <climits>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "tensor.hpp"
#include "update.hpp"

namespace coldrow_module {

inline OnNonfinite to_on_nonfinite(const std::string& given) {
  return choice<OnNonfinite>("on_nonfinite", given,
                             {{"raise", OnNonfinite::raise},
                              {"skip", OnNonfinite::skip},
                              {"propagate", OnNonfinite::propagate}});
}

// to_read: the step that a read comes before; there is a read after the last step too.
inline std::int64_t to_step(std::int64_t step, bool to_read = false) {
  if (step < 1 || step > INT32_MAX + std::int64_t{to_read}) {
    bad_value("step: got " + std::to_string(step) +
              ", accepted: 1 to 2**31 - 1 (prev_iter is int32; the clock cannot go further)");
  }
  return step;
}

inline std::int32_t to_epoch_start(std::int64_t epoch_start) {
  if (epoch_start < 0 || epoch_start > INT32_MAX) {
    bad_value("epoch_start: got " + std::to_string(epoch_start) + ", accepted: 0 to 2**31 - 1");
  }
  return static_cast<std::int32_t>(epoch_start);
}

inline double to_lr(double lr) {
  if (!(lr >= 0.0 && lr <= 3.4e38)) {
    bad_value("lr: got " + std::to_string(lr) + ", accepted: a finite number >= 0");
  }
  return lr;
}

// ------------------------------------------------------------------------------------------ batch

// What a forward and its backward have in common: arrays, taken and checked, and the batch made of
// them. Views only; it lives as long as one call.
struct Call {
  std::vector<AnyTable> tables;
  std::vector<Feature> features;
  AnyBatch batch{};
  std::vector<Array> written;  // for the overlap check
  std::vector<Array> read;

  const Array& keep(std::vector<Array>& list, Array array) {
    list.push_back(std::move(array));
    return list.back();
  }

  // among_written: arrays to be written may overlap each other too (a module's own do not).
  void check_overlap(bool among_written) const {
    for (std::size_t i = 0; i < written.size(); ++i) {
      for (const Array& r : read) require_disjoint(written[i], r);
      if (!among_written) continue;
      for (std::size_t j = i + 1; j < written.size(); ++j) require_disjoint(written[i], written[j]);
    }
  }
};

enum class Pooling { sum, mean, none };

inline Pooling to_pooling(const std::string& given) {
  return choice<Pooling>("pooling", given,
                         {{"sum", Pooling::sum}, {"mean", Pooling::mean}, {"none", Pooling::none}});
}

inline void take_weight(Call& call, AnyTable& table, nb::handle weight, Access access) {
  Array a = take_array(weight, "weight", access);
  a.require_shape({-1, -1}, "rows, dim");
  a.require_contiguous();
  table.dtype = a.numeric();
  if (a.shape[1] < 1 || a.shape[1] > (1 << 30)) {
    bad_value("weight: got " + a.describe() + ", accepted: dim of at least 1 and at most 2**30");
  }
  table.weight = a.data;
  table.rows = a.shape[0];
  table.dim = static_cast<std::int32_t>(a.shape[1]);
  (access == Access::write ? call.written : call.read).push_back(std::move(a));
}

inline void take_prev_iter(Call& call, AnyTable& table, nb::handle prev_iter, Access access) {
  Array a = take_array(prev_iter, "prev_iter", access);
  a.require_shape({table.rows}, "one per row");
  a.require_dtype("int32");
  table.prev_iter = static_cast<std::int32_t*>(a.data);
  table.prev_iter_stride = a.strides[0];
  (access == Access::write ? call.written : call.read).push_back(std::move(a));
}

// The optimizer's state: scalar states [rows] of any stride, then element-wise ones [rows, dim].
inline void take_state(Call& call, AnyTable& table, const Update& update, nb::sequence arrays) {
  const std::size_t scalars = update.scalar_states.size(), vectors = update.vector_states.size();
  if (nb::len(arrays) != scalars + vectors) {
    bad_value("state: got " + std::to_string(nb::len(arrays)) +
              " arrays, accepted: " + std::to_string(scalars + vectors) + " beside prev_iter");
  }
  std::size_t i = 0;
  for (nb::handle h : arrays) {
    const bool scalar = i < scalars;
    const std::string& name = scalar ? update.scalar_states[i] : update.vector_states[i - scalars];
    Array a = take_array(h, name.c_str(), Access::write);
    if (scalar) {
      a.require_shape({table.rows}, "one per row");
      a.require_dtype("float32");
      table.scalars[i] = static_cast<float*>(a.data);
      table.scalar_strides[i] = a.strides[0];
    } else {
      a.require_shape({table.rows, table.dim}, "one per element");
      a.require_contiguous();
      a.require_dtype("float32");
      table.vectors[i - scalars] = static_cast<float*>(a.data);
    }
    call.written.push_back(std::move(a));
    ++i;
  }
}

inline void set_policy(AnyTable& table, const Update& update, double lr) {
  table.update = update.any;
  table.lr = to_lr(lr);
}

inline void take_indices(Call& call, nb::handle indices) {
  const Array& a = call.keep(call.read, take_array(indices, "indices", Access::read));
  a.require_shape({-1}, "one per lookup");
  a.require_contiguous();
  call.batch.index_type = a.integer();
  call.batch.indices = a.data;
  call.batch.positions = a.shape[0];
  if (a.shape[0] > INT_MAX) {
    bad_value("indices: got " + a.describe() + ", accepted: at most 2**31 - 1 in one batch");
  }
}

// Once all tables and features are there.
inline void close(Call& call) {
  call.batch.tables = call.tables.data();
  call.batch.num_tables = static_cast<std::int32_t>(call.tables.size());
  call.batch.features = call.features.data();
  call.batch.num_features = static_cast<std::int32_t>(call.features.size());
}

// A call of one table whose every index is a bag of its own.
inline void take_rows(Call& call, nb::handle indices) {
  take_indices(call, indices);
  const std::int64_t n = call.batch.positions;
  const std::int32_t dim = call.tables[0].dim;
  call.features.push_back({0, dim, 0, n, 0, n, 0, 0, dim});
}

// One row of the table's width per index.
inline Array take_by_index(Call& call, nb::handle rows, const char* name, Access access) {
  Array a = take_array(rows, name, access);
  a.require_shape({call.batch.positions, call.tables[0].dim}, "one row per index");
  a.require_contiguous();
  a.numeric();
  return call.keep(access == Access::write ? call.written : call.read, std::move(a));
}

// ----------------------------------------------------------------------- what values may be wrong

inline std::string table_label(const char* name) {
  return name == nullptr || *name == '\0' ? std::string() : " of table '" + std::string(name) + "'";
}

// end: what the last offset should be. table, rows: of a bad index.
[[noreturn]] inline void raise_problem(const BatchProblem& p, const std::string& end,
                                       const std::string& table, std::int64_t rows,
                                       const std::string& more = "") {
  const std::string at = " at position " + std::to_string(p.position);
  const std::string got = std::to_string(p.value);
  switch (p.kind) {
    case BatchProblem::offsets_start:
      bad_value("offsets: starts with " + got + ", accepted: 0" + more);
    case BatchProblem::offsets_decrease:
      bad_value("offsets: falls to " + got + at + ", accepted: offsets that never decrease" + more);
    case BatchProblem::offsets_end:
      bad_value("offsets: ends with " + got + ", accepted: " + end +
                " (the last offset is the end of the last bag)" + more);
    case BatchProblem::index_range:
    case BatchProblem::none:
      break;
  }
  bad_index("indices: got " + got + at + table + ", accepted: " +
            (rows == 0 ? "none (the table has no rows)" : "0 to " + std::to_string(rows - 1)) +
            more);
}

[[noreturn]] inline void raise_stale(std::int64_t step, std::int64_t row, const std::string& table,
                                     std::int64_t prev_iter) {
  bad_value("step: got " + std::to_string(step) +
            ", accepted: more than prev_iter of every row touched; row " + std::to_string(row) +
            table + " has " + std::to_string(prev_iter));
}

[[noreturn]] inline void raise_nonfinite(std::int64_t row, const std::string& table,
                                         std::int64_t count, const std::string& more = "") {
  bad_value("grad: the update of row " + std::to_string(row) + table + " is not finite (" +
            std::to_string(count) +
            " such rows), accepted: finite gradients whose squares do not overflow, or "
            "on_nonfinite='skip' or 'propagate'" +
            more);
}

}  // namespace coldrow_module
