// What is shared between std::threads: a RowUpdate, the policies of a table batch, a table whose rows are
// divided among them. Compiled with ThreadSanitizer too (make sanitize-threads).
#include <coldrow/coldrow.hpp>
#include <thread>

#include "../optimizers.hpp"
#include "../support.hpp"

namespace coldrow_test {
namespace {

constexpr std::int64_t kRows = 97;
constexpr int kDim = 37;

template <class F>
void in_threads(int count, const F& f) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([&f, i] { f(i); });
  for (std::thread& thread : threads) thread.join();
}

std::vector<float> gradient(std::int64_t row, std::int32_t step) {
  std::vector<float> g;
  for (int d = 0; d < kDim; ++d) g.push_back(static_cast<float>((row + d * step) % 9 - 4) / 8.0f);
  return g;
}

// One RowUpdate for all threads, neighbouring rows in different ones.
template <class W, class O>
void expect_shared_update(const AnyDecay& decay) {
  Random random(1);
  OptimizedTable<W, O> serial(kRows, kDim, random), shared = serial;
  const O optimizer = optimizer_of<O>();
  for (std::int32_t step = 1; step <= 4; ++step) {
    const auto update = RowUpdate<W, float, O, AnyDecay, Stochastic>::at(
        step, 0.02, optimizer, decay, Stochastic{5}, true, step > 2 ? 3 : 0);
    const auto train = [&](OptimizedTable<W, O>& table, int mine, int threads) {
      const Table<W, O> view = table.view();
      for (std::int64_t r = mine; r < kRows; r += threads) {
        if ((r + step) % 3 != 0) {
          update(Serial{}, view.row(r), gradient(r, step).data(), kDim, view.key(r));
        }
      }
    };
    train(serial, 0, 1);
    in_threads(4, [&](int mine) { train(shared, mine, 4); });
    ASSERT_TRUE(serial == shared) << "step " << step;
  }
}

TEST(Threads, ShareARowUpdate) {
  for (const DecayCase& c : decay_cases()) {
    SCOPED_TRACE(c.name);
    expect_shared_update<float, RowwiseRMSprop>(c.policy);
    expect_shared_update<bfloat16, AdamByTouches>(c.policy);
  }
}

// Each thread calls the driver on a table of its own; policies are shared, and one reads another's table
// that nobody writes.
TEST(Threads, ShareThePoliciesOfATableBatch) {
  Random random(2);
  constexpr int kThreads = 4;
  const host::UpdateOf update(RowwiseRMSprop{}, CumulativeLinear{0.01}, Stochastic{3});
  const OptimizedTable<half, RowwiseRMSprop> start(kRows, kDim, random);
  std::vector<OptimizedTable<half, RowwiseRMSprop>> tables(kThreads, start);
  OptimizedTable<half, RowwiseRMSprop> common = start;
  std::vector<std::int64_t> indices;
  for (int i = 0; i < 400; ++i) indices.push_back(random.below(kRows));
  std::vector<float> grad(indices.size() * kDim);
  for (float& g : grad) g = static_cast<float>(random.below(9) - 4) / 8.0f;
  std::vector<std::vector<float>> read(kThreads, std::vector<float>(grad.size()));

  const auto n = static_cast<std::int64_t>(indices.size());
  const auto train = [&](int mine) {
    host::Memory memory;
    const AnyTable own[] = {update.table(tables[static_cast<std::size_t>(mine)].view(), 0.02)};
    const AnyTable other[] = {update.table(common.view(), 0.02)};
    Feature feature{0, kDim, 0, n, 0, n, 0, 0, kDim};
    AnyBatch batch;
    batch.num_tables = batch.num_features = 1;
    batch.features = &feature;
    batch.indices = indices.data();
    batch.bags = batch.positions = n;
    for (std::int32_t step = 1; step <= 3; ++step) {
      batch.step = step;
      batch.tables = own;
      ASSERT_EQ(host::check_batch(batch).kind, BatchProblem::none);
      host::update(batch, grad.data(), NumericType::float32, {},
                   memory.reserve(host::update_bytes(batch)));
      batch.tables = other;
      host::lookup(batch, true, read[static_cast<std::size_t>(mine)].data(), NumericType::float32,
                   memory.reserve(host::lookup_bytes(batch, true)));
    }
  };
  in_threads(kThreads, train);
  for (int i = 1; i < kThreads; ++i) {
    const auto at = static_cast<std::size_t>(i);
    EXPECT_TRUE(tables[at] == tables[0]);
    EXPECT_TRUE(same_bits(read[at], read[0]));
  }
  EXPECT_FALSE(tables[0] == start);
  EXPECT_TRUE(common == start);
}

}  // namespace
}  // namespace coldrow_test
