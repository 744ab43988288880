#include <coldrow/host/apply.hpp>

#include "../support.hpp"
#include "batches.hpp"

namespace coldrow_test {
namespace {

using host::ApplyReport;
using host::GradientRows;
using host::Pass;
using host::PlainEntry;
using host::ScaledEntry;
using host::WideEntry;

// A table in memory, its state in 8-byte records.
template <class W>
struct OwnedTable {
  struct Record {
    float momentum1;
    std::int32_t prev_iter;
  };
  int dim;
  std::vector<W> weight;
  std::vector<Record> records;

  OwnedTable(std::int64_t rows, int d, Random& random)
      : dim(d), weight(random.numbers<W>(rows * d)), records(static_cast<std::size_t>(rows)) {}
  Table<W, RowwiseRMSprop> view() {
    Table<W, RowwiseRMSprop> t;
    t.weight = weight.data();
    t.rows = static_cast<std::int64_t>(records.size());
    t.dim = dim;
    t.prev_iter = {&records[0].prev_iter, 2};
    t.scalars[0] = {&records[0].momentum1, 2};
    return t;
  }
  bool operator==(const OwnedTable& other) const {
    return same_bits(weight, other.weight) && same_bits(records, other.records);
  }
};

template <class W>
std::vector<OwnedTable<W>> tables_of(const BatchSpec& spec, Random& random) {
  std::vector<OwnedTable<W>> out;
  for (std::size_t t = 0; t < spec.rows.size(); ++t) {
    out.emplace_back(spec.rows[t], spec.dims[t], random);
  }
  return out;
}

// What a driver does with a batch: one sort, then each thread its runs of each table.
template <class Entry, class Update, class W, class Index, class G>
std::vector<ApplyReport> apply_batch(const Update& update, std::vector<OwnedTable<W>>& tables,
                                     const TestBatch<Index>& batch, const std::vector<G>& grad,
                                     int threads, Pass pass) {
  const std::int64_t n = batch.positions();
  std::vector<Entry> entries(static_cast<std::size_t>(n)), other(entries);
  std::vector<std::uint32_t> counts(static_cast<std::size_t>(threads * host::kCounts));
  const Entry* sorted = host::sort_lookups(batch.all(batch.table_base.data()), 32, threads,
                                           entries.data(), other.data(), counts.data());

  std::vector<ApplyReport> reports(tables.size());
  std::vector<std::vector<ApplyReport>> by_part(static_cast<std::size_t>(threads), reports);
  host::parallel(threads, [&](int part) {
    for (std::size_t t = 0; t < tables.size(); ++t) {
      std::vector<Feature> features;
      for (const Feature& f : batch.features) {
        if (f.table == static_cast<std::int32_t>(t)) features.push_back(f);
      }
      const std::int64_t base = batch.table_base[t];
      const auto key_below = [&](std::int64_t limit) {
        std::int64_t i = 0;
        while (i < n && static_cast<std::int64_t>(sorted[i].key) < limit) ++i;
        return i;
      };
      const std::int64_t lo = std::max(host::run_begin(sorted, n, part, threads), key_below(base));
      const std::int64_t hi = std::min(host::run_begin(sorted, n, part + 1, threads),
                                       key_below(base + batch.spec.rows[t]));
      if (lo >= hi) continue;
      const GradientRows<G> rows{grad.data(), features.data(), static_cast<int>(features.size())};
      std::vector<float> scratch(static_cast<std::size_t>(host::scratch_floats(tables[t].dim)));
      by_part[static_cast<std::size_t>(part)][t] = host::apply_runs(
          update, tables[t].view(), sorted, lo, hi, base, pass, rows, scratch.data());
    }
  });
  for (const auto& part : by_part) {
    for (std::size_t t = 0; t < tables.size(); ++t) reports[t].merge(part[t]);
  }
  return reports;
}

constexpr double kLr = 0.02;

template <class Entry, class W, class G>
void follow_reference(const BatchSpec& spec, const DecayCase& decay, bool decay_state) {
  using Update = RowUpdate<W, float, RowwiseRMSprop, AnyDecay, Nearest>;
  Random random(1);
  std::vector<OwnedTable<W>> tables = tables_of<W>(spec, random);
  const RowwiseRMSprop optimizer{1e-6f, 0.75f};
  const reference::Update expected{optimizer, decay.expected, decay_state};

  for (const std::int32_t step : {1, 2, 40, 1000}) {
    const std::int32_t epoch_start = step >= 40 ? 40 : 0;
    const TestBatch<std::int32_t> batch(spec, random);
    const auto grad = random.numbers<G>(batch.out_size);
    const auto update =
        Update::at(step, kLr, optimizer, decay.policy, {}, decay_state, epoch_start);

    const std::vector<OwnedTable<W>> before = tables;
    apply_batch<Entry>(update, tables, batch, grad, 1, Pass::update);
    for (const int threads : {2, 3}) {
      std::vector<OwnedTable<W>> again = before;
      apply_batch<Entry>(update, again, batch, grad, threads, Pass::update);
      ASSERT_TRUE(again == tables) << threads << " threads give other bits";
    }

    for (std::size_t t = 0; t < tables.size(); ++t) {
      const std::int64_t dim = spec.dims[t];
      std::vector<std::int64_t> indices;
      std::vector<double> grads;
      for (const Lookup& l : batch.lookups) {
        if (l.table != static_cast<std::int64_t>(t)) continue;
        indices.push_back(l.row);
        for (std::int64_t d = 0; d < dim; ++d) {
          grads.push_back(l.scale *
                          value_of(grad[static_cast<std::size_t>(batch.out_element(l, d))]));
        }
      }
      std::vector<double> w = values_of(before[t].weight), v;
      std::vector<std::int64_t> prev;
      for (const auto& record : before[t].records) {
        v.push_back(value_of(record.momentum1));
        prev.push_back(record.prev_iter);
      }
      reference::apply(expected, w.data(), dim, {prev.data(), v.data()}, grads.data(),
                       indices.data(), static_cast<std::int64_t>(indices.size()), step, kLr,
                       epoch_start);
      for (std::size_t r = 0; r < prev.size(); ++r) {
        const auto& record = tables[t].records[r];
        ASSERT_EQ(record.prev_iter, prev[r]) << "table " << t << ", row " << r;
        ASSERT_NEAR(value_of(record.momentum1), v[r], 2e-6 * v[r])
            << "table " << t << ", row " << r;
        for (std::size_t i = r * static_cast<std::size_t>(dim);
             i < (r + 1) * static_cast<std::size_t>(dim); ++i) {
          double tolerance = 4e-6 * std::max(1.0, std::fabs(w[i]));
          if (!std::same_as<W, float>) tolerance += spacing<W>(w[i]) / 2.0;
          ASSERT_NEAR(value_of(tables[t].weight[i]), w[i], tolerance)
              << decay.name << ", table " << t << ", row " << r << ", step " << step;
        }
      }
    }
  }
}

DecayCase linear_clipped() { return decay_cases()[1]; }

TEST(Apply, EveryDecayFollowsTheReference) {
  for (const DecayCase& decay : decay_cases()) {
    follow_reference<PlainEntry, float, float>(shared_tables(), decay, false);
    follow_reference<PlainEntry, float, float>(shared_tables(), decay, true);
  }
}

TEST(Apply, WeightTypes) {
  follow_reference<PlainEntry, half, float>(shared_tables(), linear_clipped(), false);
  follow_reference<PlainEntry, bfloat16, float>(shared_tables(), linear_clipped(), false);
}

TEST(Apply, GradientTypes) {
  follow_reference<PlainEntry, float, half>(shared_tables(), linear_clipped(), false);
  follow_reference<PlainEntry, float, bfloat16>(shared_tables(), linear_clipped(), false);
  follow_reference<PlainEntry, half, half>(shared_tables(), linear_clipped(), false);
}

TEST(Apply, Mean) {
  BatchSpec spec = shared_tables();
  spec.mean = true;
  follow_reference<ScaledEntry, float, float>(spec, linear_clipped(), false);
}

TEST(Apply, Weighted) {
  BatchSpec spec = shared_tables();
  spec.weighted = true;
  follow_reference<ScaledEntry, float, float>(spec, linear_clipped(), false);
  follow_reference<WideEntry, float, half>(spec, linear_clipped(), false);
}

TEST(Apply, Unpooled) {
  BatchSpec spec = shared_tables();
  spec.pooled = false;
  follow_reference<PlainEntry, float, float>(spec, linear_clipped(), false);
  follow_reference<PlainEntry, bfloat16, bfloat16>(spec, linear_clipped(), false);
}

TEST(Apply, OneRowTakesTheWholeBatch) {
  BatchSpec spec;
  spec.rows = {1};
  spec.dims = {33};
  spec.feature_tables = {0};
  spec.bags = {500};
  follow_reference<PlainEntry, float, float>(spec, linear_clipped(), false);
}

TEST(Apply, OddDims) {
  for (const int dim : {1, 2, 15, 17, 63, 64, 65, 128, 129}) {
    BatchSpec spec;
    spec.rows = {20};
    spec.dims = {dim};
    spec.feature_tables = {0, 0};
    spec.bags = {15, 10};
    follow_reference<PlainEntry, float, float>(spec, linear_clipped(), false);
  }
}

// Stochastic rounding repeats whatever the threads.
TEST(Apply, StochasticDoesNotDependOnThreads) {
  Random random(2);
  const BatchSpec spec = shared_tables();
  const TestBatch<std::int64_t> batch(spec, random);
  const auto grad = random.numbers<float>(batch.out_size);
  const std::vector<OwnedTable<bfloat16>> start = tables_of<bfloat16>(spec, random);
  const auto after = [&](int threads, std::uint64_t seed) {
    std::vector<OwnedTable<bfloat16>> tables = start;
    const auto update = RowUpdate<bfloat16, float, RowwiseRMSprop, NoDecay, Stochastic>::at(
        1, kLr, {}, {}, Stochastic{seed});
    apply_batch<PlainEntry>(update, tables, batch, grad, threads, Pass::update);
    return tables;
  };
  EXPECT_TRUE(after(1, 7) == after(2, 7));
  EXPECT_TRUE(after(1, 7) == after(3, 7));
  EXPECT_FALSE(after(1, 7) == after(1, 8));
}

// ---------------------------------------------------------------------------------- Pass::check

struct CheckCase {
  std::vector<OwnedTable<float>> tables;
  TestBatch<std::int64_t> batch;
  std::vector<float> grad;

  // Tables of 40, 7, 1000 and 3 rows; every bag one index.
  static BatchSpec one_index_per_bag() {
    BatchSpec spec = shared_tables();
    spec.offsets = false;
    return spec;
  }
  explicit CheckCase(Random& random)
      : tables(tables_of<float>(one_index_per_bag(), random)),
        batch(one_index_per_bag(), random),
        grad(random.numbers<float>(batch.out_size)) {}

  // Makes the gradient of one lookup of `row` of `table` infinite.
  void poison(std::int64_t table, std::int64_t row) {
    for (const Lookup& l : batch.lookups) {
      if (l.table != table || l.row != row) continue;
      grad[static_cast<std::size_t>(batch.out_element(l, 1))] = kInff;
      return;
    }
    FAIL() << "row " << row << " is not in the batch";
  }
};

TEST(Apply, CheckFindsTheFirstBadRowsAndWritesNothing) {
  Random random(3);
  CheckCase c(random);
  for (const std::int64_t row : {4, 1, 2}) c.poison(0, row);
  c.poison(1, 3);
  c.tables[0].records[3].prev_iter = 10;  // the step itself
  c.tables[0].records[2].prev_iter = 11;  // after it
  c.tables[0].records[1].prev_iter = 9;   // fine
  c.tables[3].records[0].prev_iter = INT32_MAX;
  const auto update = RowUpdate<float, float, RowwiseRMSprop, NoDecay, Nearest>::at(10, kLr);
  for (const int threads : {1, 2, 3}) {
    std::vector<OwnedTable<float>> tables = c.tables;
    const auto reports =
        apply_batch<PlainEntry>(update, tables, c.batch, c.grad, threads, Pass::check);
    EXPECT_TRUE(tables == c.tables) << "written with " << threads << " threads";
    EXPECT_EQ(reports[0].nonfinite.count, 3);
    EXPECT_EQ(reports[0].nonfinite.row, 1);
    EXPECT_EQ(reports[0].stale.count, 2);
    EXPECT_EQ(reports[0].stale.row, 2);
    EXPECT_EQ(reports[1].nonfinite.count, 1);
    EXPECT_EQ(reports[1].nonfinite.row, 3);
    EXPECT_EQ(reports[1].stale.count, 0);
    EXPECT_EQ(reports[2].nonfinite.count, 0);
    EXPECT_EQ(reports[2].nonfinite.row, -1);
    EXPECT_EQ(reports[3].stale.count, 1);
    EXPECT_EQ(reports[3].stale.row, 0);
  }
}

TEST(Apply, UpdateSkipsBadRowsAndWritesTheOthers) {
  Random random(4);
  CheckCase c(random);
  c.poison(0, 2);
  std::vector<OwnedTable<float>> tables = c.tables;
  const auto update = RowUpdate<float, float, RowwiseRMSprop, NoDecay, Nearest>::at(10, kLr);
  const auto reports = apply_batch<PlainEntry>(update, tables, c.batch, c.grad, 2, Pass::update);
  EXPECT_EQ(reports[0].nonfinite.count, 1);
  EXPECT_EQ(reports[0].nonfinite.row, 2);
  EXPECT_EQ(tables[0].records[2].prev_iter, 0);
  EXPECT_EQ(tables[0].records[1].prev_iter, 10);
  for (std::size_t i = 2 * 16; i < 3 * 16; ++i) {
    EXPECT_EQ(tables[0].weight[i], c.tables[0].weight[i]);
  }
}

TEST(Apply, ReportsMergeToTheFirstAndAllOfThem) {
  ApplyReport total, none, a, b;
  a.nonfinite.add(5);
  a.nonfinite.add(6);
  b.nonfinite.add(9);
  b.stale.add(8);
  for (const ApplyReport& r : {none, a, none, b}) total.merge(r);
  EXPECT_EQ(total.nonfinite.count, 3);
  EXPECT_EQ(total.nonfinite.row, 5);
  EXPECT_EQ(total.stale.count, 1);
  EXPECT_EQ(total.stale.row, 8);
}

// However many rows are handed over at a time, each is updated as if alone.
TEST(Apply, RowsInAnyNumber) {
  using Update = RowUpdate<float, float, RowwiseRMSprop, LinearClipped, Nearest>;
  for (const int dim : {1, 16, 33, 64}) {
    for (const int count : {0, 1, 15, 16, 17, 50}) {
      Random random(static_cast<std::uint64_t>(dim + count));
      OwnedTable<float> together(60, dim, random);
      for (auto& record : together.records) {
        record = {static_cast<float>(random.below(9)), static_cast<std::int32_t>(random.below(5))};
      }
      const auto grads = random.numbers<float>(count * dim);
      OwnedTable<float> apart = together;
      const auto update = Update::at(7, 0.1, {1e-6f, 0.75f}, {0.125f, 0.25f});
      std::vector<host::RowGradient> rows;
      for (int i = 0; i < count; ++i) rows.push_back({59 - i, grads.data() + i * dim});
      ApplyReport report;
      host::update_rows(update, together.view(), Pass::update, rows.data(), count, report);
      for (const host::RowGradient& r : rows) {
        const auto table = apart.view();
        ASSERT_TRUE(update(Serial{}, table.row(r.row), r.grad, dim, table.key(r.row)));
      }
      ASSERT_TRUE(together == apart) << count << " rows of " << dim;
      ASSERT_EQ(report.nonfinite.count, 0);
    }
  }
}

}  // namespace
}  // namespace coldrow_test
