#include <coldrow/host/rows.hpp>

#include "../optimizers.hpp"
#include "../support.hpp"
#include "batches.hpp"

namespace coldrow_test {
namespace {

using host::ApplyReport;
using host::GradientRows;
using host::OptimizerKernels;
using host::Pass;
using host::PlainEntry;
using host::RowGradient;
using host::RowMemory;
using host::RowsKernel;
using host::RowsSpec;

// What a step is told, beside table and optimizer.
struct StepOf {
  AnyDecay decay;
  std::int32_t step = 1;
  std::int32_t epoch_start = 0;
  bool decay_state = false;
  OnNonfinite on_nonfinite = OnNonfinite::skip;
  double lr = 0.02;
  Stochastic rounding{9};
};

template <class W, class O>
RowsSpec spec_of(const Table<W, O>& table, const O& optimizer, const StepOf& s) {
  RowsSpec spec{};
  spec.weight = table.weight;
  spec.rows = table.rows;
  spec.dim = table.dim;
  spec.prev_iter = table.prev_iter;
  for (int i = 0; i < O::scalar_states; ++i) spec.scalars[i] = table.scalars[i];
  for (int i = 0; i < O::vector_states; ++i) spec.vectors[i] = table.vectors[i];
  spec.origin = table.origin;
  spec.optimizer = &optimizer;
  spec.decay = s.decay;
  spec.rounding = &s.rounding;
  spec.lr = s.lr;
  spec.step = s.step;
  spec.epoch_start = s.epoch_start;
  spec.decay_state = s.decay_state;
  spec.on_nonfinite = s.on_nonfinite;
  return spec;
}

template <class W, class O, class Rounding>
auto update_of(const O& optimizer, const StepOf& s) {
  Rounding rounding{};
  if constexpr (std::same_as<Rounding, Stochastic>) rounding = s.rounding;
  auto update = RowUpdate<W, float, O, AnyDecay, Rounding>::at(
      s.step, s.lr, optimizer, s.decay, rounding, s.decay_state, s.epoch_start);
  update.on_nonfinite = s.on_nonfinite;
  return update;
}

// A kernel made ready, as a driver keeps it.
struct Made {
  const RowsKernel& kernel;
  alignas(64) unsigned char bytes[RowsKernel::capacity];
  Made(const RowsKernel& k, const RowsSpec& spec) : kernel(k) { kernel.make(spec, bytes); }
  ApplyReport run(Pass pass, const std::vector<RowGradient>& rows) const {
    ApplyReport report;
    kernel.run(bytes, pass, rows.data(), static_cast<int>(rows.size()), report);
    return report;
  }
};

void expect_same(const ApplyReport& a, const ApplyReport& b) {
  EXPECT_EQ(a.nonfinite.count, b.nonfinite.count);
  EXPECT_EQ(a.nonfinite.row, b.nonfinite.row);
  EXPECT_EQ(a.stale.count, b.stale.count);
  EXPECT_EQ(a.stale.row, b.stale.row);
}

template <class O>
class RowsKernelOf : public ::testing::Test {};
TYPED_TEST_SUITE(RowsKernelOf, Optimizers, OptimizerName);

// Rows 5, 0 and 3 of 7, the gradient of row 3 not finite.
template <class W, class Rounding, class O>
void expect_equal_bits(const RowsKernel& kernel) {
  Random random(1);
  const O optimizer = optimizer_of<O>();
  for (const int dim : {1, 16, 21}) {
    OptimizedTable<W, O> direct(7, dim, random), through = direct;
    StepOf s;
    for (const std::int32_t step : {1, 2, 9, 30}) {
      s.step = step;
      s.decay = decay_cases()[static_cast<std::size_t>(step) % 3 + 1].policy;
      s.decay.epoch_gated = step == 30;
      s.epoch_start = step == 30 ? 20 : 0;
      s.decay_state = step % 2 == 0;
      s.on_nonfinite = step == 30 ? OnNonfinite::propagate : OnNonfinite::skip;
      auto grad = random.numbers<float>(3 * dim);
      grad.back() = step == 1 ? 1.0f : kNanf;
      const std::vector<RowGradient> rows = {
          {5, grad.data()}, {0, grad.data() + dim}, {3, grad.data() + 2 * dim}};

      Table<W, O> view = direct.view(), other = through.view();
      view.origin = other.origin = {77, std::int64_t{1} << 33, 5, 0};
      const auto update = update_of<W, O, Rounding>(optimizer, s);
      const Made made(kernel, spec_of(other, optimizer, s));
      const OptimizedTable<W, O> before = through;
      for (const Pass pass : {Pass::check, Pass::update}) {
        ApplyReport report;
        host::update_rows(update, view, pass, rows.data(), 3, report);
        expect_same(made.run(pass, rows), report);
        EXPECT_EQ(report.nonfinite.count, step != 1 && (pass == Pass::check || step != 30));
        EXPECT_TRUE(pass == Pass::update || through == before) << "a check wrote";
        ASSERT_TRUE(through == direct) << "dim " << dim << ", step " << step;
      }
      EXPECT_FALSE(through == before);
      EXPECT_EQ(made.run(Pass::check, rows).stale.count, step != 1 && step != 30 ? 2 : 3);
    }
  }
}

TYPED_TEST(RowsKernelOf, GivesTheBitsOfTheUpdateItself) {
  constexpr OptimizerKernels k = OptimizerKernels::of<TypeParam>();
  expect_equal_bits<float, Nearest, TypeParam>(k.of_pair<float, Nearest>());
  expect_equal_bits<half, Nearest, TypeParam>(k.of_pair<half, Nearest>());
  expect_equal_bits<half, Stochastic, TypeParam>(k.of_pair<half, Stochastic>());
  expect_equal_bits<bfloat16, Nearest, TypeParam>(k.of_pair<bfloat16, Nearest>());
  expect_equal_bits<bfloat16, Stochastic, TypeParam>(k.of_pair<bfloat16, Stochastic>());
}

// Float32 is stored unrounded: one kernel serves both roundings.
TYPED_TEST(RowsKernelOf, StochasticFloat32IsNearest) {
  constexpr OptimizerKernels k = OptimizerKernels::of<TypeParam>();
  EXPECT_EQ((k.of_pair<float, Stochastic>().run), (k.of_pair<float, Nearest>().run));
  expect_equal_bits<float, Nearest, TypeParam>(k.of_pair<float, Stochastic>());
}

TYPED_TEST(RowsKernelOf, DeclaresTheStateOfTheOptimizer) {
  constexpr OptimizerKernels k = OptimizerKernels::of<TypeParam>();
  ASSERT_EQ(k.scalar_states, TypeParam::scalar_states);
  ASSERT_EQ(k.vector_states, TypeParam::vector_states);
  for (int i = 0; i < k.scalar_states + k.vector_states; ++i) {
    EXPECT_STREQ(k.state_names[i], state_name<TypeParam>(i));
  }
  for (int i = k.scalar_states + k.vector_states; i < host::kMaxScalars + host::kMaxVectors; ++i) {
    EXPECT_EQ(k.state_names[i], nullptr);
  }
}

// A batch with duplicates: the driver that knows the update against the one that knows the kernel.
template <class O>
void expect_equal_batches() {
  Random random(2);
  BatchSpec spec;
  spec.rows = {60};
  spec.dims = {21};
  spec.feature_tables = {0, 0};
  spec.bags = {50, 30};
  const O optimizer = optimizer_of<O>();
  OptimizedTable<float, O> direct(60, 21, random), through = direct;
  for (const std::int32_t step : {1, 2, 5}) {
    const TestBatch<std::int32_t> batch(spec, random);
    const auto grad = random.numbers<half>(batch.out_size);
    const std::int64_t n = batch.positions();
    std::vector<PlainEntry> entries(static_cast<std::size_t>(n)), other(entries);
    std::vector<std::uint32_t> counts(host::kCounts);
    const PlainEntry* sorted = host::sort_lookups(batch.all(batch.table_base.data()), 6, 1,
                                                  entries.data(), other.data(), counts.data());
    const GradientRows<half> grads{grad.data(), batch.features.data(), 2};
    std::vector<float> scratch(static_cast<std::size_t>(host::scratch_floats(21)));
    StepOf s;
    s.step = step;
    s.decay = decay_cases()[1].policy;

    host::apply_runs(update_of<float, O, Nearest>(optimizer, s), direct.view(), sorted, 0, n, 0,
                     Pass::update, grads, scratch.data());
    constexpr RowsKernel kernel = RowsKernel::of<float, O, Nearest>();
    const Made made(kernel, spec_of(through.view(), optimizer, s));
    ApplyReport report;
    int most = 0;
    host::apply_runs(sorted, 0, n, 0, 21, grads, kernel.memory(made.bytes), scratch.data(),
                     [&](const RowGradient* rows, int count) {
                       most = std::max(most, count);
                       kernel.run(made.bytes, Pass::update, rows, count, report);
                     });
    EXPECT_EQ(most, host::kChunkRows);  // some chunks are full, the last one is not
    ASSERT_TRUE(direct == through) << "step " << step;
  }
}

TYPED_TEST(RowsKernelOf, GivesTheBitsOfTheUpdateItselfForABatch) {
  expect_equal_batches<TypeParam>();
}

// Rows wait for each other in scratch memory: as many as fit, one at least.
TEST(Rows, ScratchHoldsWhatWaits) {
  for (int dim = 1; dim <= 10000; dim += dim < 600 ? 1 : 97) {
    const int rows = host::chunk_rows(dim);
    EXPECT_GE(rows, 1);
    EXPECT_LE(rows, host::kChunkRows);
    EXPECT_GE(host::scratch_floats(dim), static_cast<std::int64_t>(rows) * dim);
    EXPECT_TRUE(rows == 1 || host::scratch_floats(dim) <= host::kChunkFloats) << dim;
  }
}

// ------------------------------------------------------------------------------- own optimizers

// As much state as there may be, every array told from the others.
struct Hoarder {
  static constexpr int scalar_states = host::kMaxScalars;
  static constexpr int vector_states = host::kMaxVectors;
  static constexpr bool elements_finite = true;
  static constexpr const char* state_name(int i) {
    constexpr const char* names[] = {"a", "b", "c", "d", "e", "f", "g", "h"};
    return names[i];
  }
  RowMultiplier row(float* scalars, float, float lr, std::int32_t) const {
    for (int i = 0; i < scalar_states; ++i) scalars[i] += static_cast<float>(1 + i);
    return {lr};
  }
  float element(const RowMultiplier& row, float g, float* vectors) const {
    for (int i = 0; i < vector_states; ++i) vectors[i] += static_cast<float>(10 + i);
    return row.multiplier * g;
  }
};

TEST(Rows, EightStatesKeepTheirPlaces) {
  Random random(3);
  OptimizedTable<half, Hoarder> table(3, 19, random);
  const Hoarder optimizer;
  constexpr OptimizerKernels k = OptimizerKernels::of<Hoarder>();
  EXPECT_STREQ(k.state_names[0], "a");
  EXPECT_STREQ(k.state_names[7], "h");
  const std::vector<float> grad(19, 1.0f);
  StepOf s;
  for (s.step = 1; s.step <= 2; ++s.step) {
    const Made made(k.of_pair<half, Nearest>(), spec_of(table.view(), optimizer, s));
    made.run(Pass::update, {{1, grad.data()}});
  }
  const auto row = table.row(1);
  EXPECT_EQ(*row.prev_iter, 2);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(*row.scalars[i], static_cast<float>(2 * (1 + i)));
    for (int d = 0; d < 19; ++d) EXPECT_EQ(row.vectors[i][d], static_cast<float>(2 * (10 + i)));
  }
  EXPECT_EQ(*table.row(0).scalars[3], 0.0f);
  EXPECT_EQ(table.row(2).vectors[0][0], 0.0f);
}

// --------------------------------------------------------------------------------- what is fetched

// How many places of a row are prefetched. (Nothing else could be seen of it; an explicit
// instantiation may name a private member.)
int parts_of(const RowMemory& memory);
template <int RowMemory::* Count>
struct Reveal {
  friend int parts_of(const RowMemory& memory) { return memory.*Count; }
};
template struct Reveal<&RowMemory::count_>;

// Scalar states beside prev_iter in records, or each in an array of its own.
template <class O>
std::pair<int, int> parts_in_records_and_apart() {
  Random random(4);
  OptimizedTable<float, O> table(200, 64, random);
  Table<float, O> view = table.view();
  const int records = parts_of(RowMemory::of(view));
  std::vector<std::int32_t> prev_iter(200);
  std::vector<std::vector<float>> scalars(static_cast<std::size_t>(O::scalar_states),
                                          std::vector<float>(200));
  view.prev_iter = {prev_iter.data(), 1};
  for (int s = 0; s < O::scalar_states; ++s) {
    view.scalars[s] = {scalars[static_cast<std::size_t>(s)].data(), 1};
  }
  const RowMemory apart = RowMemory::of(view);
  for (const std::int64_t row : {0, 7, 199}) apart.fetch(row);  // changes nothing
  return {records, parts_of(apart)};
}

TEST(RowMemory, ARecordIsFetchedOnce) {
  EXPECT_EQ(parts_in_records_and_apart<SGD>(), (std::pair{2, 2}));
  EXPECT_EQ(parts_in_records_and_apart<RowwiseRMSprop>(), (std::pair{2, 3}));
  EXPECT_EQ(parts_in_records_and_apart<Adagrad>(), (std::pair{3, 3}));
  EXPECT_EQ(parts_in_records_and_apart<AdamByClock>(), (std::pair{4, 4}));
  EXPECT_EQ(parts_in_records_and_apart<AdamByTouches>(), (std::pair{4, 5}));
  EXPECT_EQ(parts_in_records_and_apart<PartialAdamByTouches>(), (std::pair{3, 5}));
  EXPECT_EQ(parts_in_records_and_apart<Hoarder>(), (std::pair{6, 8}));  // of ten; eight at most
}

TEST(RowMemory, OfOneRecordAreThoseOfOneStrideWithinACacheLine) {
  std::vector<char> memory(4096);
  char* const at = memory.data() + 1024;
  const auto parts = [&](const char* other, std::int64_t stride) {
    RowMemory m;
    m.add(at, 16, 4);
    m.add(other, stride, 4);
    return parts_of(m);
  };
  EXPECT_EQ(parts(at, 16), 1);
  EXPECT_EQ(parts(at + 4, 16), 1);
  EXPECT_EQ(parts(at - 12, 16), 1);
  EXPECT_EQ(parts(at + 63, 16), 1);
  EXPECT_EQ(parts(at + 64, 16), 2);
  EXPECT_EQ(parts(at - 64, 16), 2);
  EXPECT_EQ(parts(at + 4, 8), 2);  // moves away from the first
}

}  // namespace
}  // namespace coldrow_test
