// Tables for tests of the device drivers, and a batch on them through the host drivers.
#pragma once

#include <coldrow/device/device.cuh>

#include "../host/batches.hpp"

namespace coldrow_test {

template <class Index>
device::Integers integers(const std::vector<Index>& x) {
  return {x.data(), sizeof(Index) == 8};
}

// A table, with the state that Optimizer declares; scalars and prev_iter in one record per row.
template <class W, class Optimizer>
struct TestTable {
  static constexpr int kScalars = Optimizer::scalar_states;
  static constexpr int kVectors = Optimizer::vector_states;
  static constexpr int kRecord = kScalars + 1;  // the last is prev_iter
  std::int64_t rows;
  int dim;
  std::vector<W> weight;
  std::vector<std::int32_t> records;  // [rows, kRecord]
  std::vector<std::vector<float>> vectors;

  TestTable(std::int64_t r, int d, Random& random)
      : rows(r),
        dim(d),
        weight(random.numbers<W>(r * d)),
        records(static_cast<std::size_t>(r * kRecord)) {
    for (int v = 0; v < kVectors; ++v) {
      vectors.push_back(std::vector<float>(static_cast<std::size_t>(r * d)));
    }
  }
  // Some rows touched before step `step`.
  void touch(std::int32_t step, Random& random) {
    for (std::int64_t r = 0; r < rows; ++r) {
      if (random.below(3) == 0) continue;
      prev_iter(r) = static_cast<std::int32_t>(random.below(step));
      for (int s = 0; s < kScalars; ++s) {
        const float x = static_cast<float>(random.below(64)) / 16.0f;
        std::memcpy(&records[static_cast<std::size_t>(r * kRecord + s)], &x, sizeof x);
      }
      for (auto& v : vectors) {
        for (std::int64_t d = 0; d < dim; ++d) {
          v[static_cast<std::size_t>(r * dim + d)] = static_cast<float>(random.below(64)) / 16.0f;
        }
      }
    }
  }
  std::int32_t& prev_iter(std::int64_t r) {
    return records[static_cast<std::size_t>(r * kRecord + kScalars)];
  }
  Table<W, Optimizer> view() {
    Table<W, Optimizer> t;
    t.weight = weight.data();
    t.rows = rows;
    t.dim = dim;
    t.prev_iter = {records.data() + kScalars, kRecord};
    for (int s = 0; s < kScalars; ++s) {
      t.scalars[s] = {reinterpret_cast<float*>(records.data()) + s, kRecord};
    }
    for (int v = 0; v < kVectors; ++v) t.vectors[v] = vectors[static_cast<std::size_t>(v)].data();
    t.origin = {0x1234u + static_cast<std::uint64_t>(dim), 1000, 3, 0};
    return t;
  }
  friend bool operator==(const TestTable& a, const TestTable& b) {
    if (!same_bits(a.weight, b.weight) || !same_bits(a.records, b.records)) return false;
    for (int v = 0; v < kVectors; ++v) {
      const auto i = static_cast<std::size_t>(v);
      if (!same_bits(a.vectors[i], b.vectors[i])) return false;
    }
    return true;
  }
};

template <class W, class Optimizer>
std::vector<TestTable<W, Optimizer>> test_tables(const BatchSpec& spec, Random& random) {
  std::vector<TestTable<W, Optimizer>> out;
  for (std::size_t t = 0; t < spec.rows.size(); ++t) {
    out.emplace_back(spec.rows[t], spec.dims[t], random);
  }
  return out;
}

// Unpooled outputs are flat on the device, feature after feature; TestBatch spreads them.
template <class Index>
std::int64_t flat_size(const TestBatch<Index>& test) {
  std::int64_t size = 0;
  for (const Feature& f : test.features) size += f.positions * f.dim;
  return size;
}
template <class Index>
void flatten_unpooled(TestBatch<Index>& test) {
  std::int64_t offset = 0;
  for (Feature& f : test.features) {
    f.out_offset = offset;
    f.out_stride = f.dim;
    offset += f.positions * f.dim;
  }
  test.out_size = offset;
}

struct StepSpec {
  std::int32_t step = 1;
  double lr = 0.02;
  std::int32_t epoch_start = 0;
  bool decay_state = false;
  OnNonfinite on_nonfinite = OnNonfinite::skip;
  int check = 0;  // device::Pass of a check pass before, if any
};

// A backward and update through the host drivers.
template <class Update, class Index, class G, class W, class Optimizer>
host::ApplyReport host_update(const TestBatch<Index>& test,
                              std::vector<TestTable<W, Optimizer>>& tables, const G* grad,
                              const Update& update) {
  using Entry = host::WideEntry;
  const std::int64_t n = test.positions();
  std::vector<Entry> entries(static_cast<std::size_t>(n)), other(entries);
  std::vector<std::uint32_t> counts(host::kCounts);
  const Entry* sorted = host::sort_lookups(test.all(test.table_base.data()), 40, 1, entries.data(),
                                           other.data(), counts.data());
  host::ApplyReport report;
  std::int64_t lo = 0;
  for (std::size_t t = 0; t < tables.size(); ++t) {
    const std::int64_t base = test.table_base[t];
    std::int64_t hi = lo;
    while (hi < n && static_cast<std::int64_t>(sorted[hi].key) < base + tables[t].rows) ++hi;
    std::vector<Feature> features;
    for (const Feature& f : test.features) {
      if (f.table == static_cast<std::int32_t>(t)) features.push_back(f);
    }
    const host::GradientRows<G> rows{grad, features.data(), static_cast<int>(features.size())};
    std::vector<float> scratch(static_cast<std::size_t>(host::scratch_floats(tables[t].dim)));
    report.merge(host::apply_runs(update, tables[t].view(), sorted, lo, hi, base,
                                  host::Pass::update, rows, scratch.data()));
    lo = hi;
  }
  return report;
}

// Gradients whose sums and squares float32 holds exactly, whatever the order.
template <Numeric G>
std::vector<G> exact_gradients(std::int64_t n, Random& random) {
  std::vector<G> out;
  for (std::int64_t i = 0; i < n; ++i) {
    out.push_back(number<G>(static_cast<double>(random.below(5) - 2) / 4.0));
  }
  return out;
}

// A forward through the host driver, into `out` as it was, and the gradient of its weights.
template <class W, class Optimizer, class Out, class Index>
void host_lookup(const TestBatch<Index>& test, std::vector<TestTable<W, Optimizer>>& tables,
                 const AnyDecay* decay, std::int64_t clock, double lr, std::int32_t epoch_start,
                 std::vector<Out>& out, const std::vector<float>* grad = nullptr,
                 std::vector<float>* weight_gradient = nullptr) {
  std::vector<float> scales(static_cast<std::size_t>(test.positions()), 1.0f);
  for (const Feature& f : test.features) {
    auto& table = tables[static_cast<std::size_t>(f.table)];
    const auto view = table.view();
    const bool by_bag = test.spec.pooled && test.spec.offsets;
    const std::int64_t first = by_bag ? f.first_bag : f.first_position;
    const std::int64_t count = by_bag ? f.bags : f.positions;
    const float* weights = test.spec.weighted ? test.weights.data() : nullptr;
    host::Bags<W, Index> bags{table.weight.data(),
                              f.dim,
                              test.indices.data(),
                              by_bag ? test.offsets.data() : nullptr,
                              first,
                              first + count,
                              f.first_position + f.positions,
                              weights,
                              test.spec.mean && test.spec.pooled};
    const auto at = [&](bool weighted) {
      if (decay == nullptr) return;
      const Strided<const std::int32_t> prev_iter{view.prev_iter.data, view.prev_iter.stride};
      host::read_scales(prepare(*decay, static_cast<std::int32_t>(clock), lr, epoch_start),
                        clock + 1, static_cast<float>(lr), prev_iter, test.indices.data(),
                        f.first_position, f.first_position + f.positions,
                        weighted ? weights : nullptr, scales.data());
      bags.scale = scales.data();
    };
    at(true);
    host::lookup_bags(bags, out.data() + f.out_offset, f.out_stride);
    if (grad != nullptr) {
      bags.scale = nullptr;
      at(false);
      host::weight_gradients(bags, grad->data() + f.out_offset, f.out_stride,
                             weight_gradient->data());
    }
  }
}

}  // namespace coldrow_test
