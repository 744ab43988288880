// One call into the kernels: arrays taken from Python and checked, and the batch made of them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <climits>
#include <coldrow/policy/decay.hpp>
#include <coldrow/reference.hpp>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "claims.hpp"
#include "kernels.hpp"
#include "tensor.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace coldrow_module {

// ----------------------------------------------------------------------------------------- errors

[[noreturn]] inline void bad_value(const std::string& message) {
  throw nb::value_error(message.c_str());
}
[[noreturn]] inline void bad_index(const std::string& message) {
  throw nb::index_error(message.c_str());
}

template <class T>
T choice(const std::string& name, const std::string& given,
         std::initializer_list<std::pair<const char*, T>> options) {
  std::string accepted;
  for (const auto& [word, value] : options) {
    if (given == word) return value;
    accepted += (accepted.empty() ? "'" : ", '") + std::string(word) + "'";
  }
  bad_value(name + ": got '" + given + "', accepted: " + accepted);
}

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

// ---------------------------------------------------------------------------------------- threads

inline bool forked =
    false;  // OpenMP's threads do not survive a fork: a child stays in its own thread
inline const Kernels* kernels = available_kernels()[0];

inline int threads_for(std::int64_t positions, std::int64_t dim) {
#if defined(_OPENMP)
  if (forked || omp_in_parallel()) return 1;
  const std::int64_t worth =
      positions * dim / 8192 + 1;  // below that a thread costs more than it does
  return static_cast<int>(std::min<std::int64_t>({omp_get_max_threads(), worth, 256}));
#else
  (void)positions, (void)dim;
  return 1;
#endif
}

// ----------------------------------------------------------------------------------------- update

// The products of CumulativeLinear for one alpha, kept while an update uses them.
inline std::shared_ptr<std::vector<float>> cumulative_table(double alpha) {
  static std::mutex mutex;
  static std::map<double, std::weak_ptr<std::vector<float>>> tables;
  const std::lock_guard lock(mutex);
  auto& kept = tables[alpha];
  auto table = kept.lock();
  if (!table) {
    table = std::make_shared<std::vector<float>>(coldrow::CumulativeLinear::table_size(alpha));
    coldrow::CumulativeLinear::fill_table(alpha, table->data());
    kept = table;
  }
  return table;
}

// The fields of a policy compiled at run time, aligned for any of them.
using PolicyBytes = std::shared_ptr<std::vector<std::max_align_t>>;

inline PolicyBytes policy_bytes(const nb::bytes& given) {
  auto bytes =
      std::make_shared<std::vector<std::max_align_t>>(given.size() / sizeof(std::max_align_t) + 1);
  std::memcpy(bytes->data(), given.c_str(), given.size());
  return bytes;
}

// The compiled form of coldrow.RowUpdate.
struct Update {
  UpdateArgs args{};
  std::vector<std::string> scalar_states;  // names of the per-row float32 states, in order
  std::vector<std::string> vector_states;  // names of the element-wise ones
  std::shared_ptr<std::vector<float>> table;
  PolicyBytes optimizer_policy, decay_policy;

  coldrow::reference::Update reference() const {
    using Kind = coldrow::reference::OptimizerKind;
    coldrow::reference::Optimizer o{args.eps, args.beta1, args.beta2};
    switch (args.optimizer) {
      case OptimizerKind::sgd:
        o.kind = Kind::sgd;
        break;
      case OptimizerKind::rowwise_rmsprop:
        break;
      case OptimizerKind::rowwise_adagrad:
        o.kind = Kind::rowwise_adagrad;
        break;
      case OptimizerKind::adagrad:
        o.kind = Kind::adagrad;
        break;
      case OptimizerKind::adam:
      case OptimizerKind::adam_by_touches:
        o.kind = Kind::adam;
        o.count_touches = args.optimizer == OptimizerKind::adam_by_touches;
        break;
      case OptimizerKind::partial_rowwise_adam:
      case OptimizerKind::partial_rowwise_adam_by_touches:
        o.kind = Kind::partial_rowwise_adam;
        o.count_touches = args.optimizer == OptimizerKind::partial_rowwise_adam_by_touches;
        break;
      case OptimizerKind::external:
        bad_value("optimizer: compiled at run time, so the float64 reference does not know it");
    }
    if (args.decay == DecayName::external) {
      bad_value("decay: compiled at run time, so the float64 reference does not know it");
    }
    return {o,
            {static_cast<coldrow::DecayKind>(args.decay), args.epoch_gated, args.alpha,
             args.min_shrinkage, args.weight_decay, args.half_life},
            args.decay_state};
  }
};

// external_*: address of the compiled policy's functions, with the bytes of its fields.
inline Update make_update(const std::string& optimizer, double eps, double beta1, double beta2,
                          std::uintptr_t external_optimizer, const nb::bytes& optimizer_policy,
                          const std::string& decay, bool epoch_gated, double alpha,
                          double min_shrinkage, double weight_decay, double half_life,
                          std::uintptr_t external_decay, const nb::bytes& decay_policy,
                          const std::string& rounding, std::uint64_t seed, bool decay_state) {
  Update u;
  UpdateArgs& args = u.args;
  args.optimizer = choice<OptimizerKind>(
      "optimizer", optimizer,
      {{"sgd", OptimizerKind::sgd},
       {"rowwise_rmsprop", OptimizerKind::rowwise_rmsprop},
       {"rowwise_adagrad", OptimizerKind::rowwise_adagrad},
       {"adagrad", OptimizerKind::adagrad},
       {"adam", OptimizerKind::adam},
       {"adam_by_touches", OptimizerKind::adam_by_touches},
       {"partial_rowwise_adam", OptimizerKind::partial_rowwise_adam},
       {"partial_rowwise_adam_by_touches", OptimizerKind::partial_rowwise_adam_by_touches},
       {"external", OptimizerKind::external}});
  args.eps = eps;
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.external_optimizer = reinterpret_cast<const void*>(external_optimizer);
  u.optimizer_policy = policy_bytes(optimizer_policy);
  args.optimizer_policy = u.optimizer_policy->data();
  args.decay = choice<DecayName>("decay", decay,
                                 {{"none", DecayName::none},
                                  {"linear_clipped", DecayName::linear_clipped},
                                  {"cumulative_linear", DecayName::cumulative_linear},
                                  {"exponential", DecayName::exponential},
                                  {"constant", DecayName::constant},
                                  {"epoch_reset", DecayName::epoch_reset},
                                  {"external", DecayName::external}});
  args.epoch_gated = epoch_gated;
  args.alpha = alpha;
  args.min_shrinkage = min_shrinkage;
  args.weight_decay = weight_decay;
  args.half_life = half_life;
  args.external_decay = reinterpret_cast<const void*>(external_decay);
  u.decay_policy = policy_bytes(decay_policy);
  args.decay_policy = u.decay_policy->data();
  args.decay_state = decay_state;
  args.rounding = choice<RoundingKind>(
      "rounding", rounding,
      {{"nearest", RoundingKind::nearest}, {"stochastic", RoundingKind::stochastic}});
  args.seed = seed;
  if (args.decay == DecayName::cumulative_linear &&
      coldrow::CumulativeLinear::table_size(alpha) > 0) {
    u.table = cumulative_table(alpha);
    args.decay_table = u.table->data();
    args.decay_table_size = static_cast<std::int32_t>(u.table->size());
  }
  if ((args.optimizer == OptimizerKind::external) != (external_optimizer != 0) ||
      (args.decay == DecayName::external) != (external_decay != 0)) {
    bad_value("external: accepted: an address where the policy was compiled at run time");
  }
  const StateArgs state = kernels->state(args);
  for (int i = 0; i < state.scalar_states + state.vector_states; ++i) {
    (i < state.scalar_states ? u.scalar_states : u.vector_states).push_back(state.names[i]);
  }
  return u;
}

// ------------------------------------------------------------------------------------------ batch

// Memory a call works in; kept between the calls of one TableBatch.
class Scratch {
 public:
  void* reserve(std::size_t bytes) {
    if (bytes + 64 > size_) {
      memory_.reset();
      size_ = 0;  // should there be none
      memory_.reset(new (std::nothrow) unsigned char[bytes + bytes / 4 + 64]);
      if (memory_ == nullptr) {
        PyErr_Format(PyExc_MemoryError,
                     "workspace: no memory for %zu bytes, accepted: a batch that fits (nothing was "
                     "written)",
                     bytes);
        throw nb::python_error();
      }
      size_ = bytes + bytes / 4 + 64;
    }
    const auto p = reinterpret_cast<std::uintptr_t>(memory_.get());
    return reinterpret_cast<void*>((p + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  std::size_t size_ = 0;
};

// What a forward and its backward have in common: arrays, taken and checked, and the batch made of
// them. Views only; it lives as long as one call.
struct Call {
  std::vector<TableArgs> tables;
  std::vector<FeatureArgs> features;
  BatchArgs batch{};
  std::vector<Array> written;  // for the overlap check
  std::vector<Array> read;

  // The tables' memory, for Claim.
  std::vector<Claim::Range> memory() const {
    std::vector<Claim::Range> ranges;
    ranges.reserve(tables.size());
    for (const TableArgs& t : tables) {
      const auto* begin = static_cast<const char*>(t.weight);
      ranges.push_back({begin, begin + t.rows * t.dim * (t.dtype == DType::f32 ? 4 : 2)});
    }
    return ranges;
  }

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

inline void take_weight(Call& call, TableArgs& table, nb::handle weight, Access access) {
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

inline void take_prev_iter(Call& call, TableArgs& table, nb::handle prev_iter, Access access) {
  Array a = take_array(prev_iter, "prev_iter", access);
  a.require_shape({table.rows}, "one per row");
  a.require_dtype("int32");
  table.prev_iter = static_cast<std::int32_t*>(a.data);
  table.prev_iter_stride = a.strides[0];
  (access == Access::write ? call.written : call.read).push_back(std::move(a));
}

// The optimizer's state: scalar states [rows] of any stride, then element-wise ones [rows, dim].
inline void take_state(Call& call, TableArgs& table, const Update& update, nb::sequence arrays) {
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

inline void set_policy(TableArgs& table, const Update& update, double lr) {
  table.update = update.args;
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

inline void finish(Call& call, std::int64_t step, std::int64_t epoch_start) {
  call.batch.tables = call.tables.data();
  call.batch.num_tables = static_cast<std::int32_t>(call.tables.size());
  call.batch.features = call.features.data();
  call.batch.num_features = static_cast<std::int32_t>(call.features.size());
  call.batch.step = to_step(step, true);
  call.batch.epoch_start = to_epoch_start(epoch_start);
  std::int64_t widest = 1;
  for (const TableArgs& t : call.tables) widest = std::max<std::int64_t>(widest, t.dim);
  call.batch.threads = threads_for(call.batch.positions, widest);
}

inline std::string table_label(const TableArgs& table) {
  return table.name == nullptr || *table.name == '\0'
             ? std::string()
             : " of table '" + std::string(table.name) + "'";
}

inline void check_batch(Call& call) {
  Problem p;
  {
    nb::gil_scoped_release release;
    p = kernels->check_batch(call.batch);
  }
  const std::string at = " at position " + std::to_string(p.position);
  const std::string got = std::to_string(p.value);
  switch (p.kind) {
    case Problem::none:
      return;
    case Problem::offsets_start:
      bad_value("offsets: starts with " + got + ", accepted: 0");
    case Problem::offsets_decrease:
      bad_value("offsets: falls to " + got + at + ", accepted: offsets that never decrease");
    case Problem::offsets_end:
      bad_value("offsets: ends with " + got + ", accepted: the number of indices, " +
                std::to_string(call.batch.positions) +
                " (the last offset is the end of the last bag)");
    case Problem::index_range: {
      const TableArgs& table = call.tables[call.features[p.feature].table];
      bad_index("indices: got " + got + at + table_label(table) + ", accepted: " +
                (table.rows == 0 ? "none (the table has no rows)"
                                 : "0 to " + std::to_string(table.rows - 1)));
    }
  }
}

// What a module counts of a step, 0-dim int64 each. Written by the call that writes the rows: Python raises
// KeyboardInterrupt between two of its instructions, and has then seen both or neither.
struct Counters {
  std::int64_t* clock = nullptr;  // steps done; must be at the one before
  std::int64_t* nonfinite = nullptr;

  static std::int64_t* take(nb::handle array, const char* name) {
    if (array.is_none()) return nullptr;
    const Array a = take_array(array, name, Access::write);
    a.require_shape({}, "one number");
    a.require_dtype("int64");
    return static_cast<std::int64_t*>(a.data);
  }
  void require_before(std::int64_t step) const {
    if (clock != nullptr && *clock + 1 != step) {
      throw std::runtime_error("clock: is at " + std::to_string(*clock) + " where step " +
                               std::to_string(step) +
                               " was to come: another thread trains these tables too");
    }
  }
  void count(std::int64_t step, std::int64_t skipped) const {
    if (clock != nullptr) *clock = step;
    if (nonfinite != nullptr) *nonfinite += skipped;
  }
};

// The caller holds a Claim to write.
inline std::int64_t run_update(Call& call, const Array& grad, const std::string& on_nonfinite,
                               bool check_step, bool check_only, Scratch& scratch) {
  to_step(call.batch.step);
  const DType grad_type = grad.numeric();
  const OnNonfinite mode = to_on_nonfinite(on_nonfinite);
  if (check_only && mode != OnNonfinite::raise && !check_step) return 0;
  void* workspace = scratch.reserve(kernels->update_bytes(call.batch));
  UpdateReport r;
  {
    nb::gil_scoped_release release;
    r = kernels->update(call.batch, grad.data, grad_type, mode, check_step, check_only, workspace);
  }
  if (!r.refused) return r.nonfinite.count;
  if (check_step && r.stale.count > 0) {
    const TableArgs& t = call.tables[r.stale.table];
    bad_value("step: got " + std::to_string(call.batch.step) +
              ", accepted: more than prev_iter of " + "every row touched; row " +
              std::to_string(r.stale.row) + table_label(t) + " has " +
              std::to_string(t.prev_iter[r.stale.row * t.prev_iter_stride]));
  }
  const TableArgs& t = call.tables[r.nonfinite.table];
  const std::int32_t last = t.prev_iter[r.nonfinite.row * t.prev_iter_stride];
  const auto step = static_cast<std::int32_t>(call.batch.step);
  const float factor = kernels->factor(t.update, last, step, t.lr, call.batch.epoch_start, false);
  if (!(factor >= 0.0f && factor <= 1.0f)) {
    bad_value("decay: gave the factor " + std::to_string(factor) + " for row " +
              std::to_string(r.nonfinite.row) + table_label(t) + " (" +
              std::to_string(r.nonfinite.count) +
              " rows are not to be updated), accepted: 0 to 1, or on_nonfinite='skip' or "
              "'propagate'");
  }
  bad_value("grad: the update of row " + std::to_string(r.nonfinite.row) + table_label(t) +
            " is not finite (" + std::to_string(r.nonfinite.count) +
            " such rows), accepted: finite gradients whose squares do not overflow, or "
            "on_nonfinite='skip' or 'propagate'");
}

}  // namespace coldrow_module
