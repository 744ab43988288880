// The kernels of the Python module, compiled once per instruction set (COLDROW_ABI names the
// build). No standard library container or algorithm is used here: an inline function shared with
// other builds could end up with this build's instructions.
#include "kernels.hpp"

#include <coldrow/coldrow.hpp>

#include "policies.hpp"

namespace coldrow_module {
namespace {

using namespace coldrow;
using host::Workspace;

template <class Index>
Batch<Index> to_batch(const BatchArgs& b, const Feature* features) {
  return {static_cast<const Index*>(b.indices),
          static_cast<const Index*>(b.offsets),
          b.bags,
          b.positions,
          features,
          b.num_features,
          b.pooled,
          b.mean,
          b.per_sample_weights};
}

template <class F>
auto with_index(IndexType type, const F& f) {
  return type == IndexType::i32 ? f(std::int32_t{}) : f(std::int64_t{});
}

template <class F>
auto with_numeric(DType type, const F& f) {
  switch (type) {
    case DType::f16:
      return f(half{});
    case DType::bf16:
      return f(bfloat16{});
    case DType::f32:
      break;
  }
  return f(float{});
}

// ---------------------------------------------------------------------------------------- check

Problem check_batch(BatchArgs& b) {
  return with_index(b.index_type, [&](auto index) -> Problem {
    using Index = decltype(index);
    const auto* indices = static_cast<const Index*>(b.indices);
    const auto* offsets = static_cast<const Index*>(b.offsets);
    const auto report = [](const BatchProblem& p, std::int32_t feature) {
      return Problem{static_cast<Problem::Kind>(p.kind), p.position, p.value, feature};
    };
    if (offsets != nullptr) {
      const BatchProblem p = check_offsets(offsets, b.bags, b.positions);
      if (p.kind != BatchProblem::none) return report(p, -1);
    }
    for (std::int32_t f = 0; f < b.num_features; ++f) {
      FeatureArgs& feature = b.features[f];
      if (offsets != nullptr) {
        feature.first_position = offsets[feature.first_bag];
        feature.positions = offsets[feature.first_bag + feature.bags] - feature.first_position;
      }
      Feature one = to_feature(feature);
      one.table = 0;
      const Batch<Index> batch{indices, offsets, b.bags, b.positions, &one,
                               1,       true,    false,  nullptr};
      const BatchProblem p = check_indices(batch, &b.tables[feature.table].rows);
      if (p.kind != BatchProblem::none) return report(p, f);
    }
    return Problem{Problem::none, -1, 0, -1};
  });
}

// --------------------------------------------------------------------------------------- lookup

std::size_t lookup_bytes(const BatchArgs& b, bool read) {
  Workspace w(nullptr);
  w.take<float>(read ? b.positions : 0);
  return w.bytes();
}

// Calls f(bags) for the bags of one feature that belong to `part`; read-charged ones a few at a time.
// (Parts have equal numbers of bags.)
template <class Weight, class Index, class F>
void for_bags(const BatchArgs& b, bool read, float* read_scale, const FeatureArgs& feature,
              int part, const F& f) {
  const TableArgs& table = b.tables[feature.table];
  const auto* indices = static_cast<const Index*>(b.indices);
  const auto* offsets = static_cast<const Index*>(b.pooled ? b.offsets : nullptr);
  const bool by_bag = offsets != nullptr;
  const std::int64_t first = by_bag ? feature.first_bag : feature.first_position;
  const std::int64_t count = by_bag ? feature.bags : feature.positions;
  host::Bags<Weight, Index> bags{static_cast<const Weight*>(table.weight),
                                 feature.dim,
                                 indices,
                                 offsets,
                                 first + host::part_begin(count, part, b.threads),
                                 first + host::part_begin(count, part + 1, b.threads),
                                 feature.first_position + feature.positions,
                                 b.per_sample_weights,
                                 b.mean};
  if (!read) {
    f(bags);
    return;
  }
  bags.scale = read_scale;
  const auto decay = prepare(to_decay(table.update), static_cast<std::int32_t>(b.step - 1),
                             table.lr, b.epoch_start);
  const Strided<const std::int32_t> prev_iter{table.prev_iter, table.prev_iter_stride};
  // A few hundred indices at a time: their scales stay in the first-level cache.
  const std::int64_t end = bags.end, last = bags.first(end);
  while (bags.begin < end) {
    const std::int64_t lo = bags.first(bags.begin);
    bags.end = bags.begin + 1;
    while (bags.end < end && bags.first(bags.end + 1) - lo <= 512) ++bags.end;
    decay.visit([&](const auto& d) {
      host::read_scales(d, b.step, static_cast<float>(table.lr), prev_iter, indices, lo,
                        bags.first(bags.end), b.per_sample_weights, read_scale, last);
    });
    f(bags);
    bags.begin = bags.end;
  }
}

// Calls f(bags, value, element, stride) in parallel for some bags after another: `value` has the type that
// value_type names, and the first bag's output row begins at `element` of the output, the
// next one `stride` elements on.
template <class F>
void for_output_rows(const BatchArgs& b, bool read, DType value_type, void* workspace, const F& f) {
  float* read_scale = Workspace(workspace).take<float>(read ? b.positions : 0);
  host::parallel(b.threads, [&](int part) {
    for (std::int32_t i = 0; i < b.num_features; ++i) {
      const FeatureArgs& feature = b.features[i];
      with_index(b.index_type, [&](auto index) {
        with_numeric(b.tables[feature.table].dtype, [&](auto weight) {
          with_numeric(value_type, [&](auto value) {
            for_bags<decltype(weight), decltype(index)>(
                b, read, read_scale, feature, part, [&](const auto& bags) {
                  const std::int64_t row = bags.begin - feature.first_row;
                  f(bags, value, feature.out_offset + row * feature.out_stride, feature.out_stride);
                });
          });
        });
      });
    }
  });
}

void lookup(const BatchArgs& b, bool read, void* out, DType out_type, void* workspace) {
  for_output_rows(b, read, out_type, workspace,
                  [&](const auto& bags, auto value, std::int64_t element, std::int64_t stride) {
                    host::lookup_bags(bags, static_cast<decltype(value)*>(out) + element, stride);
                  });
}

void weight_gradients(const BatchArgs& b, bool read, const void* grad, DType grad_type, float* out,
                      void* workspace) {
  BatchArgs unweighted = b;  // the scale is the read factor alone
  unweighted.per_sample_weights = nullptr;
  for_output_rows(unweighted, read, grad_type, workspace,
                  [&](const auto& bags, auto value, std::int64_t element, std::int64_t stride) {
                    const auto* from = static_cast<const decltype(value)*>(grad) + element;
                    host::weight_gradients(bags, from, stride, out);
                  });
}

// --------------------------------------------------------------------------------------- update

// One run that would keep a thread busy while others have nothing left: all threads sum it together.
struct HotRun {
  std::int32_t table;
  std::int64_t begin, length;  // in the table's sorted entries
};
// From this length on; a run that long is longer than a part.
std::int64_t hot_length(const BatchArgs& b) {
  if (b.threads == 1) return INT64_MAX;
  return max_of<std::int64_t>(4096, b.positions / (4 * b.threads));
}
std::int64_t most_hot_runs(const BatchArgs& b) { return b.positions / hot_length(b); }

struct UpdateSpace {
  Feature* features;            // in the order of the batch
  Feature* features_by_table;   // grouped by table
  std::int32_t* first_feature;  // [tables + 1], into features_by_table
  std::int64_t* table_begin;    // [tables + 1], first entry of each table
  std::int32_t* first_part;     // [tables + 1], the parts that a table's entries are cut into
  HotRun* hot_runs;             // [most_hot_runs()]
  float* hot_sums;              // [most_hot_runs(), kMaxParts, hot_stride]
  std::int64_t hot_stride;
  void** sorted;          // [tables], its sorted entries
  std::uint32_t* counts;  // [threads, kCounts]
  float* scratch;         // [threads, scratch_size]
  std::int64_t scratch_size;
  host::ApplyReport* reports;  // [threads]
  void* entries;
  void* other;
};

bool wide_keys(const BatchArgs& b) {
  for (std::int32_t t = 0; t < b.num_tables; ++t) {
    if (b.tables[t].rows > std::int64_t{1} << 32) return true;
  }
  return false;
}
bool scaled(const BatchArgs& b) { return b.per_sample_weights != nullptr || (b.mean && b.pooled); }

template <class F>
auto with_entry(const BatchArgs& b, const F& f) {
  if (wide_keys(b)) return f(host::WideEntry{});
  return scaled(b) ? f(host::ScaledEntry{}) : f(host::PlainEntry{});
}

UpdateSpace lay_out(const BatchArgs& b, Workspace& w) {
  UpdateSpace s{};
  s.features = w.take<Feature>(b.num_features);
  s.features_by_table = w.take<Feature>(b.num_features);
  s.first_feature = w.take<std::int32_t>(b.num_tables + 1);
  s.table_begin = w.take<std::int64_t>(b.num_tables + 1);
  s.first_part = w.take<std::int32_t>(b.num_tables + 1);
  s.sorted = w.take<void*>(b.num_tables);
  s.counts = w.take<std::uint32_t>(b.threads * host::kCounts);
  s.scratch_size = 16;
  for (std::int32_t t = 0; t < b.num_tables; ++t) {
    s.scratch_size = max_of(s.scratch_size, host::scratch_floats(b.tables[t].dim) + 16);
    s.hot_stride = max_of<std::int64_t>(s.hot_stride, host::padded(b.tables[t].dim));
  }
  s.scratch = w.take<float>(s.scratch_size * b.threads);
  s.hot_runs = w.take<HotRun>(most_hot_runs(b));
  s.hot_sums = w.take<float>(most_hot_runs(b) * kMaxParts * s.hot_stride);
  s.reports = w.take<host::ApplyReport>(b.threads);
  with_entry(b, [&](auto entry) {
    s.entries = w.take<decltype(entry)>(b.positions);
    s.other = w.take<decltype(entry)>(b.positions);
  });
  return s;
}

std::size_t update_bytes(const BatchArgs& b) {
  Workspace w(nullptr);
  lay_out(b, w);
  return w.bytes();
}

void fill_features(const BatchArgs& b, const UpdateSpace& s) {
  for (std::int32_t f = 0; f < b.num_features; ++f) s.features[f] = to_feature(b.features[f]);
  std::int32_t next = 0;
  s.table_begin[0] = s.first_feature[0] = s.first_part[0] = 0;
  // Parts go to whichever thread is free: some cost more than others. One thread needs one a table.
  const std::int64_t part =
      b.threads == 1 ? INT64_MAX : max_of<std::int64_t>(2048, b.positions / (16 * b.threads));
  for (std::int32_t t = 0; t < b.num_tables; ++t) {
    s.table_begin[t + 1] = s.table_begin[t];
    for (std::int32_t f = 0; f < b.num_features; ++f) {
      if (s.features[f].table != t) continue;
      s.features_by_table[next++] = s.features[f];
      s.table_begin[t + 1] += s.features[f].positions;
    }
    s.first_feature[t + 1] = next;
    const std::int64_t entries = s.table_begin[t + 1] - s.table_begin[t];
    const std::int64_t parts = entries / part + (entries % part > 0);
    s.first_part[t + 1] = s.first_part[t] + static_cast<std::int32_t>(parts);
  }
}

// Calls f with the optimizer's kernels and its struct.
template <class F>
auto with_optimizer_kernels(const UpdateArgs& u, const F& f) {
  if (u.optimizer == OptimizerKind::external) {
    return f(*static_cast<const host::OptimizerKernels*>(u.external_optimizer), u.optimizer_policy);
  }
  return with_optimizer(u, [&](const auto& optimizer) {
    static constexpr auto kernels =
        host::OptimizerKernels::of<std::remove_cvref_t<decltype(optimizer)>>();
    return f(kernels, &optimizer);
  });
}

StateArgs state(const UpdateArgs& u) {
  return with_optimizer_kernels(u, [](const host::OptimizerKernels& k, const void*) {
    StateArgs s{k.scalar_states, k.vector_states, {}};
    for (int i = 0; i < k.scalar_states + k.vector_states; ++i) s.names[i] = k.state_names[i];
    return s;
  });
}

const host::RowsKernel& rows_kernel(const host::OptimizerKernels& k, DType dtype,
                                    RoundingKind rounding) {
  const bool stochastic = rounding == RoundingKind::stochastic;
  switch (dtype) {
    case DType::f16:
      return stochastic ? k.f16_stochastic : k.f16_nearest;
    case DType::bf16:
      return stochastic ? k.bf16_stochastic : k.bf16_nearest;
    case DType::f32:
      break;
  }
  return k.f32;
}

// The update of one table at this step, ready to run.
struct TableRows {
  const host::RowsKernel* kernel;
  alignas(64) unsigned char made[host::RowsKernel::capacity];

  TableRows(const BatchArgs& b, const TableArgs& t, OnNonfinite on_nonfinite) {
    with_optimizer_kernels(t.update, [&](const host::OptimizerKernels& k, const void* optimizer) {
      host::RowsSpec spec{};
      spec.weight = t.weight;
      spec.rows = t.rows;
      spec.dim = t.dim;
      spec.prev_iter = {t.prev_iter, t.prev_iter_stride};
      for (int i = 0; i < k.scalar_states; ++i) {
        spec.scalars[i] = {t.scalars[i], t.scalar_strides[i]};
      }
      for (int i = 0; i < k.vector_states; ++i) spec.vectors[i] = t.vectors[i];
      spec.origin = {t.key, t.row_offset, t.col_offset, 0};
      spec.optimizer = optimizer;
      spec.decay = to_decay(t.update);
      spec.seed = t.update.seed;
      spec.lr = t.lr;
      spec.step = static_cast<std::int32_t>(b.step);
      spec.epoch_start = b.epoch_start;
      spec.decay_state = t.update.decay_state;
      spec.on_nonfinite = on_nonfinite == OnNonfinite::propagate ? coldrow::OnNonfinite::propagate
                                                                 : coldrow::OnNonfinite::skip;
      kernel = &rows_kernel(k, t.dtype, t.update.rounding);
      kernel->make(spec, made);
    });
  }
};

template <class Entry>
UpdateReport run_update(const BatchArgs& b, const void* grad, DType grad_type,
                        OnNonfinite on_nonfinite, bool check_step, bool check_only,
                        const UpdateSpace& s) {
  auto* entries = static_cast<Entry*>(s.entries);
  auto* other = static_cast<Entry*>(s.other);
  // Each table's entries are sorted apart from the others', large tables by all threads together.
  with_index(b.index_type, [&](auto index) {
    const auto batch = to_batch<decltype(index)>(b, s.features);
    const auto sort = [&](std::int32_t t, int threads, std::uint32_t* counts) {
      const std::int64_t begin = s.table_begin[t];
      const host::Lookups<decltype(index)> lookups{batch, s.features_by_table + s.first_feature[t],
                                                   s.first_feature[t + 1] - s.first_feature[t],
                                                   nullptr};
      s.sorted[t] = host::sort_lookups(lookups, host::row_bits(b.tables[t].rows), threads,
                                       entries + begin, other + begin, counts);
    };
    const auto together = [&](std::int32_t t) {
      return s.table_begin[t + 1] - s.table_begin[t] > b.positions / (2 * b.threads);
    };
    for (std::int32_t t = 0; t < b.num_tables; ++t) {
      if (together(t)) sort(t, b.threads, s.counts);
    }
    host::parallel_parts(b.num_tables, b.threads, [&](int t, int thread) {
      if (!together(t)) sort(t, 1, s.counts + thread * host::kCounts);
    });
  });

  // Calls f(sorted entries, gradient rows) of one table.
  const auto with_entries = [&](std::int32_t t, const auto& f) {
    with_numeric(grad_type, [&](auto value) {
      using Grad = decltype(value);
      f(static_cast<const Entry*>(s.sorted[t]),
        host::GradientRows<Grad>{static_cast<const Grad*>(grad),
                                 s.features_by_table + s.first_feature[t],
                                 s.first_feature[t + 1] - s.first_feature[t]});
    });
  };
  const auto runs_of = [&](std::int32_t t, int part) {
    return host::part_runs(static_cast<const Entry*>(s.sorted[t]),
                           s.table_begin[t + 1] - s.table_begin[t], part - s.first_part[t],
                           s.first_part[t + 1] - s.first_part[t], hot_length(b));
  };

  int hot_runs = 0;
  for (std::int32_t t = 0; b.threads > 1 && t < b.num_tables; ++t) {
    for (int part = s.first_part[t]; part < s.first_part[t + 1]; ++part) {
      const host::PartRuns r = runs_of(t, part);
      if (r.cut < r.hi) s.hot_runs[hot_runs++] = {t, r.cut, r.hi - r.cut};
    }
  }
  const auto hot_sums = [&](int run) { return s.hot_sums + run * kMaxParts * s.hot_stride; };
  host::parallel_parts(hot_runs * kMaxParts, b.threads, [&](int part, int) {
    const HotRun& run = s.hot_runs[part / kMaxParts];
    const int slice = part % kMaxParts;
    if (slice >= host::slices_of(run.length)) return;
    with_entries(run.table, [&](const Entry* sorted, const auto& grads) {
      host::sum_slice(grads, sorted + run.begin, run.length, slice, b.tables[run.table].dim,
                      hot_sums(part / kMaxParts));
    });
  });
  for (int i = 0; i < hot_runs; ++i) {
    const HotRun& run = s.hot_runs[i];
    host::sum_slices(host::slices_of(run.length), b.tables[run.table].dim, hot_sums(i));
  }

  // Calls f(the update of one table's rows, what it found).
  const auto with_rows = [&](std::int32_t t, int thread, const auto& f) {
    const TableRows rows(b, b.tables[t], on_nonfinite);
    host::ApplyReport found;
    f(rows, found);
    found.nonfinite.table = found.stale.table = t;
    s.reports[thread].merge(found);
  };
  const auto run = [&](host::Pass pass) {
    for (int thread = 0; thread < b.threads; ++thread) s.reports[thread] = {};
    const int parts = s.first_part[b.num_tables];
    host::parallel_parts(parts + hot_runs, b.threads, [&](int part, int thread) {
      if (part >= parts) {
        const HotRun& hot = s.hot_runs[part - parts];
        with_rows(hot.table, thread, [&](const TableRows& rows, host::ApplyReport& found) {
          const auto key = static_cast<const Entry*>(s.sorted[hot.table])[hot.begin].key;
          const host::RowGradient row{static_cast<std::int64_t>(key), hot_sums(part - parts)};
          rows.kernel->run(rows.made, pass, &row, 1, found);
        });
        return;
      }
      std::int32_t t = 0, after = b.num_tables;
      while (after - t > 1) {  // the last table whose parts begin at or before this one
        const std::int32_t middle = t + (after - t) / 2;
        (s.first_part[middle] <= part ? t : after) = middle;
      }
      const host::PartRuns r = runs_of(t, part);
      with_rows(t, thread, [&](const TableRows& rows, host::ApplyReport& found) {
        with_entries(t, [&](const Entry* sorted, const auto& grads) {
          host::apply_runs(sorted, r.lo, r.cut, 0, b.tables[t].dim, grads,
                           rows.kernel->memory(rows.made), s.scratch + thread * s.scratch_size,
                           [&](const host::RowGradient* some, int count) {
                             rows.kernel->run(rows.made, pass, some, count, found);
                           });
        });
      });
    });
    host::ApplyReport total;
    for (int thread = 0; thread < b.threads; ++thread) total.merge(s.reports[thread]);
    return total;
  };
  const auto report = [](const host::ApplyReport& r, bool refused) {
    return UpdateReport{{r.nonfinite.count, r.nonfinite.table, r.nonfinite.row},
                        {r.stale.count, r.stale.table, r.stale.row},
                        refused};
  };
  if (on_nonfinite == OnNonfinite::raise || check_step || check_only) {
    const host::ApplyReport found = run(host::Pass::check);
    const bool refused = (check_step && found.stale.count > 0) ||
                         (on_nonfinite == OnNonfinite::raise && found.nonfinite.count > 0);
    if (refused || check_only) return report(found, refused);
  }
  return report(run(host::Pass::update), false);
}

UpdateReport update(const BatchArgs& b, const void* grad, DType grad_type, OnNonfinite on_nonfinite,
                    bool check_step, bool check_only, void* workspace) {
  Workspace w(workspace);
  const UpdateSpace s = lay_out(b, w);
  fill_features(b, s);
  return with_entry(b, [&](auto entry) {
    return run_update<decltype(entry)>(b, grad, grad_type, on_nonfinite, check_step, check_only, s);
  });
}

float factor(const UpdateArgs& u, std::int32_t prev_iter, std::int32_t step, double lr,
             std::int32_t epoch_start, bool read) {
  const auto decay = prepare(to_decay(u), read ? step - 1 : step, lr, epoch_start);
  const float lr32 = static_cast<float>(lr);
  return read ? read_factor(decay, step, prev_iter, lr32)
              : touch_factor(decay, step, prev_iter, lr32);
}

}  // namespace

#define COLDROW_STRING_(x) #x
#define COLDROW_STRING(x) COLDROW_STRING_(x)
#define COLDROW_JOIN_(a, b) a##b
#define COLDROW_JOIN(a, b) COLDROW_JOIN_(a, b)

// kernels_<build>
extern const Kernels COLDROW_JOIN(kernels_, COLDROW_ABI);
const Kernels COLDROW_JOIN(kernels_, COLDROW_ABI) = {COLDROW_STRING(COLDROW_ABI),
                                                     state,
                                                     check_batch,
                                                     lookup_bytes,
                                                     lookup,
                                                     weight_gradients,
                                                     update_bytes,
                                                     update,
                                                     factor};

}  // namespace coldrow_module
