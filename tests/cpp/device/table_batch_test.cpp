// Several tables of several types and policies in one call: the device gives what the host does, bit for
// bit where sums are exact, in every order of threads.
#include "run.hpp"

#include <coldrow/device/table_batch.cuh>
#include <coldrow/host/table_batch.hpp>

namespace coldrow_test {
namespace {

BatchSpec three_tables() {
  BatchSpec spec;
  spec.rows = {40, 7, 300};
  spec.dims = {16, 5, 70};
  spec.feature_tables = {1, 0, 2, 0};
  spec.bags = {20, 20, 20, 20};
  spec.gap = 0;
  return spec;
}

// Tables that differ in everything, and updates for them.
struct Model {
  TestTable<float, RowwiseRMSprop> a;
  TestTable<coldrow::bfloat16, Adam<BiasCorrection::clock>> b;
  TestTable<half, RowwiseRMSprop> c;

  explicit Model(Random& random) : a(40, 16, random), b(7, 5, random), c(300, 70, random) {
    a.touch(10, random);
    b.touch(10, random);
    c.touch(10, random);
  }
  friend bool operator==(const Model& x, const Model& y) {
    return x.a == y.a && x.b == y.b && x.c == y.c;
  }
};

const host::UpdateOf<RowwiseRMSprop, LinearClipped> kUpdateA{{1e-6f, 0.75f}, {0.125f, 0.25f}};
const host::UpdateOf<Adam<BiasCorrection::clock>, Exponential, Stochastic> kUpdateB{
    {}, {0.0, 4.0}, {99}, true};
const host::UpdateOf<RowwiseRMSprop, Constant> kUpdateC{{1e-6f, 0.75f}, {0.5f}};

// The batch as host and device take it.
struct Problem {
  Random random{5};
  TestBatch<std::int32_t> test;
  Model model;
  std::vector<float> grad;

  explicit Problem(const BatchSpec& spec)
      : test(spec, random), model(random), grad(exact_gradients<float>(test.out_size, random)) {
    for (float& w : test.weights) w = static_cast<float>(random.below(9) - 4) / 4.0f;
  }

  // f(batch). on_device: with the functions of tables there.
  template <class F>
  void with(Model& m, bool on_device, const F& f) {
    static constexpr auto rms = device::OptimizerUpdates::of<RowwiseRMSprop>();
    static constexpr auto adam = device::OptimizerUpdates::of<Adam<BiasCorrection::clock>>();
    AnyTable tables[] = {kUpdateA.table(m.a.view(), 0.125), kUpdateB.table(m.b.view(), 0.25),
                         kUpdateC.table(m.c.view(), 0.5)};
    if (on_device) {
      tables[0].update.optimizer_functions = tables[2].update.optimizer_functions = &rms;
      tables[1].update.optimizer_functions = &adam;
    }
    std::vector<Feature> features = test.features;
    AnyBatch b;
    b.tables = tables;
    b.num_tables = 3;
    b.features = features.data();
    b.num_features = static_cast<std::int32_t>(features.size());
    b.index_type = IndexType::i32;
    b.indices = test.indices.data();
    b.offsets = test.offsets.data();
    b.bags = test.bags;
    b.positions = test.positions();
    b.pooled = test.spec.pooled;
    b.mean = test.spec.mean;
    b.per_sample_weights = test.spec.weighted ? test.weights.data() : nullptr;
    b.step = 12;
    b.threads = 2;
    f(b);
  }

  // f(queue, batch, report, allocate): a call on the device.
  template <class F>
  device::Report on_device(Model& m, const F& f) {
    device::Report report{};
    with(m, true, [&](AnyBatch& b) {
      std::vector<std::unique_ptr<DeviceMemory>> memory;
      const auto allocate = [&](std::size_t bytes) {
        return memory.emplace_back(std::make_unique<DeviceMemory>(bytes))->data();
      };
      device::Queue queue(nullptr);
      f(queue, b, &report, allocate);
      EXPECT_EQ(queue.error, cudaSuccess);
      for (const auto& block : memory) EXPECT_TRUE(block->intact());
    });
    return report;
  }
};

TEST(DeviceTableBatch, LookupAndItsWeightsAsOnTheHost) {
  for (const bool read : {false, true}) {
    BatchSpec spec = three_tables();
    spec.weighted = true;
    Problem p(spec);
    const auto size = static_cast<std::size_t>(p.test.out_size);
    std::vector<float> out(size), weights(p.test.weights.size());
    p.with(p.model, false, [&](AnyBatch& b) {
      ASSERT_EQ(host::check_batch(b).kind, BatchProblem::none);
      std::vector<char> memory(host::lookup_bytes(b, read) + 64);
      auto* const work =
          reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
      host::lookup(b, read, out.data(), NumericType::float32, work);
      host::weight_gradients(b, read, p.grad.data(), NumericType::float32, weights.data(), work);
    });
    for (const simt::Order& order : all_orders()) {
      const simt::WithOrder with(order);
      std::vector<float> got(size), got_weights(weights.size());
      p.on_device(p.model, [&](auto& queue, auto& b, auto* report, const auto& allocate) {
        device::lookup(queue, b, {}, read, got.data(), NumericType::float32, p.test.out_size,
                       report, kMachine, allocate);
      });
      p.on_device(p.model, [&](auto& queue, auto& b, auto* report, const auto& allocate) {
        device::weight_gradients(queue, b, {}, read, p.grad.data(), NumericType::float32,
                                 got_weights.data(), report, kMachine, allocate);
      });
      EXPECT_TRUE(same_bits(out, got));
      EXPECT_EQ(weights.size(), got_weights.size());
      for (std::size_t i = 0; i < weights.size(); ++i) {
        EXPECT_NEAR(weights[i], got_weights[i], 1e-4 * (1.0 + std::abs(weights[i])));
      }
    }
  }
}

TEST(DeviceTableBatch, UpdateAsOnTheHost) {
  Problem p(three_tables());
  Model expected = p.model;
  p.with(expected, false, [&](AnyBatch& b) {
    ASSERT_EQ(host::check_batch(b).kind, BatchProblem::none);
    std::vector<char> memory(host::update_bytes(b) + 64);
    auto* const work =
        reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
    EXPECT_FALSE(host::update(b, p.grad.data(), NumericType::float32, {}, work).refused);
  });
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    Model got = p.model;
    std::int64_t clock = 11;
    const std::int64_t epoch_start = 0;
    const double a = 0.125, b_lr = 0.25, c = 0.5;
    const double* const lrs[] = {&a, &b_lr, &c};
    const auto report =
        p.on_device(got, [&](auto& queue, auto& b, auto* found, const auto& allocate) {
          device::UpdateOptions options;
          options.clock = &clock;
          b.step = -1;  // (the clock says it)
          device::update(queue, b, {&clock, &epoch_start, lrs},
                         {p.grad.data(), NumericType::float32}, options, found, kMachine, allocate);
        });
    EXPECT_EQ(report.kind, device::Refusal::none);
    EXPECT_EQ(clock, 12);
    EXPECT_TRUE(got == expected);
  }
}

TEST(DeviceTableBatch, WhatIsRefusedChangesNothing) {
  Problem p(three_tables());
  Model got = p.model;
  const auto update = [&](const device::UpdateOptions& options) {
    return p.on_device(got, [&](auto& queue, auto& b, auto* found, const auto& allocate) {
      device::update(queue, b, {}, {p.grad.data(), NumericType::float32}, options, found, kMachine,
                     allocate);
    });
  };
  device::UpdateOptions check;
  check.check_only = true;
  EXPECT_EQ(update(check).kind, device::Refusal::none);
  EXPECT_TRUE(got == p.model);
  p.grad[3] = std::numeric_limits<float>::infinity();
  device::UpdateOptions raise;
  raise.refuse_nonfinite = true;
  EXPECT_EQ(update(raise).kind, device::Refusal::nonfinite_row);
  EXPECT_TRUE(got == p.model);
  p.test.indices[2] = 1000;
  const auto report = update({});
  EXPECT_EQ(report.kind, device::Refusal::index_range);
  EXPECT_EQ(report.position, 2);
  EXPECT_TRUE(got == p.model);
}

}  // namespace
}  // namespace coldrow_test
