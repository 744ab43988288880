#include "run.hpp"

namespace coldrow_test {
namespace {

using device::ReadStep;
using device::ReadStored;

// One forward through the device drivers. Read: ReadStored or ReadStep<AnyDecay>.
template <class Read, class W, class Out, class Index>
struct Forward {
  std::vector<TestTable<W, RowwiseRMSprop>>& tables;
  DeviceBatch<Index> d;
  std::vector<Out> out;
  std::vector<float> weight_gradient;

  // grad: null, or what to compute the gradient of the weights from.
  template <class G = float>
  Forward(const TestBatch<Index>& test, std::vector<TestTable<W, RowwiseRMSprop>>& t,
          const AnyDecay& decay, std::int64_t clock, double lr, std::int64_t epoch_start,
          const std::vector<G>* grad = nullptr)
      : tables(t), d(test, t), out(static_cast<std::size_t>(test.out_size)) {
    if (!out.empty()) std::memset(static_cast<void*>(out.data()), 0xff, out.size() * sizeof(Out));
    std::vector<device::ReadRecipe<AnyDecay>> recipes(tables.size(), {decay, {&lr}});
    std::vector<Read> reads(tables.size());
    std::vector<std::int32_t> first_block(tables.size() + d.features.size() + 1);
    // Rows may not be read beyond the last.
    std::vector<std::unique_ptr<AtPageEnd<W>>> weights;
    for (std::size_t i = 0; i < tables.size(); ++i) {
      weights.push_back(std::make_unique<AtPageEnd<W>>(tables[i].weight));
      d.infos[i].weight = weights.back()->data();
    }
    device::Queue queue(nullptr);
    device::begin_batch(queue, &d.report, true);
    device::check_batch(queue, d.batch, d.layout, &d.report, kMachine);
    if constexpr (!std::same_as<Read, ReadStored>) {
      device::prepare_reads(queue, {{&clock}, {&epoch_start}}, recipes.data(),
                            static_cast<std::int32_t>(tables.size()), reads.data(), &d.report);
    }
    // In two groups, as if the tables had two types.
    const auto half_of = static_cast<std::int32_t>(d.all_features.size() / 2);
    const auto rest = static_cast<std::int32_t>(d.all_features.size()) - half_of;
    const device::FeatureGroup groups[2] = {{d.all_features.data(), half_of},
                                            {d.all_features.data() + half_of, rest}};
    const AtPageEnd<Out> guarded(out);
    for (const auto& group : groups) {
      device::lookup<W>(queue, group, d.batch, d.layout, reads.data(), &d.report, guarded.data(),
                        kNumericType<Out>, test.out_size, first_block.data(), kMachine);
    }
    if (!out.empty()) {
      std::memcpy(static_cast<void*>(out.data()), guarded.data(), out.size() * sizeof(Out));
    }
    if (grad != nullptr) {
      const AtPageEnd<G> g(*grad);
      weight_gradient.assign(static_cast<std::size_t>(test.positions()), kNanf);
      const AtPageEnd<float> to(weight_gradient);
      for (const auto& group : groups) {
        device::weight_gradients<W>(queue, group, d.batch, d.layout, reads.data(), &d.report,
                                    g.data(), kNumericType<G>, to.data(), first_block.data(),
                                    kMachine);
      }
      if (test.positions() > 0) {
        std::memcpy(weight_gradient.data(), to.data(), weight_gradient.size() * sizeof(float));
      }
    }
    device::finish_batch(queue, d.batch, d.layout, &d.report, nullptr);
    EXPECT_EQ(queue.error, cudaSuccess);
  }
};

AnyDecay decay_case(std::size_t i) { return decay_cases()[i].policy; }

template <class W, class Out, class Index>
void equals_host(BatchSpec spec, std::uint64_t seed) {
  Random random(seed);
  auto tables = test_tables<W, RowwiseRMSprop>(spec, random);
  for (auto& t : tables) t.touch(40, random);
  TestBatch<Index> batch(spec, random);
  if (!spec.pooled) flatten_unpooled(batch);
  const auto grad = exact_gradients<float>(batch.out_size, random);
  const simt::Order order = all_orders()[seed % 4];
  const simt::WithOrder with(order);
  const std::int64_t clock = 50;
  for (const bool read : {false, true}) {
    const AnyDecay decay = decay_case(seed % decay_cases().size());
    std::vector<Out> expected(static_cast<std::size_t>(batch.out_size));
    if (!expected.empty()) {
      std::memset(static_cast<void*>(expected.data()), 0xff, expected.size() * sizeof(Out));
    }
    std::vector<float> expected_gradient(static_cast<std::size_t>(batch.positions()));
    host_lookup(batch, tables, read ? &decay : nullptr, clock, 0.02, 20, expected, &grad,
                &expected_gradient);
    const auto check = [&](const auto& forward) {
      ASSERT_EQ(forward.d.report.kind, device::Refusal::none);
      ASSERT_TRUE(same_bits(forward.out, expected)) << "seed " << seed << ", read " << read;
      for (std::size_t p = 0; p < expected_gradient.size(); ++p) {
        ASSERT_NEAR(forward.weight_gradient[p], expected_gradient[p],
                    1e-5 * std::max(1.0f, std::fabs(expected_gradient[p])));
      }
    };
    if (read) {
      check(
          Forward<ReadStep<AnyDecay>, W, Out, Index>(batch, tables, decay, clock, 0.02, 20, &grad));
    } else {
      check(Forward<ReadStored, W, Out, Index>(batch, tables, decay, clock, 0.02, 20, &grad));
    }
  }
}

TEST(DeviceLookup, EqualsTheHostBitForBit) {
  std::uint64_t seed = 1;
  for (const bool pooled : {true, false}) {
    for (const int how : {0, 1, 2}) {
      if (!pooled && how > 0) continue;
      for (const bool offsets : {true, false}) {
        BatchSpec spec = shared_tables();
        spec.pooled = pooled;
        spec.mean = how == 1;
        spec.weighted = how == 2;
        spec.offsets = offsets;
        equals_host<float, float, std::int32_t>(spec, seed++);
        equals_host<half, coldrow::bfloat16, std::int64_t>(spec, seed++);
        equals_host<coldrow::bfloat16, half, std::int32_t>(spec, seed++);
      }
    }
  }
}

TEST(DeviceLookup, EveryWidth) {
  for (const int dim :
       {1,  2,  3,  4,  5,  7,   8,   9,   12,  15,  16,  17,  24,  31,  32,  33,  40,  48,
        63, 64, 65, 80, 96, 100, 127, 128, 129, 130, 192, 255, 256, 257, 300, 512, 1025}) {
    BatchSpec spec;
    spec.rows = {20};
    spec.dims = {dim};
    spec.feature_tables = {0};
    spec.bags = {10};
    spec.longest = 9;
    spec.weighted = dim % 2 == 0;
    const auto seed = static_cast<std::uint64_t>(dim);
    equals_host<float, float, std::int64_t>(spec, seed);
    equals_host<half, half, std::int32_t>(spec, seed + 1);
    equals_host<coldrow::bfloat16, float, std::int32_t>(spec, seed + 2);
  }
}

TEST(DeviceLookup, LongAndEmptyBags) {
  BatchSpec spec;
  spec.rows = {50, 30};
  spec.dims = {20, 64};
  spec.feature_tables = {0, 1, 0};
  spec.bags = {3, 60, 1};
  spec.longest = 150;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    equals_host<float, float, std::int64_t>(spec, seed);
  }
  spec.longest = 0;
  equals_host<half, float, std::int64_t>(spec, 1);
  spec.bags = {0, 0, 0};
  equals_host<float, float, std::int64_t>(spec, 1);
}

TEST(DeviceLookup, EveryDecayIsReadAsTheReferenceSays) {
  for (const DecayCase& c : decay_cases()) {
    Random random(3);
    BatchSpec spec;
    spec.rows = {40};
    spec.dims = {6};
    spec.feature_tables = {0};
    spec.bags = {60};
    spec.offsets = false;
    auto tables = test_tables<float, RowwiseRMSprop>(spec, random);
    tables[0].touch(40, random);
    const TestBatch<std::int32_t> batch(spec, random);
    const Forward<ReadStep<AnyDecay>, float, float, std::int32_t> forward(batch, tables, c.policy,
                                                                          60, 0.02, 20);
    for (const Lookup& l : batch.lookups) {
      const double factor =
          reference::read_factor({{}, c.expected, false}, tables[0].prev_iter(l.row), 61, 0.02, 20);
      for (std::int64_t i = 0; i < 6; ++i) {
        const double w = tables[0].weight[static_cast<std::size_t>(l.row * 6 + i)];
        ASSERT_NEAR(forward.out[static_cast<std::size_t>(batch.out_element(l, i))], factor * w,
                    4e-6)
            << c.name << ", prev_iter " << tables[0].prev_iter(l.row);
      }
    }
  }
}

// There is a read after the last step; a clock beyond that is refused.
TEST(DeviceLookup, TheLastRead) {
  Random random(4);
  const BatchSpec spec = shared_tables();
  auto tables = test_tables<float, RowwiseRMSprop>(spec, random);
  const TestBatch<std::int32_t> batch(spec, random);
  const auto kind = [&](std::int64_t clock) {
    const Forward<ReadStep<AnyDecay>, float, float, std::int32_t> forward(
        batch, tables, decay_case(1), clock, 0.02, 0);
    return forward.d.report.kind;
  };
  EXPECT_EQ(kind(kLastStep), device::Refusal::none);
  EXPECT_EQ(kind(std::int64_t{kLastStep} + 1), device::Refusal::step_range);
  EXPECT_EQ(kind(-1), device::Refusal::step_range);
}

TEST(DeviceLookup, ABadBatchGivesZeros) {
  for (const bool pooled : {true, false}) {
    Random random(6);
    BatchSpec spec = shared_tables();
    spec.pooled = pooled;
    auto tables = test_tables<half, RowwiseRMSprop>(spec, random);
    TestBatch<std::int64_t> batch(spec, random);
    if (!pooled) flatten_unpooled(batch);
    const auto grad = random.numbers<float>(batch.out_size);
    const auto expect_zeros = [&] {
      const Forward<ReadStep<AnyDecay>, half, float, std::int64_t> forward(
          batch, tables, decay_case(1), 5, 0.02, 0, &grad);
      EXPECT_EQ(forward.d.report.refused, 1);
      for (const float x : forward.out) ASSERT_EQ(x, 0.0f);
      for (const float x : forward.weight_gradient) ASSERT_EQ(x, 0.0f);
    };
    const auto good = batch.indices;
    batch.indices[5] = 1 << 30;
    expect_zeros();
    batch.indices = good;
    batch.offsets[2] = 1 << 30;
    expect_zeros();
  }
}

}  // namespace
}  // namespace coldrow_test
