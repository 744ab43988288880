// The extension module coldrow._core: checks arguments, then calls the kernels of this machine.
//
// Two front doors, one engine: TableBatch (several tables and features, pooled or not) and the
// functional apply/read, which are a batch of one table whose every index is a bag of its own.
// Everything is checked before anything is written.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <coldrow/policy/decay.hpp>
#include <coldrow/reference.hpp>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "kernels.hpp"
#include "tensor.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif
#include <pthread.h>

namespace coldrow_module {
namespace {

using namespace nb::literals;

// ----------------------------------------------------------------------------------------- errors

[[noreturn]] void bad_value(const std::string& message) { throw nb::value_error(message.c_str()); }
[[noreturn]] void bad_index(const std::string& message) { throw nb::index_error(message.c_str()); }

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

OnNonfinite to_on_nonfinite(const std::string& given) {
  return choice<OnNonfinite>("on_nonfinite", given,
                             {{"raise", OnNonfinite::raise},
                              {"skip", OnNonfinite::skip},
                              {"propagate", OnNonfinite::propagate}});
}

// to_read: the step that a read comes before; there is a read after the last step too.
std::int64_t to_step(std::int64_t step, bool to_read = false) {
  if (step < 1 || step > INT32_MAX + std::int64_t{to_read}) {
    bad_value("step: got " + std::to_string(step) +
              ", accepted: 1 to 2**31 - 1 (prev_iter is int32; the clock cannot go further)");
  }
  return step;
}

std::int32_t to_epoch_start(std::int64_t epoch_start) {
  if (epoch_start < 0 || epoch_start > INT32_MAX) {
    bad_value("epoch_start: got " + std::to_string(epoch_start) + ", accepted: 0 to 2**31 - 1");
  }
  return static_cast<std::int32_t>(epoch_start);
}

double to_lr(double lr) {
  if (!(lr >= 0.0 && lr <= 3.4e38)) {
    bad_value("lr: got " + std::to_string(lr) + ", accepted: a finite number >= 0");
  }
  return lr;
}

// ---------------------------------------------------------------------------------------- threads

bool forked = false;  // OpenMP's threads do not survive a fork: a child stays in its own thread
const Kernels* kernels = available_kernels()[0];

int threads_for(std::int64_t positions, std::int64_t dim) {
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
std::shared_ptr<std::vector<float>> cumulative_table(double alpha) {
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

// The compiled form of coldrow.RowUpdate.
struct Update {
  UpdateArgs args{};
  std::vector<std::string> scalar_states;  // names of the per-row float32 states, in order
  std::shared_ptr<std::vector<float>> table;

  coldrow::reference::Update reference() const {
    return {{args.eps_exact, args.ema_beta_exact},
            {static_cast<coldrow::DecayKind>(args.decay), args.epoch_gated, args.alpha,
             args.min_shrinkage, args.weight_decay, args.half_life},
            args.decay_state};
  }
};

Update make_update(const std::string& optimizer, double eps, double ema_beta,
                   const std::string& decay, bool epoch_gated, double alpha, double min_shrinkage,
                   double weight_decay, double half_life, const std::string& rounding,
                   std::uint64_t seed, bool decay_state) {
  Update u;
  u.args.optimizer = choice<OptimizerKind>("optimizer", optimizer,
                                           {{"rowwise_rmsprop", OptimizerKind::rowwise_rmsprop}});
  u.scalar_states = {"momentum1"};
  u.args.eps = static_cast<float>(u.args.eps_exact = eps);
  u.args.ema_beta = static_cast<float>(u.args.ema_beta_exact = ema_beta);
  u.args.decay = choice<DecayName>("decay", decay,
                                   {{"none", DecayName::none},
                                    {"linear_clipped", DecayName::linear_clipped},
                                    {"cumulative_linear", DecayName::cumulative_linear},
                                    {"exponential", DecayName::exponential},
                                    {"constant", DecayName::constant},
                                    {"epoch_reset", DecayName::epoch_reset}});
  u.args.epoch_gated = epoch_gated;
  u.args.alpha = alpha;
  u.args.min_shrinkage = min_shrinkage;
  u.args.weight_decay = weight_decay;
  u.args.half_life = half_life;
  u.args.decay_state = decay_state;
  u.args.rounding = choice<RoundingKind>(
      "rounding", rounding,
      {{"nearest", RoundingKind::nearest}, {"stochastic", RoundingKind::stochastic}});
  u.args.seed = seed;
  if (u.args.decay == DecayName::cumulative_linear &&
      coldrow::CumulativeLinear::table_size(alpha) > 0) {
    u.table = cumulative_table(alpha);
    u.args.decay_table = u.table->data();
    u.args.decay_table_size = static_cast<std::int32_t>(u.table->size());
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
      memory_.reset(new unsigned char[bytes + bytes / 4 + 64]);
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

Pooling to_pooling(const std::string& given) {
  return choice<Pooling>("pooling", given,
                         {{"sum", Pooling::sum}, {"mean", Pooling::mean}, {"none", Pooling::none}});
}

void take_weight(Call& call, TableArgs& table, nb::handle weight, Access access) {
  Array a = take_array(weight, "weight", access);
  a.require_shape({-1, -1}, "rows, dim");
  a.require_contiguous();
  table.dtype = a.numeric();
  if (a.shape[1] < 1 || a.shape[1] > INT_MAX / 2) {
    bad_value("weight: got " + a.describe() + ", accepted: dim of at least 1");
  }
  table.weight = a.data;
  table.rows = a.shape[0];
  table.dim = static_cast<std::int32_t>(a.shape[1]);
  (access == Access::write ? call.written : call.read).push_back(std::move(a));
}

void take_prev_iter(Call& call, TableArgs& table, nb::handle prev_iter, Access access) {
  Array a = take_array(prev_iter, "prev_iter", access);
  a.require_shape({table.rows}, "one per row");
  a.require_dtype("int32");
  table.prev_iter = static_cast<std::int32_t*>(a.data);
  table.prev_iter_stride = a.strides[0];
  (access == Access::write ? call.written : call.read).push_back(std::move(a));
}

void take_scalars(Call& call, TableArgs& table, const Update& update, nb::sequence scalars) {
  if (nb::len(scalars) != update.scalar_states.size()) {
    bad_value("state: got " + std::to_string(nb::len(scalars)) + " arrays, accepted: " +
              std::to_string(update.scalar_states.size()) + " beside prev_iter");
  }
  int i = 0;
  for (nb::handle h : scalars) {
    Array a = take_array(h, update.scalar_states[i].c_str(), Access::write);
    a.require_shape({table.rows}, "one per row");
    a.require_dtype("float32");
    table.scalars[i] = static_cast<float*>(a.data);
    table.scalar_strides[i] = a.strides[0];
    call.written.push_back(std::move(a));
    ++i;
  }
}

void set_policy(TableArgs& table, const Update& update, double lr) {
  table.update = update.args;
  table.lr = to_lr(lr);
}

void take_indices(Call& call, nb::handle indices) {
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

void finish(Call& call, std::int64_t step, std::int64_t epoch_start) {
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

std::string table_label(const TableArgs& table) {
  return table.name == nullptr || *table.name == '\0'
             ? std::string()
             : " of table '" + std::string(table.name) + "'";
}

void check_batch(Call& call) {
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
                std::to_string(call.batch.positions));
    case Problem::index_range: {
      const TableArgs& table = call.tables[call.features[p.feature].table];
      bad_index("indices: got " + got + at + table_label(table) + ", accepted: 0 to " +
                std::to_string(table.rows - 1));
    }
  }
}

std::int64_t run_update(Call& call, const Array& grad, const std::string& on_nonfinite,
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
  bad_value("grad: the update of row " + std::to_string(r.nonfinite.row) + table_label(t) +
            " is not finite (" + std::to_string(r.nonfinite.count) +
            " such rows), accepted: finite gradients whose squares do not overflow, or "
            "on_nonfinite='skip' or 'propagate'");
}

// ------------------------------------------------------------------------------------- functional

FeatureArgs only_feature(const Call& call) {
  const std::int64_t n = call.batch.positions;
  const std::int32_t dim = call.tables[0].dim;
  return {0, dim, 0, n, 0, n, 0, 0, dim};
}

std::int64_t apply(const Update& update, nb::handle weight, nb::handle grad, nb::handle indices,
                   nb::sequence scalars, nb::handle prev_iter, std::int64_t step, double lr,
                   std::int64_t epoch_start, const std::string& on_nonfinite,
                   std::uint64_t table_key, std::int64_t row_offset, std::int64_t col_offset,
                   bool check_step, bool check_only) {
  Call call;
  TableArgs& table = call.tables.emplace_back();
  table.key = table_key;
  table.row_offset = row_offset;
  table.col_offset = col_offset;
  take_weight(call, table, weight, Access::write);
  take_prev_iter(call, table, prev_iter, Access::write);
  take_scalars(call, table, update, scalars);
  set_policy(table, update, lr);
  take_indices(call, indices);
  call.features.push_back(only_feature(call));
  const Array g = take_array(grad, "grad", Access::read);
  g.require_shape({call.batch.positions, table.dim}, "one row per index");
  g.require_contiguous();
  g.numeric();
  call.read.push_back(g);
  finish(call, step, epoch_start);
  check_batch(call);
  call.check_overlap(true);
  Scratch scratch;
  return run_update(call, g, on_nonfinite, check_step, check_only, scratch);
}

void read(const Update& update, nb::handle out, nb::handle weight, nb::handle indices,
          nb::handle prev_iter, std::int64_t step, double lr, std::int64_t epoch_start) {
  Call call;
  TableArgs& table = call.tables.emplace_back();
  take_weight(call, table, weight, Access::read);
  take_prev_iter(call, table, prev_iter, Access::read);
  set_policy(table, update, lr);
  take_indices(call, indices);
  call.features.push_back(only_feature(call));
  const Array o = take_array(out, "out", Access::write);
  o.require_shape({call.batch.positions, table.dim}, "one row per index");
  o.require_contiguous();
  const DType out_type = o.numeric();
  call.written.push_back(o);
  finish(call, step, epoch_start);
  check_batch(call);
  call.check_overlap(true);
  Scratch scratch;
  void* workspace = scratch.reserve(kernels->lookup_bytes(call.batch, true));
  nb::gil_scoped_release release;
  kernels->lookup(call.batch, true, o.data, out_type, workspace);
}

// ------------------------------------------------------------------------------------ table batch

// Tables and features of a TableBatchedEmbeddingBags: names and layout, no arrays.
class TableBatch {
 public:
  TableBatch(std::vector<std::string> names, std::vector<std::uint64_t> keys,
             std::vector<std::int32_t> feature_tables)
      : names_(std::move(names)),
        keys_(std::move(keys)),
        feature_tables_(std::move(feature_tables)) {
    if (names_.size() != keys_.size()) bad_value("keys: accepted: one per table");
    for (const std::int32_t t : feature_tables_) {
      if (t < 0 || static_cast<std::size_t>(t) >= names_.size()) {
        bad_value("feature_tables: got " + std::to_string(t) + ", accepted: a table's number");
      }
    }
  }

  // The number of elements the output of this batch has.
  void lookup(nb::sequence weights, nb::sequence prev_iters, nb::sequence updates,
              std::vector<double> lrs, nb::handle indices, nb::handle offsets,
              nb::handle per_sample_weights, nb::handle batch_sizes, const std::string& pooling,
              bool read, std::int64_t step, std::int64_t epoch_start, nb::handle out) {
    Call call = begin(weights, prev_iters, updates, lrs, read, indices, offsets, per_sample_weights,
                      batch_sizes, pooling, step, epoch_start);
    const Array o = take_array(out, "out", Access::write);
    require_elements(o, call);
    const DType out_type = o.numeric();
    std::vector<unsigned char> memory(kernels->lookup_bytes(call.batch, read) + 64);
    nb::gil_scoped_release release;
    kernels->lookup(call.batch, read, o.data, out_type, align(memory.data()));
  }

  void weight_gradients(nb::sequence weights, nb::sequence prev_iters, nb::sequence updates,
                        std::vector<double> lrs, nb::handle indices, nb::handle offsets,
                        nb::handle batch_sizes, const std::string& pooling, bool read,
                        std::int64_t step, std::int64_t epoch_start, nb::handle grad,
                        nb::handle out) {
    Call call = begin(weights, prev_iters, updates, lrs, read, indices, offsets, nb::none(),
                      batch_sizes, pooling, step, epoch_start);
    const Array g = take_array(grad, "grad", Access::read);
    require_elements(g, call);
    const DType grad_type = g.numeric();
    const Array o = take_array(out, "out", Access::write);
    o.require_shape({call.batch.positions}, "one per index");
    o.require_contiguous();
    o.require_dtype("float32");
    std::vector<unsigned char> memory(kernels->lookup_bytes(call.batch, read) + 64);
    nb::gil_scoped_release release;
    kernels->weight_gradients(call.batch, read, g.data, grad_type, static_cast<float*>(o.data),
                              align(memory.data()));
  }

  std::int64_t update(nb::sequence weights, nb::sequence scalars, nb::sequence prev_iters,
                      nb::sequence updates, std::vector<double> lrs, nb::handle indices,
                      nb::handle offsets, nb::handle per_sample_weights, nb::handle batch_sizes,
                      const std::string& pooling, std::int64_t step, std::int64_t epoch_start,
                      nb::handle grad, const std::string& on_nonfinite) {
    const std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock.owns_lock()) {
      throw std::runtime_error("these tables are being updated by another thread");
    }
    Call call = begin(weights, prev_iters, updates, lrs, true, indices, offsets, per_sample_weights,
                      batch_sizes, pooling, step, epoch_start, Access::write);
    for (std::size_t t = 0; t < names_.size(); ++t) {
      take_scalars(call, call.tables[t], nb::cast<const Update&>(updates[t]),
                   nb::cast<nb::sequence>(scalars[t]));
    }
    const Array g = take_array(grad, "grad", Access::read);
    require_elements(g, call);
    call.read.push_back(g);
    call.check_overlap(false);
    return run_update(call, g, on_nonfinite, false, false, scratch_);
  }

 private:
  static unsigned char* align(unsigned char* p) {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(p) + 63) / 64 * 64);
  }

  static void require_elements(const Array& a, const Call& call) {
    std::int64_t want = 0;
    for (const FeatureArgs& f : call.features) {
      want += (call.batch.pooled ? f.bags : f.positions) * f.dim;
    }
    a.require_contiguous();
    if (a.size() != want) {
      bad_value(std::string(a.name) + ": got " + a.describe() +
                ", accepted: " + std::to_string(want) + " elements for this batch");
    }
  }

  Call begin(nb::sequence weights, nb::sequence prev_iters, nb::sequence updates,
             const std::vector<double>& lrs, bool with_state, nb::handle indices,
             nb::handle offsets, nb::handle per_sample_weights, nb::handle batch_sizes,
             const std::string& pooling_name, std::int64_t step, std::int64_t epoch_start,
             Access access = Access::read) const {
    const Pooling pooling = to_pooling(pooling_name);
    Call call;
    call.tables.resize(names_.size());
    for (std::size_t t = 0; t < names_.size(); ++t) {
      TableArgs& table = call.tables[t];
      table.name = names_[t].c_str();
      table.key = keys_[t];
      take_weight(call, table, weights[t], access);
      if (with_state) {
        take_prev_iter(call, table, prev_iters[t], access);
        set_policy(table, nb::cast<const Update&>(updates[t]), lrs.at(t));
      }
    }
    take_indices(call, indices);
    const Array& o = call.keep(call.read, take_array(offsets, "offsets", Access::read));
    o.require_shape({-1}, "number of bags + 1");
    o.require_contiguous();
    if (o.integer() != call.batch.index_type) {
      throw nb::type_error(("offsets: got dtype " + o.dtype + ", accepted: the dtype of indices, " +
                            call.read[call.read.size() - 2].dtype)
                               .c_str());
    }
    const std::int64_t bags = o.shape[0] - 1;
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
        if (b < 0) bad_value("batch_sizes: got " + std::to_string(b) + ", accepted: sizes >= 0");
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
      FeatureArgs feature{feature_tables_[f], dim,    first_bag, sizes[f], 0, 0,
                          first_bag,          column, total_dim};
      call.features.push_back(feature);
      first_bag += sizes[f];
      column += dim;
    }
    finish(call, step, epoch_start);
    check_batch(call);  // also finds where each feature's indices lie
    if (!batch_sizes.is_none() || pooling == Pooling::none) {  // flat output, feature after feature
      std::int64_t offset = 0;
      for (FeatureArgs& f : call.features) {
        f.out_offset = offset;
        f.out_stride = f.dim;
        if (pooling == Pooling::none) f.first_row = f.first_position;
        offset += (call.batch.pooled ? f.bags : f.positions) * f.dim;
      }
    }
    return call;
  }

  std::vector<std::string> names_;
  std::vector<std::uint64_t> keys_;
  std::vector<std::int32_t> feature_tables_;
  Scratch scratch_;
  std::mutex busy_;
};

// -------------------------------------------------------------------------------------- reference

void reference_apply(const Update& update, nb::handle weight, nb::handle grad, nb::handle indices,
                     nb::handle momentum1, nb::handle prev_iter, std::int64_t step, double lr,
                     std::int64_t epoch_start) {
  const auto take = [](nb::handle h, const char* name, Access access, const char* dtype,
                       std::initializer_list<std::int64_t> shape) {
    Array a = take_array(h, name, access);
    a.require_shape(shape, "see the docstring");
    a.require_dtype(dtype);
    a.require_contiguous();
    return a;
  };
  const Array w = take(weight, "weight", Access::write, "float64", {-1, -1});
  const Array i = take(indices, "indices", Access::read, "int64", {-1});
  const Array g = take(grad, "grad", Access::read, "float64", {i.shape[0], w.shape[1]});
  const Array m = take(momentum1, "momentum1", Access::write, "float64", {w.shape[0]});
  const Array p = take(prev_iter, "prev_iter", Access::write, "int64", {w.shape[0]});
  const auto* rows = static_cast<const std::int64_t*>(i.data);
  for (std::int64_t k = 0; k < i.shape[0]; ++k) {
    if (rows[k] < 0 || rows[k] >= w.shape[0]) bad_index("indices: out of range");
  }
  coldrow::reference::apply(update.reference(), static_cast<double*>(w.data), w.shape[1],
                            static_cast<double*>(m.data), static_cast<std::int64_t*>(p.data),
                            static_cast<const double*>(g.data), rows, i.shape[0], step, lr,
                            epoch_start);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Compiled part of coldrow. Private: use the functions and classes of `coldrow`.";
  // Caches and modules still alive at exit are no leak; the leak tests ask for the report.
  nb::set_leak_warnings(std::getenv("COLDROW_LEAK_WARNINGS") != nullptr);
  pthread_atfork(nullptr, nullptr, [] { forked = true; });

  nb::class_<Update>(m, "Update", "The compiled form of coldrow.RowUpdate.")
      .def(
          "__init__",
          [](Update* self, const std::string& optimizer, double eps, double ema_beta,
             const std::string& decay, bool epoch_gated, double alpha, double min_shrinkage,
             double weight_decay, double half_life, const std::string& rounding, std::uint64_t seed,
             bool decay_state) {
            new (self) Update(make_update(optimizer, eps, ema_beta, decay, epoch_gated, alpha,
                                          min_shrinkage, weight_decay, half_life, rounding, seed,
                                          decay_state));
          },
          "optimizer"_a, "eps"_a, "ema_beta"_a, "decay"_a, "epoch_gated"_a, "alpha"_a,
          "min_shrinkage"_a, "weight_decay"_a, "half_life"_a, "rounding"_a, "seed"_a,
          "decay_state"_a)
      .def_prop_ro("scalar_states", [](const Update& u) { return u.scalar_states; });

  m.def("apply", &apply, "update"_a, "weight"_a.none(), "grad"_a.none(), "indices"_a.none(),
        "scalars"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a, "on_nonfinite"_a,
        "table"_a, "row_offset"_a, "col_offset"_a, "check_step"_a, "check_only"_a,
        "One step on one table, in place, or only its checks. Returns the number of rows skipped "
        "as non-finite.");
  m.def("read", &read, "update"_a, "out"_a.none(), "weight"_a.none(), "indices"_a.none(),
        "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a,
        "out[i] = row indices[i] as a read-charged forward before `step` sees it.");

  nb::class_<TableBatch>(m, "TableBatch", "Tables and features of a table-batched module.")
      .def(nb::init<std::vector<std::string>, std::vector<std::uint64_t>,
                    std::vector<std::int32_t>>(),
           "names"_a, "keys"_a, "feature_tables"_a)
      .def("lookup", &TableBatch::lookup, "weights"_a, "prev_iters"_a, "updates"_a, "lrs"_a,
           "indices"_a.none(), "offsets"_a.none(), "per_sample_weights"_a.none(),
           "batch_sizes"_a.none(), "pooling"_a, "read"_a, "step"_a, "epoch_start"_a, "out"_a.none())
      .def("weight_gradients", &TableBatch::weight_gradients, "weights"_a, "prev_iters"_a,
           "updates"_a, "lrs"_a, "indices"_a.none(), "offsets"_a.none(), "batch_sizes"_a.none(),
           "pooling"_a, "read"_a, "step"_a, "epoch_start"_a, "grad"_a.none(), "out"_a.none())
      .def("update", &TableBatch::update, "weights"_a, "scalars"_a, "prev_iters"_a, "updates"_a,
           "lrs"_a, "indices"_a.none(), "offsets"_a.none(), "per_sample_weights"_a.none(),
           "batch_sizes"_a.none(), "pooling"_a, "step"_a, "epoch_start"_a, "grad"_a.none(),
           "on_nonfinite"_a);

  m.def(
      "factor",
      [](const Update& u, std::int64_t prev_iter, std::int64_t step, double lr,
         std::int64_t epoch_start, bool read) {
        if (prev_iter < 0 || prev_iter > step) bad_value("prev_iter: accepted: 0 to step");
        return kernels->factor(u.args, static_cast<std::int32_t>(prev_iter),
                               static_cast<std::int32_t>(to_step(step)), to_lr(lr),
                               to_epoch_start(epoch_start), read);
      },
      "update"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a, "read"_a,
      "The decay factor of a touch at `step`, or of a read before it.");

  m.def("reference_apply", &reference_apply, "update"_a, "weight"_a.none(), "grad"_a.none(),
        "indices"_a.none(), "momentum1"_a.none(), "prev_iter"_a.none(), "step"_a, "lr"_a,
        "epoch_start"_a,
        "The float64 reference of one step: weight float64 [rows, dim], grad float64 [n, dim], "
        "indices int64 [n], momentum1 float64 [rows], prev_iter int64 [rows].");
  m.def(
      "reference_read_factor",
      [](const Update& u, std::int64_t prev_iter, std::int64_t step, double lr,
         std::int64_t epoch_start) {
        return coldrow::reference::read_factor(u.reference(), prev_iter, step, lr, epoch_start);
      },
      "update"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a,
      "The float64 reference of what a read-charged forward multiplies a row by.");

  m.def("threads", [] { return threads_for(INT_MAX, 1); }, "Threads a large call would use now.");
  m.def(
      "builds",
      [] {
        std::vector<std::string> names;
        for (auto k = available_kernels(); *k != nullptr; ++k) names.push_back((*k)->name);
        return names;
      },
      "Instruction-set builds this machine can run, best first.");
  m.def("build", [] { return std::string(kernels->name); }, "The build in use.");
  m.def(
      "use_build",
      [](const std::string& name) {
        for (auto k = available_kernels(); *k != nullptr; ++k) {
          if (name == (*k)->name) {
            kernels = *k;
            return;
          }
        }
        bad_value("build: got '" + name + "', accepted: one of builds()");
      },
      "name"_a, "Use another build; results do not change. For tests.");
}

}  // namespace coldrow_module
