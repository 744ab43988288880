// The driver of several tables against the row update and plain loops, bit for bit: gradients are small
// multiples of 1/8, so that sums of any order are exact.
#include <coldrow/host/table_batch.hpp>
#include <map>

#include "../optimizers.hpp"
#include "../support.hpp"

namespace coldrow_test {
namespace {

// A decay that AnyDecay does not know.
struct Halving {
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    return static_cast<float>(exp2_fixed(-static_cast<double>(gap)));
  }
};

// A batch over two tables, the first of which has two features.
struct Problem {
  static constexpr std::int32_t kFeatures = 3, kFeatureTables[kFeatures] = {0, 1, 0};
  std::int64_t samples;
  std::vector<std::int64_t> indices, offsets = {0};
  std::vector<float> weights;
  std::vector<Feature> features = std::vector<Feature>(kFeatures);

  // hot: half of all indices are row 1 of their table.
  Problem(std::int64_t n, bool hot, Random& random, const std::int64_t (&rows)[2]) : samples(n) {
    for (const std::int32_t table : kFeatureTables) {
      for (std::int64_t s = 0; s < n; ++s) {
        for (std::int64_t i = random.below(5); i > 0; --i) {
          indices.push_back(hot && random.below(2) == 0 ? 1 : random.below(rows[table]));
          weights.push_back(static_cast<float>(random.below(9) - 4) / 4.0f);
        }
        offsets.push_back(static_cast<std::int64_t>(indices.size()));
      }
    }
  }
  AnyBatch batch(const AnyTable (&tables)[2], bool weighted, int threads) {
    host::side_by_side(tables, kFeatureTables, kFeatures, samples, features.data());
    AnyBatch b;
    b.tables = tables;
    b.num_tables = 2;
    b.features = features.data();
    b.num_features = kFeatures;
    b.indices = indices.data();
    b.offsets = offsets.data();
    b.bags = kFeatures * samples;
    b.positions = static_cast<std::int64_t>(indices.size());
    b.per_sample_weights = weighted ? weights.data() : nullptr;
    b.threads = threads;
    return b;
  }
  // Calls f(feature, bag, position) for the lookups into a table.
  template <class F>
  void for_lookups(int table, const F& f) const {
    for (const Feature& feature : features) {
      if (feature.table != table) continue;
      for (std::int64_t b = feature.first_bag; b < feature.first_bag + feature.bags; ++b) {
        for (auto p = offsets[static_cast<std::size_t>(b)];
             p < offsets[static_cast<std::size_t>(b) + 1]; ++p) {
          f(feature, b, static_cast<std::size_t>(p));
        }
      }
    }
  }
};

template <class W, class O, class D, class R>
void update_by_rows(OptimizedTable<W, O>& table, const Problem& problem, int number, bool weighted,
                    const std::vector<float>& grad, std::int32_t step, const O& optimizer,
                    const D& decay, const R& rounding, bool decay_state) {
  std::map<std::int64_t, std::vector<float>> sums;
  const auto dim = static_cast<std::size_t>(table.dim);
  problem.for_lookups(number, [&](const Feature& f, std::int64_t bag, std::size_t p) {
    std::vector<float>& sum = sums[problem.indices[p]];
    sum.resize(dim);
    const auto from = static_cast<std::size_t>(f.out_offset + (bag - f.first_row) * f.out_stride);
    for (std::size_t d = 0; d < dim; ++d) {
      sum[d] += (weighted ? problem.weights[p] : 1.0f) * grad[from + d];
    }
  });
  const auto update = RowUpdate<W, float, O, D, R>::at(step, 0.125, optimizer, decay, rounding,
                                                       decay_state, /*epoch_start=*/0);
  Table<W, O> view = table.view();
  for (const auto& [row, sum] : sums) {
    update(Serial{}, view.row(row), sum.data(), table.dim, view.key(row));
  }
}

void expect_bits_of_rows(std::int64_t samples, bool hot, bool weighted) {
  Random random(static_cast<std::uint32_t>(samples) + (hot ? 1 : 0));
  const std::int64_t rows[2] = {300, 70};
  OptimizedTable<bfloat16, RowwiseRMSprop> first(rows[0], 21, random);
  OptimizedTable<float, AdamByTouches> second(rows[1], 32, random);
  const RowwiseRMSprop rmsprop{1e-6f, 0.9f};
  const AdamByTouches adam{1e-6, 0.5, 0.75};
  const LinearClipped linear{0.25f, 0.1f};
  const Stochastic stochastic{9};
  const host::UpdateOf of_first(rmsprop, linear, stochastic, true);
  const host::UpdateOf of_second(adam, Halving{});
  Problem problem(samples, hot, random, rows);

  for (const int threads : {1, 2, 5}) {
    OptimizedTable<bfloat16, RowwiseRMSprop> a = first, want_a = first;
    OptimizedTable<float, AdamByTouches> b = second, want_b = second;
    const AnyTable tables[2] = {of_first.table(a.view(), 0.125), of_second.table(b.view(), 0.125)};
    AnyBatch batch = problem.batch(tables, weighted, threads);
    ASSERT_EQ(host::check_batch(batch).kind, BatchProblem::none);
    host::Memory memory;
    for (const std::int32_t step : {1, 2, 6}) {
      batch.step = step;
      std::vector<float> grad(static_cast<std::size_t>(samples * (21 + 32 + 21)));
      for (float& g : grad) g = static_cast<float>(random.below(17) - 8) / 8.0f;
      host::UpdateOptions options;
      options.refuse_stale = true;
      const UpdateReport report = host::update(batch, grad.data(), NumericType::float32, options,
                                               memory.reserve(host::update_bytes(batch)));
      ASSERT_FALSE(report.refused);
      ASSERT_EQ(report.nonfinite.count, 0);
      update_by_rows(want_a, problem, 0, weighted, grad, step, rmsprop, linear, stochastic, true);
      update_by_rows(want_b, problem, 1, weighted, grad, step, adam, Halving{}, Nearest{}, false);
      ASSERT_TRUE(a == want_a) << threads << " threads, step " << step;
      ASSERT_TRUE(b == want_b) << threads << " threads, step " << step;

      // The next step's lookup, charged where it reads; and the same step again, which is refused.
      batch.step = step + 3;
      std::vector<float> out(grad.size());
      host::lookup(batch, true, out.data(), NumericType::float32,
                   memory.reserve(host::lookup_bytes(batch, true)));
      std::vector<float> want(out.size());
      const auto view = b.view();
      problem.for_lookups(1, [&](const Feature& f, std::int64_t bag, std::size_t p) {
        const std::int64_t row = problem.indices[p];
        const float scale = read_factor(Halving{}, batch.step, view.prev_iter[row], 0.125f) *
                            (weighted ? problem.weights[p] : 1.0f);
        for (int d = 0; d < 32; ++d) {
          float& to =
              want[static_cast<std::size_t>(f.out_offset + (bag - f.first_row) * f.out_stride + d)];
          to = math::fma(scale, view.row(row).weight[d], to);
        }
      });
      for (std::int64_t s = 0; s < samples; ++s) {
        for (int d = 21; d < 21 + 32; ++d) {
          const auto i = static_cast<std::size_t>(s * (21 + 32 + 21) + d);
          ASSERT_EQ(bits_of(out[i]), bits_of(want[i])) << threads << " threads, sample " << s;
        }
      }
      batch.step = step;
      const UpdateReport again = host::update(batch, grad.data(), NumericType::float32, options,
                                              memory.reserve(host::update_bytes(batch)));
      EXPECT_EQ(again.refused, !problem.indices.empty());
      ASSERT_TRUE(a == want_a) << "a refused call wrote";
    }
  }
}

TEST(TableBatch, GivesTheBitsOfTheRowUpdate) {
  expect_bits_of_rows(1, false, false);
  expect_bits_of_rows(50, false, true);
  expect_bits_of_rows(700, false, false);
}

// Runs so long that all threads sum them together.
TEST(TableBatch, GivesTheBitsOfTheRowUpdateForHotRows) { expect_bits_of_rows(9000, true, true); }

TEST(TableBatch, SaysWhatIsWrongWithABatch) {
  Random random(1);
  const std::int64_t rows[2] = {10, 10};
  OptimizedTable<float, SGD> table(10, 4, random);
  const host::UpdateOf<SGD> update;
  const AnyTable tables[2] = {update.table(table.view(), 0.1), update.table(table.view(), 0.1)};
  Problem problem(20, false, random, rows);
  AnyBatch batch = problem.batch(tables, false, 1);
  ASSERT_EQ(host::check_batch(batch).kind, BatchProblem::none);
  const auto at = static_cast<std::size_t>(problem.offsets[45]);  // of the third feature
  problem.indices[at] = 10;
  const BatchProblem found = host::check_batch(batch);
  EXPECT_EQ(found.kind, BatchProblem::index_range);
  EXPECT_EQ(found.position, static_cast<std::int64_t>(at));
  EXPECT_EQ(found.value, 10);
  EXPECT_EQ(found.feature, 2);
  problem.offsets[0] = 1;
  EXPECT_EQ(host::check_batch(batch).kind, BatchProblem::offsets_start);
}

}  // namespace
}  // namespace coldrow_test
