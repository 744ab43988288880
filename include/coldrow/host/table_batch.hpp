// A batch of lookups, or of gradients, over several tables in one call: what the Python module runs.
//
// Tables, policies, types and the number of threads are known at run time (table/any.hpp). In order:
//
//   check_batch    offsets and indices; finds where each feature's indices lie. The others trust them.
//   lookup         forward: pool rows, as stored or with the decay they owe (read)
//   weight_gradients   backward: the gradient of per_sample_weights
//   update         backward: for each row that the batch touches, sum its gradients and update it once
//
// None allocates: lookup_bytes() and update_bytes() say how much memory a call works in, aligned to 64.
// They are templates of the list of types that weights, outputs and gradients may have, so that a program
// compiles what it uses: host::lookup<TypeList<float>>(...).
#pragma once

#include "../table/any.hpp"
#include "lookup.hpp"
#include "rows.hpp"
#include "update_of.hpp"

COLDROW_BEGIN

namespace host {

// ------------------------------------------------------------------------------------------- batch

// Calls f with a zero of the type of the indices.
template <class F>
auto with_index(IndexType type, const F& f) {
  return type == IndexType::i32 ? f(std::int32_t{}) : f(std::int64_t{});
}

template <class Index>
Batch<Index> typed(const AnyBatch& b) {
  return {static_cast<const Index*>(b.indices),
          static_cast<const Index*>(b.offsets),
          b.bags,
          b.positions,
          b.features,
          b.num_features,
          b.pooled,
          b.mean,
          b.per_sample_weights};
}

// The first thing wrong with offsets and then with indices; fills first_position and positions of the
// features, where there are offsets.
template <class = void>
BatchProblem check_batch(const AnyBatch& b) {
  return with_index(b.index_type, [&](auto index) -> BatchProblem {
    using Index = decltype(index);
    const auto* offsets = static_cast<const Index*>(b.offsets);
    if (offsets != nullptr) {
      const BatchProblem p = check_offsets(offsets, b.bags, b.positions);
      if (p.kind != BatchProblem::none) return p;
    }
    for (std::int32_t f = 0; f < b.num_features; ++f) {
      Feature& feature = b.features[f];
      if (offsets != nullptr) {
        feature.first_position = offsets[feature.first_bag];
        feature.positions = offsets[feature.first_bag + feature.bags] - feature.first_position;
      }
      Feature one = feature;
      one.table = 0;
      Batch<Index> batch = typed<Index>(b);
      batch.features = &one;
      batch.num_features = 1;
      BatchProblem p = check_indices(batch, &b.tables[feature.table].rows);
      p.feature = f;
      if (p.kind != BatchProblem::none) return p;
    }
    return BatchProblem{};
  });
}

// ------------------------------------------------------------------------------------------ lookup

inline const AnyDecay& decay_of(const AnyTable& table) {
  return *static_cast<const AnyDecay*>(table.update.decay);
}

// Bytes that lookup() and weight_gradients() work in.
inline std::size_t lookup_bytes(const AnyBatch& b, bool read) {
  Workspace w(nullptr);
  w.take<float>(read ? b.positions : 0);
  return w.bytes();
}

// Calls f(bags) for the bags of one feature that belong to `part`; read-charged ones a few at a time.
// (Parts have equal numbers of bags.)
template <class Weight, class Index, class F>
void for_bags(const AnyBatch& b, bool read, float* read_scale, const Feature& feature, int part,
              const F& f) {
  const AnyTable& table = b.tables[feature.table];
  const auto* indices = static_cast<const Index*>(b.indices);
  const auto* offsets = static_cast<const Index*>(b.pooled ? b.offsets : nullptr);
  const bool by_bag = offsets != nullptr;
  const std::int64_t first = by_bag ? feature.first_bag : feature.first_position;
  const std::int64_t count = by_bag ? feature.bags : feature.positions;
  Bags<Weight, Index> bags{static_cast<const Weight*>(table.weight),
                           feature.dim,
                           indices,
                           offsets,
                           first + part_begin(count, part, b.threads),
                           first + part_begin(count, part + 1, b.threads),
                           feature.first_position + feature.positions,
                           b.per_sample_weights,
                           b.mean};
  if (!read) {
    f(bags);
    return;
  }
  bags.scale = read_scale;
  const auto decay =
      prepare(decay_of(table), static_cast<std::int32_t>(b.step - 1), table.lr, b.epoch_start);
  const Strided<const std::int32_t> prev_iter{table.prev_iter, table.prev_iter_stride};
  const std::int64_t end = bags.end, last = bags.first(end);
  while (bags.begin < end) {
    const std::int64_t lo = bags.first(bags.begin);
    bags.end = bags.begin + 1;
    while (bags.end < end && bags.first(bags.end + 1) - lo <= kReadChunk) ++bags.end;
    decay.visit([&](const auto& d) {
      read_scales(d, b.step, static_cast<float>(table.lr), prev_iter, indices, lo,
                  bags.first(bags.end), b.per_sample_weights, read_scale, last);
    });
    f(bags);
    bags.begin = bags.end;
  }
}

// Calls f(bags, value, element, stride) in parallel for some bags after another: `value` has the type that
// value_type names, and the first bag's output row begins at `element` of the output, the
// next one `stride` elements on.
template <class Types, class F>
void for_output_rows(const AnyBatch& b, bool read, NumericType value_type, void* workspace,
                     const F& f) {
  float* read_scale = Workspace(workspace).take<float>(read ? b.positions : 0);
  parallel(b.threads, [&](int part) {
    for (std::int32_t i = 0; i < b.num_features; ++i) {
      const Feature& feature = b.features[i];
      with_index(b.index_type, [&](auto index) {
        with_numeric<Types>(b.tables[feature.table].dtype, [&](auto weight) {
          with_numeric<Types>(value_type, [&](auto value) {
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

// Writes the output rows of a checked batch. read: rows as they have become, by the decay that they owe.
template <class Types = StoredTypes>
void lookup(const AnyBatch& b, bool read, void* out, NumericType out_type, void* workspace) {
  for_output_rows<Types>(
      b, read, out_type, workspace,
      [&](const auto& bags, auto value, std::int64_t element, std::int64_t stride) {
        lookup_bags(bags, static_cast<decltype(value)*>(out) + element, stride);
      });
}

// out[p], [positions]: the gradient of per_sample_weights, where grad is that of the output.
template <class Types = StoredTypes>
void weight_gradients(const AnyBatch& b, bool read, const void* grad, NumericType grad_type,
                      float* out, void* workspace) {
  AnyBatch unweighted = b;  // the scale is the read factor alone
  unweighted.per_sample_weights = nullptr;
  for_output_rows<Types>(
      unweighted, read, grad_type, workspace,
      [&](const auto& bags, auto value, std::int64_t element, std::int64_t stride) {
        weight_gradients(bags, static_cast<const decltype(value)*>(grad) + element, stride, out);
      });
}

// ------------------------------------------------------------------------------------------ update

struct UpdateOptions {
  // What to do with a row whose update is not finite.
  OnNonfinite on_nonfinite = OnNonfinite::skip;
  // What to look for first; where it is found nothing is written: rows whose update is not finite, and
  // rows whose prev_iter is not before the step.
  bool refuse_nonfinite = false;
  bool refuse_stale = false;
  bool check_only = false;  // look, and write nothing
};

// A run of equal rows that all threads sum together.
struct HotRun {
  std::int32_t table;
  std::int64_t begin, length;  // in the table's sorted entries
};

// The pieces of update()'s workspace.
struct UpdateSpace {
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
  ApplyReport* reports;  // [threads]
  void* entries;
  void* other;

  float* sums_of(int hot_run) const { return hot_sums + hot_run * kMaxParts * hot_stride; }
};

// Calls f with one of the smallest entries that hold what the batch sorts.
template <class F>
auto with_entry(const AnyBatch& b, const F& f) {
  for (std::int32_t t = 0; t < b.num_tables; ++t) {
    if (b.tables[t].rows > std::int64_t{1} << 32) return f(WideEntry{});
  }
  const bool scaled = b.per_sample_weights != nullptr || (b.mean && b.pooled);
  return scaled ? f(ScaledEntry{}) : f(PlainEntry{});
}

inline UpdateSpace lay_out(const AnyBatch& b, Workspace& w) {
  UpdateSpace s{};
  s.features_by_table = w.take<Feature>(b.num_features);
  s.first_feature = w.take<std::int32_t>(b.num_tables + 1);
  s.table_begin = w.take<std::int64_t>(b.num_tables + 1);
  s.first_part = w.take<std::int32_t>(b.num_tables + 1);
  s.sorted = w.take<void*>(b.num_tables);
  s.counts = w.take<std::uint32_t>(b.threads * kCounts);
  s.scratch_size = 16;
  for (std::int32_t t = 0; t < b.num_tables; ++t) {
    s.scratch_size = max_of(s.scratch_size, scratch_floats(b.tables[t].dim) + 16);
    s.hot_stride = max_of<std::int64_t>(s.hot_stride, padded(b.tables[t].dim));
  }
  s.scratch = w.take<float>(s.scratch_size * b.threads);
  const std::int64_t most_hot_runs = b.positions / hot_length(b.positions, b.threads);
  s.hot_runs = w.take<HotRun>(most_hot_runs);
  s.hot_sums = w.take<float>(most_hot_runs * kMaxParts * s.hot_stride);
  s.reports = w.take<ApplyReport>(b.threads);
  with_entry(b, [&](auto entry) {
    s.entries = w.take<decltype(entry)>(b.positions);
    s.other = w.take<decltype(entry)>(b.positions);
  });
  return s;
}

// Bytes that update() works in.
inline std::size_t update_bytes(const AnyBatch& b) {
  Workspace w(nullptr);
  lay_out(b, w);
  return w.bytes();
}

inline void group_by_table(const AnyBatch& b, const UpdateSpace& s) {
  std::int32_t next = 0;
  s.table_begin[0] = s.first_feature[0] = s.first_part[0] = 0;
  const std::int64_t part = part_length(b.positions, b.threads);
  for (std::int32_t t = 0; t < b.num_tables; ++t) {
    s.table_begin[t + 1] = s.table_begin[t];
    for (std::int32_t f = 0; f < b.num_features; ++f) {
      if (b.features[f].table != t) continue;
      s.features_by_table[next++] = b.features[f];
      s.table_begin[t + 1] += b.features[f].positions;
    }
    s.first_feature[t + 1] = next;
    const std::int64_t entries = s.table_begin[t + 1] - s.table_begin[t];
    const std::int64_t parts = entries / part + (entries % part > 0);
    s.first_part[t + 1] = s.first_part[t] + static_cast<std::int32_t>(parts);
  }
}

// The update of one table at this step, ready to run.
struct TableRows {
  const RowsKernel* kernel;
  alignas(64) unsigned char made[RowsKernel::capacity];

  TableRows(const AnyBatch& b, const AnyTable& t, OnNonfinite on_nonfinite) {
    const auto& functions = *static_cast<const OptimizerKernels*>(t.update.optimizer_functions);
    RowsSpec spec{};
    spec.weight = t.weight;
    spec.rows = t.rows;
    spec.dim = t.dim;
    spec.prev_iter = {t.prev_iter, t.prev_iter_stride};
    for (int i = 0; i < functions.scalar_states; ++i) {
      spec.scalars[i] = {t.scalars[i], t.scalar_strides[i]};
    }
    for (int i = 0; i < functions.vector_states; ++i) spec.vectors[i] = t.vectors[i];
    spec.origin = {t.key, t.row_offset, t.col_offset, 0};
    spec.optimizer = t.update.optimizer;
    spec.decay = decay_of(t);
    spec.rounding = t.update.rounding;
    spec.lr = t.lr;
    spec.step = static_cast<std::int32_t>(b.step);
    spec.epoch_start = b.epoch_start;
    spec.decay_state = t.update.decay_state;
    spec.on_nonfinite = on_nonfinite;
    kernel = &functions.of_type[static_cast<int>(t.dtype)][t.update.rounding_number];
    kernel->make(spec, made);
  }
};

// Sorts each table's entries apart from the others', large tables by all threads together.
template <class Entry>
void sort_tables(const AnyBatch& b, const UpdateSpace& s) {
  with_index(b.index_type, [&](auto index) {
    const auto batch = typed<decltype(index)>(b);
    const auto entries_of = [&](std::int32_t t) { return s.table_begin[t + 1] - s.table_begin[t]; };
    const auto sort = [&](std::int32_t t, int threads, std::uint32_t* counts) {
      const std::int64_t begin = s.table_begin[t];
      const Lookups<decltype(index)> lookups{batch, s.features_by_table + s.first_feature[t],
                                             s.first_feature[t + 1] - s.first_feature[t], nullptr};
      s.sorted[t] = sort_lookups(lookups, row_bits(b.tables[t].rows), threads,
                                 static_cast<Entry*>(s.entries) + begin,
                                 static_cast<Entry*>(s.other) + begin, counts);
    };
    for (std::int32_t t = 0; t < b.num_tables; ++t) {
      if (sorted_together(entries_of(t), b.positions, b.threads)) sort(t, b.threads, s.counts);
    }
    parallel_parts(b.num_tables, b.threads, [&](int t, int thread) {
      if (!sorted_together(entries_of(t), b.positions, b.threads)) {
        sort(t, 1, s.counts + thread * kCounts);
      }
    });
  });
}

template <class Types, class Entry>
UpdateReport update_sorted(const AnyBatch& b, const void* grad, NumericType grad_type,
                           const UpdateOptions& options, const UpdateSpace& s) {
  // Calls f(sorted entries, gradient rows) of one table.
  const auto with_entries = [&](std::int32_t t, const auto& f) {
    with_numeric<Types>(grad_type, [&](auto value) {
      using Grad = decltype(value);
      f(static_cast<const Entry*>(s.sorted[t]),
        GradientRows<Grad>{static_cast<const Grad*>(grad), s.features_by_table + s.first_feature[t],
                           s.first_feature[t + 1] - s.first_feature[t]});
    });
  };
  const std::int64_t hot = hot_length(b.positions, b.threads);
  const auto runs_of = [&](std::int32_t t, int part) {
    return part_runs(static_cast<const Entry*>(s.sorted[t]),
                     s.table_begin[t + 1] - s.table_begin[t], part - s.first_part[t],
                     s.first_part[t + 1] - s.first_part[t], hot);
  };

  int hot_runs = 0;
  for (std::int32_t t = 0; b.threads > 1 && t < b.num_tables; ++t) {
    for (int part = s.first_part[t]; part < s.first_part[t + 1]; ++part) {
      const PartRuns r = runs_of(t, part);
      if (r.cut < r.hi) s.hot_runs[hot_runs++] = {t, r.cut, r.hi - r.cut};
    }
  }
  parallel_parts(hot_runs * kMaxParts, b.threads, [&](int part, int) {
    const HotRun& run = s.hot_runs[part / kMaxParts];
    const int slice = part % kMaxParts;
    if (slice >= slices_of(run.length)) return;
    with_entries(run.table, [&](const Entry* sorted, const auto& grads) {
      sum_slice(grads, sorted + run.begin, run.length, slice, b.tables[run.table].dim,
                s.sums_of(part / kMaxParts));
    });
  });
  for (int i = 0; i < hot_runs; ++i) {
    const HotRun& run = s.hot_runs[i];
    sum_slices(slices_of(run.length), b.tables[run.table].dim, s.sums_of(i));
  }

  // Calls f(the update of one table's rows, what it found).
  const auto with_rows = [&](std::int32_t t, int thread, const auto& f) {
    const TableRows rows(b, b.tables[t], options.on_nonfinite);
    ApplyReport found;
    f(rows, found);
    found.nonfinite.table = found.stale.table = t;
    s.reports[thread].merge(found);
  };
  const auto run = [&](Pass pass) {
    for (int thread = 0; thread < b.threads; ++thread) s.reports[thread] = {};
    const int parts = s.first_part[b.num_tables];
    parallel_parts(parts + hot_runs, b.threads, [&](int part, int thread) {
      if (part >= parts) {
        const HotRun& one = s.hot_runs[part - parts];
        with_rows(one.table, thread, [&](const TableRows& rows, ApplyReport& found) {
          const auto key = static_cast<const Entry*>(s.sorted[one.table])[one.begin].key;
          const RowGradient row{static_cast<std::int64_t>(key), s.sums_of(part - parts)};
          rows.kernel->run(rows.made, pass, &row, 1, found);
        });
        return;
      }
      std::int32_t t = 0, after = b.num_tables;
      while (after - t > 1) {  // the last table whose parts begin at or before this one
        const std::int32_t middle = t + (after - t) / 2;
        (s.first_part[middle] <= part ? t : after) = middle;
      }
      const PartRuns r = runs_of(t, part);
      with_rows(t, thread, [&](const TableRows& rows, ApplyReport& found) {
        with_entries(t, [&](const Entry* sorted, const auto& grads) {
          apply_runs(sorted, r.lo, r.cut, 0, b.tables[t].dim, grads, rows.kernel->memory(rows.made),
                     s.scratch + thread * s.scratch_size, [&](const RowGradient* some, int count) {
                       rows.kernel->run(rows.made, pass, some, count, found);
                     });
        });
      });
    });
    ApplyReport total;
    for (int thread = 0; thread < b.threads; ++thread) total.merge(s.reports[thread]);
    return total;
  };
  const auto report = [](const ApplyReport& r, bool refused) {
    return UpdateReport{{r.nonfinite.count, r.nonfinite.table, r.nonfinite.row},
                        {r.stale.count, r.stale.table, r.stale.row},
                        refused};
  };
  if (options.refuse_nonfinite || options.refuse_stale || options.check_only) {
    const ApplyReport found = run(Pass::check);
    const bool refused = (options.refuse_stale && found.stale.count > 0) ||
                         (options.refuse_nonfinite && found.nonfinite.count > 0);
    if (refused || options.check_only) return report(found, refused);
  }
  return report(run(Pass::update), false);
}

// One step of a checked batch. grad: of the output, laid out as it is.
template <class Types = StoredTypes>
UpdateReport update(const AnyBatch& b, const void* grad, NumericType grad_type,
                    const UpdateOptions& options, void* workspace) {
  Workspace w(workspace);
  const UpdateSpace s = lay_out(b, w);
  group_by_table(b, s);
  return with_entry(b, [&](auto entry) {
    sort_tables<decltype(entry)>(b, s);
    return update_sorted<Types, decltype(entry)>(b, grad, grad_type, options, s);
  });
}

}  // namespace host

COLDROW_END
