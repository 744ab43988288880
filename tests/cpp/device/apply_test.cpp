#include "run.hpp"

namespace coldrow_test {
namespace {

// A built-in optimizer has one number per row; these have more, and a state per element.
struct Moments {  // two arrays of D and a number per row, no transcendental function
  float rate = 0.25f;
  static constexpr int scalar_states = 2;
  static constexpr int vector_states = 2;
  struct Step {
    float lr;
    COLDROW_HD bool finite() const { return is_finite(lr); }
  };
  COLDROW_HD Step row(float* scalars, float mean_square, float lr, std::int32_t) const {
    scalars[0] = scalars[0] + mean_square;
    scalars[1] = scalars[1] + 1.0f;
    return {is_finite(scalars[0]) ? lr : scalars[0]};
  }
  COLDROW_HD float element(const Step& step, float g, float* vectors) const {
    vectors[0] = math::fma(rate, g - vectors[0], vectors[0]);
    vectors[1] = math::fma(g, g, vectors[1]);
    return step.lr * vectors[0] / (math::sqrt(vectors[1]) + 1e-3f);
  }
};
struct Plain {  // no state at all
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 0;
  COLDROW_HD RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  COLDROW_HD float element(const RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};

const RowwiseRMSprop kRmsprop{1e-6f, 0.75f};

BatchSpec one_table(std::int64_t rows, std::int32_t dim, std::int64_t bags, int longest) {
  BatchSpec spec;
  spec.rows = {rows};
  spec.dims = {dim};
  spec.feature_tables = {0};
  spec.bags = {bags};
  spec.longest = longest;
  return spec;
}

// Where sums are exact the device gives the host's bits, in every order of threads.
template <class W, class G, class Rounding, class Optimizer>
void equals_host(const BatchSpec& spec, const Optimizer& optimizer, const AnyDecay& decay,
                 const Rounding& rounding, std::uint64_t seed,
                 const std::vector<simt::Order>& orders = all_orders(), bool exact = true) {
  using Update = RowUpdate<W, float, Optimizer, AnyDecay, Rounding>;
  Random random(seed);
  auto tables = test_tables<W, Optimizer>(spec, random);
  TestBatch<std::int32_t> batch(spec, random);
  if (!spec.pooled) flatten_unpooled(batch);
  for (float& w : batch.weights) w = static_cast<float>(random.below(9) - 4) / 4.0f;
  const auto grad = exact ? exact_gradients<G>(batch.out_size, random)
                          : random.numbers<G>(static_cast<std::int64_t>(batch.out_size));
  for (auto& t : tables) t.touch(10, random);
  StepSpec step;
  step.step = 12;
  step.lr = 0.125;
  step.epoch_start = 8;
  step.decay_state = seed % 2 == 0;
  auto expected = tables;
  host_update(batch, expected, grad.data(),
              Update::at(step.step, step.lr, optimizer, decay, rounding, step.decay_state,
                         step.epoch_start));
  for (const simt::Order& order : orders) {
    const simt::WithOrder with(order);
    auto got = tables;
    DeviceBatch<std::int32_t> d(batch, got);
    // (Up to the last row's last column: what lies between rows is not behind the last.)
    const auto gap = std::min<std::size_t>(grad.size(), spec.pooled ? 3 : 0);
    const AtPageEnd<G> guarded(std::vector<G>(grad.begin(), grad.end() - gap));
    const std::int64_t clock =
        device_update<Update>(got, guarded.data(), step, optimizer, decay, rounding, d);
    ASSERT_EQ(clock, step.step);
    ASSERT_EQ(d.report.kind, device::Refusal::none);
    for (std::size_t t = 0; t < tables.size(); ++t) {
      ASSERT_TRUE(got[t] == expected[t]) << "table " << t << ", dim " << got[t].dim << ", order "
                                         << order.kind << " " << order.seed;
    }
  }
}

AnyDecay linear() { return LinearClipped{0.125f, 0.25f}; }

TEST(DeviceApply, EveryWidth) {
  for (const int dim : {1,  2,  3,  4,  5,  7,  8,   9,   12,  15,  16,  17,  24,  31,  32,  33, 40,
                        48, 63, 64, 65, 80, 96, 100, 127, 128, 129, 130, 192, 255, 256, 257, 300}) {
    const auto u = static_cast<std::uint64_t>(dim);
    const BatchSpec spec = one_table(30, dim, 12, 5);
    const std::vector<simt::Order> one{all_orders()[u % 4]};
    equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, u, one);
    equals_host<half, half>(spec, kRmsprop, linear(), Nearest{}, u, one);
    equals_host<coldrow::bfloat16, float>(spec, kRmsprop, linear(), Stochastic{u}, u, one);
    equals_host<float, coldrow::bfloat16>(spec, Moments{}, linear(), Nearest{}, u, one);
    equals_host<half, coldrow::bfloat16>(spec, Moments{}, linear(), Stochastic{u}, u, one);
  }
}

TEST(DeviceApply, SharedTablesOfAllWidths) {
  for (const bool pooled : {true, false}) {
    for (const bool weighted : {false, true}) {
      if (weighted && !pooled) continue;
      BatchSpec spec = shared_tables();
      spec.pooled = pooled;
      spec.weighted = weighted;
      equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, 1);
      equals_host<coldrow::bfloat16, half>(spec, Moments{}, linear(), Stochastic{3}, 2);
      equals_host<half, float>(spec, Plain{}, linear(), Stochastic{4}, 3);
    }
  }
  BatchSpec spec = shared_tables();
  spec.offsets = false;
  equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, 4);
}

TEST(DeviceApply, EveryOptimizer) {
  for (const int dim : {1, 6, 16, 33, 70, 130}) {
    const auto u = static_cast<std::uint64_t>(dim);
    const BatchSpec spec = one_table(20, dim, 12, 5);
    const std::vector<simt::Order> one{all_orders()[u % 4]};
    equals_host<float, float>(spec, SGD{}, linear(), Nearest{}, u, one);
    equals_host<half, float>(spec, RowwiseAdagrad{}, linear(), Stochastic{u}, u, one);
    equals_host<float, half>(spec, Adagrad{}, linear(), Nearest{}, u, one);
    equals_host<coldrow::bfloat16, float>(spec, Adam<>{}, linear(), Stochastic{u}, u, one);
    equals_host<float, float>(spec, Adam<BiasCorrection::row>{}, linear(), Nearest{}, u, one);
    equals_host<half, float>(spec, PartialRowwiseAdam<>{}, linear(), Nearest{}, u, one);
    equals_host<float, float>(spec, PartialRowwiseAdam<BiasCorrection::row>{}, linear(), Nearest{},
                              u, one);
  }
}

TEST(DeviceApply, EveryDecay) {
  for (const DecayCase& c : decay_cases()) {
    equals_host<float, float>(one_table(20, 20, 12, 5), kRmsprop, c.policy, Nearest{}, 2,
                              {all_orders()[3]});
  }
}

// Runs around the length from which they are cut, ones of several slices, and one that is the batch.
TEST(DeviceApply, LongRuns) {
  for (const int n : {127, 128, 129, 191, 192, 193, 300, 1025}) {
    BatchSpec spec = one_table(1, 20, n, 1);
    spec.offsets = false;
    equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, static_cast<std::uint64_t>(n),
                              {all_orders()[static_cast<std::size_t>(n) % 4]});
  }
  for (const int dim : {1, 6, 33, 150}) {
    BatchSpec spec = one_table(3, dim, 1000, 3);
    equals_host<half, float>(spec, kRmsprop, linear(), Nearest{}, 7);
  }
  BatchSpec spec = shared_tables();
  spec.bags = {300, 200, 250, 400, 60, 110, 0};
  equals_host<float, half>(spec, kRmsprop, linear(), Nearest{}, 8);
  spec = one_table(2, 5, 9000, 1);
  spec.offsets = false;
  equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, 9, {all_orders()[1]});
}

// One order of summation, the host's: the same bits where sums are not exact too. (SGD asks for nothing but
// the sums; a mean of squares is added up in another order.)
TEST(DeviceApply, LongRunsInTheOrderOfTheHost) {
  for (const int n : {100, 129, 500, 4096, 4097, 9000}) {
    BatchSpec spec = one_table(2, 21, n, 1);
    spec.offsets = false;
    spec.weighted = n % 2 == 0;
    equals_host<float, float>(spec, SGD{}, linear(), Nearest{}, static_cast<std::uint64_t>(n),
                              {all_orders()[static_cast<std::size_t>(n) % 4]}, /*exact=*/false);
  }
}

// Batches of any shape, from nothing and a single index to runs of hundreds: every optimizer family,
// stored type, gradient type and rounding, with every pooling whose sums are exact.
TEST(DeviceApply, BatchesOfAllShapes) {
  for (std::uint64_t seed = 0; seed < 64; ++seed) {
    Random random(seed + 1000);
    BatchSpec spec;
    const std::int64_t tables = 1 + random.below(4);
    for (std::int64_t t = 0; t < tables; ++t) {
      spec.rows.push_back(1 + random.below(random.below(2) == 0 ? 4 : 500));
      spec.dims.push_back(
          static_cast<std::int32_t>(1 + random.below(random.below(3) == 0 ? 300 : 40)));
    }
    for (std::int64_t f = random.below(6); f >= 0; --f) {
      spec.feature_tables.push_back(static_cast<std::int32_t>(random.below(tables)));
      const std::int64_t most[] = {1, 2, 20, 150};
      spec.bags.push_back(random.below(most[random.below(4)] + 1));
    }
    const int longest[] = {0, 1, 4, 30};
    spec.longest = longest[random.below(4)];
    const std::int64_t how = random.below(4);
    spec.weighted = how == 1;
    spec.pooled = how != 2;
    spec.offsets = how != 3;
    const std::vector<simt::Order> one{all_orders()[seed % 4]};
    switch (seed % 8) {
      case 0:
        equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, seed, one);
        break;
      case 1:
        equals_host<half, half>(spec, kRmsprop, linear(), Nearest{}, seed, one);
        break;
      case 2:
        equals_host<coldrow::bfloat16, float>(spec, kRmsprop, linear(), Stochastic{2}, seed, one);
        break;
      case 3:
        equals_host<float, half>(spec, Adagrad{}, linear(), Nearest{}, seed, one);
        break;
      case 4:
        equals_host<half, float>(spec, RowwiseAdagrad{}, linear(), Stochastic{1}, seed, one);
        break;
      case 5:
        equals_host<coldrow::bfloat16, float>(spec, Adam<>{}, linear(), Stochastic{3}, seed, one);
        break;
      case 6:
        equals_host<float, float>(spec, SGD{}, linear(), Nearest{}, seed, one);
        break;
      default:
        equals_host<half, float>(spec, PartialRowwiseAdam<>{}, linear(), Nearest{}, seed, one);
    }
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

// Keys of 64 bits, all the way: tables of more than 2^32 rows before these, of which no row is used.
TEST(DeviceApply, MoreRowsThan32Bits) {
  for (const bool pooled : {true, false}) {
    BatchSpec spec = shared_tables();
    spec.bags[2] = 300;  // long runs too
    spec.pooled = pooled;
    Random random(3);
    auto tables = test_tables<half, RowwiseRMSprop>(spec, random);
    for (auto& t : tables) t.touch(10, random);
    TestBatch<std::int64_t> batch(spec, random);
    if (!pooled) flatten_unpooled(batch);
    const auto grad = exact_gradients<float>(batch.out_size, random);
    StepSpec step;
    step.step = 12;
    step.lr = 0.125;
    using Update = RowUpdate<half, float, RowwiseRMSprop, AnyDecay, Stochastic>;
    auto expected = tables;
    host_update(batch, expected, grad.data(),
                Update::at(step.step, step.lr, kRmsprop, linear(), Stochastic{4}));
    for (const simt::Order& order : all_orders()) {
      const simt::WithOrder with(order);
      auto got = tables;
      DeviceBatch<std::int64_t> d(batch, got);
      const std::int64_t more = std::int64_t{3} << 32;
      for (auto& b : d.base) b += more;
      d.extent.total_rows += more;
      ASSERT_TRUE(device::wide_keys(d.extent));
      ASSERT_EQ(device_update<Update>(got, grad.data(), step, kRmsprop, linear(), Stochastic{4}, d),
                step.step);
      for (std::size_t t = 0; t < got.size(); ++t) ASSERT_TRUE(got[t] == expected[t]) << t;
    }
  }
}

// More tables than blocks: a block goes on from one table's rows to another's.
TEST(DeviceApply, MoreTablesThanBlocks) {
  for (const std::uint64_t seed : {1, 2}) {
    BatchSpec spec;
    for (int t = 0; t < 150; ++t) {
      spec.rows.push_back(3 + t % 5);
      spec.dims.push_back(1 + (t * 37) % 70);
      spec.feature_tables.push_back((t * 7) % 150);
      spec.bags.push_back(t % 4);
    }
    equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, seed);
    equals_host<half, float>(spec, Moments{}, linear(), Stochastic{seed}, seed);
  }
}

// Many rows to a tile, one after another.
TEST(DeviceApply, ManyRows) {
  equals_host<float, float>(one_table(5000, 3, 2000, 5), kRmsprop, linear(), Nearest{}, 1);
  equals_host<coldrow::bfloat16, float>(one_table(3000, 70, 800, 3), kRmsprop, linear(),
                                        Stochastic{1}, 2, {all_orders()[2]});
}

TEST(DeviceApply, RowsTooWideForSharedMemory) {
  BatchSpec spec;
  spec.rows = {4, 9};
  spec.dims = {13000, 3};
  spec.feature_tables = {0, 1};
  spec.bags = {5, 9};
  equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, 10, {all_orders()[2]});
}

TEST(DeviceApply, NothingToDo) {
  equals_host<float, float>(one_table(5, 8, 0, 3), kRmsprop, linear(), Nearest{}, 1);
  BatchSpec spec = one_table(5, 8, 40, 0);  // bags, all empty
  equals_host<float, float>(spec, kRmsprop, linear(), Nearest{}, 1);
}

// Against the definitions, with gradients whose sums are not exact, for means too; and the same bits
// whatever the order of threads.
template <class W, class G, class Index>
void follow_reference(const BatchSpec& spec, const DecayCase& decay, bool decay_state) {
  using Update = RowUpdate<W, float, RowwiseRMSprop, AnyDecay, Nearest>;
  Random random(5);
  auto tables = test_tables<W, RowwiseRMSprop>(spec, random);
  const reference::Update expected{kRmsprop, decay.expected, decay_state};
  for (const std::int32_t number : {1, 2, 40}) {
    StepSpec step;
    step.step = number;
    step.epoch_start = number >= 40 ? 40 : 0;
    step.decay_state = decay_state;
    TestBatch<Index> batch(spec, random);
    if (!spec.pooled) flatten_unpooled(batch);
    const auto grad = random.numbers<G>(batch.out_size);
    const auto before = tables;
    for (const simt::Order& order : all_orders()) {
      const simt::WithOrder with(order);
      auto got = before;
      DeviceBatch<Index> d(batch, got);
      device_update<Update>(got, grad.data(), step, kRmsprop, decay.policy, Nearest{}, d);
      if (order.kind == simt::Order::forward) {
        tables = got;
      } else {
        ASSERT_TRUE(got == tables) << "order " << order.kind << " gives other bits";
      }
    }
    for (std::size_t t = 0; t < tables.size(); ++t) {
      const std::int64_t dim = spec.dims[t];
      std::vector<std::int64_t> indices, prev;
      std::vector<double> grads, w = values_of(before[t].weight), v;
      for (const Lookup& l : batch.lookups) {
        if (l.table != static_cast<std::int64_t>(t)) continue;
        indices.push_back(l.row);
        for (std::int64_t i = 0; i < dim; ++i) {
          grads.push_back(l.scale *
                          value_of(grad[static_cast<std::size_t>(batch.out_element(l, i))]));
        }
      }
      for (std::size_t r = 0; r < static_cast<std::size_t>(spec.rows[t]); ++r) {
        v.push_back(value_of(float_of(static_cast<std::uint32_t>(before[t].records[2 * r]))));
        prev.push_back(before[t].records[2 * r + 1]);
      }
      reference::apply(expected, w.data(), dim, {prev.data(), v.data()}, grads.data(),
                       indices.data(), static_cast<std::int64_t>(indices.size()), step.step,
                       step.lr, step.epoch_start);
      for (std::size_t r = 0; r < prev.size(); ++r) {
        ASSERT_EQ(tables[t].records[2 * r + 1], prev[r]);
        ASSERT_NEAR(float_of(static_cast<std::uint32_t>(tables[t].records[2 * r])), v[r],
                    1e-5 * v[r]);
        for (std::size_t i = r * static_cast<std::size_t>(dim);
             i < (r + 1) * static_cast<std::size_t>(dim); ++i) {
          double tolerance = 1e-5 * std::max(1.0, std::fabs(w[i]));
          if (!std::same_as<W, float>) tolerance += spacing<W>(w[i]) / 2.0;
          ASSERT_NEAR(value_of(tables[t].weight[i]), w[i], tolerance)
              << decay.name << ", table " << t << ", row " << r;
        }
      }
    }
  }
}

TEST(DeviceApply, FollowsTheReference) {
  for (const bool mean : {false, true}) {
    for (const bool weighted : {false, true}) {
      if (mean && weighted) continue;
      BatchSpec spec = shared_tables();
      spec.mean = mean;
      spec.weighted = weighted;
      spec.longest = 12;
      follow_reference<float, float, std::int64_t>(spec, decay_cases()[1], weighted);
      follow_reference<half, coldrow::bfloat16, std::int32_t>(spec, decay_cases()[5], mean);
    }
  }
  BatchSpec spec = shared_tables();
  spec.pooled = false;
  follow_reference<coldrow::bfloat16, half, std::int64_t>(spec, decay_cases()[3], true);
}

// Rows, outputs and state that lie more than 2^32 elements into their arrays.
TEST(DeviceApply, OffsetsBeyond32Bits) {
  using Update = RowUpdate<half, float, Moments, AnyDecay, Nearest>;
  constexpr std::int64_t kRows = 80'000'000;
  constexpr std::int64_t kFar = 5'000'000'000;
  constexpr int kDim = 72;  // 5.76e9 elements
  const VirtualMemory<half> weight(kRows * kDim);
  const VirtualMemory<float> first(kRows * kDim), second(kRows * kDim), scalars(kRows * 2);
  const VirtualMemory<std::int32_t> prev_iter(kRows);
  const VirtualMemory<float> grad(kFar + 10 * kDim);
  Table<half, Moments> table;
  table.weight = weight.data();
  table.rows = kRows;
  table.dim = kDim;
  table.prev_iter = {prev_iter.data(), 1};
  table.scalars[0] = {scalars.data(), 2};
  table.scalars[1] = {scalars.data() + 1, 2};
  table.vectors[0] = first.data();
  table.vectors[1] = second.data();

  Random random(1);
  BatchSpec spec = one_table(kRows, kDim, 10, 1);
  spec.offsets = false;
  std::vector<TestTable<half, Moments>> none;
  TestBatch<std::int64_t> batch(spec, random);
  batch.indices = {kRows - 1, 0, 70'000'001, kRows - 1, 1, 2, 3, 60'000'000, 3, kRows - 2};
  batch.features[0].out_offset = kFar;
  batch.features[0].out_stride = kDim;
  for (std::int64_t i = 0; i < 10 * kDim; ++i) {
    grad.data()[kFar + i] = static_cast<float>(random.below(5) - 2) / 4.0f;
  }
  DeviceBatch<std::int64_t> d(batch, none);
  const std::int64_t base[2] = {0, kRows};
  const device::TableInfo info{weight.data(), kRows, kDim, {prev_iter.data(), 1}};
  const std::int32_t by_table = 0, first_feature[2] = {0, 1};
  d.layout.tables = &info;
  d.layout.table_base = base;
  d.layout.num_tables = 1;
  d.layout.features_by_table = &by_table;
  d.layout.first_feature = first_feature;
  d.extent.total_rows = kRows;
  d.extent.widest = kDim;
  d.extent.num_tables = 1;
  const auto update = Update::at(1, 0.5);
  device::Queue queue(nullptr);
  std::size_t sort_bytes = 0;
  queue.add(device::radix_sort_bytes(d.extent, sort_bytes));
  const DeviceMemory memory(1 << 20);
  device::Workspace w(memory.data());
  const auto segments = device::take_segment_space(w, d.extent, sort_bytes);
  const auto space = device::take_apply_space(w, d.extent, 0);
  ASSERT_LE(w.bytes(), std::size_t{1} << 20);
  device::begin_batch(queue, &d.report, true);
  device::check_batch(queue, d.batch, d.layout, &d.report, kMachine);
  const auto sorted = device::segment(queue, d.batch, d.layout, d.extent, segments, &d.report);
  const device::Gradient gradient{grad.data(), NumericType::float32};
  device::apply(queue, device::TableGroup<Update>{&table, &by_table, &update, 1}, d.layout,
                d.extent, gradient, sorted, segments.runs, space, device::Pass::update, &d.report);
  ASSERT_EQ(d.report.found, device::kNothing);

  for (const std::int64_t r : {kRows - 1, kRows - 2, std::int64_t{0}, std::int64_t{1},
                               std::int64_t{3}, std::int64_t{60'000'000}}) {
    ASSERT_EQ(prev_iter.data()[r], 1) << "row " << r;
    for (int c = 0; c < kDim; ++c) {
      float g = 0.0f;
      for (std::int64_t i = 0; i < 10; ++i) {
        if (batch.indices[static_cast<std::size_t>(i)] == r) g += grad.data()[kFar + i * kDim + c];
      }
      ASSERT_EQ(first.data()[r * kDim + c], 0.25f * g) << "row " << r << ", column " << c;
      ASSERT_EQ(second.data()[r * kDim + c], g * g);
      ASSERT_NEAR(value_of(weight.data()[r * kDim + c]), -0.5 * 0.25 * g / (std::fabs(g) + 1e-3),
                  1e-4);
    }
  }

  // The forward reads them again.
  const VirtualMemory<float> out(kFar + 10 * kDim);
  std::vector<std::int32_t> first_block(2);
  device::lookup<half, device::ReadStored>(queue, {&by_table, 1}, d.batch, d.layout, nullptr,
                                           &d.report, out.data(), NumericType::float32, 0,
                                           first_block.data(), kMachine);
  for (std::int64_t i = 0; i < 10; ++i) {
    const std::int64_t r = batch.indices[static_cast<std::size_t>(i)];
    for (int c = 0; c < kDim; ++c) {
      ASSERT_EQ(value_of(out.data()[kFar + i * kDim + c]), value_of(weight.data()[r * kDim + c]));
    }
  }
}

// ------------------------------------------------------------------------------- not finite, stale

struct BadCase {
  using Update = RowUpdate<float, float, RowwiseRMSprop, AnyDecay, Nearest>;
  using Tables = std::vector<TestTable<float, RowwiseRMSprop>>;
  BatchSpec spec = shared_tables();
  Random random{11};
  Tables tables = test_tables<float, RowwiseRMSprop>(spec, random);
  TestBatch<std::int64_t> batch{spec, random};
  std::vector<float> grad = random.numbers<float>(batch.out_size);
  std::vector<std::pair<std::int64_t, std::int64_t>> bad;  // (table, row), in order

  // Makes the gradients of two bags infinite and squares of a third overflow.
  void poison() {
    for (const std::size_t i :
         {std::size_t{3}, batch.lookups.size() / 2, batch.lookups.size() - 2}) {
      const Lookup& l = batch.lookups[i];
      grad[static_cast<std::size_t>(batch.out_element(l, 0))] = i == 3 ? 3e38f : kInff;
    }
    for (const Lookup& l : batch.lookups) {
      if (std::fabs(grad[static_cast<std::size_t>(batch.out_element(l, 0))]) > 1e30f) {
        bad.emplace_back(l.table, l.row);
      }
    }
    std::sort(bad.begin(), bad.end());
    bad.erase(std::unique(bad.begin(), bad.end()), bad.end());
  }
  std::int64_t run(Tables& got, const StepSpec& step, device::Report& report) {
    DeviceBatch<std::int64_t> d(batch, got);
    d.report = report;
    const std::int64_t clock =
        device_update<Update>(got, grad.data(), step, kRmsprop, AnyDecay{}, Nearest{}, d);
    report = d.report;
    return clock;
  }
};

TEST(DeviceApply, SkipsRowsThatAreNotFinite) {
  BadCase c;
  c.poison();
  ASSERT_GE(c.bad.size(), 3u);
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    auto got = c.tables;
    auto expected = c.tables;
    StepSpec step;
    step.step = 5;
    device::Report report{};
    EXPECT_EQ(c.run(got, step, report), 5);
    EXPECT_EQ(report.nonfinite_rows, c.bad.size());
    EXPECT_EQ(report.kind, device::Refusal::none);
    host_update(c.batch, expected, c.grad.data(), BadCase::Update::at(5, step.lr, kRmsprop));
    for (const auto& [t, r] : c.bad) {
      EXPECT_EQ(got[static_cast<std::size_t>(t)].prev_iter(r), 0);
    }
    for (std::size_t t = 0; t < got.size(); ++t) {
      for (std::int64_t r = 0; r < got[t].rows; ++r) {
        ASSERT_EQ(got[t].prev_iter(r), expected[t].prev_iter(r));
      }
    }
  }
}

TEST(DeviceApply, PropagatesWhatIsNotFinite) {
  BadCase c;
  c.poison();
  auto got = c.tables;
  StepSpec step;
  step.step = 5;
  step.on_nonfinite = OnNonfinite::propagate;
  device::Report report{};
  EXPECT_EQ(c.run(got, step, report), 5);
  EXPECT_EQ(report.nonfinite_rows, 0u);
  for (const auto& [t, r] : c.bad) {
    EXPECT_EQ(got[static_cast<std::size_t>(t)].prev_iter(r), 5);
  }
}

TEST(DeviceApply, RefusesWhatIsNotFinite) {
  BadCase c;
  c.poison();
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    auto got = c.tables;
    StepSpec step;
    step.step = 5;
    step.check = static_cast<int>(device::Pass::check_finite);
    device::Report report{};
    EXPECT_EQ(c.run(got, step, report), 4) << "the clock ticked";
    EXPECT_TRUE(got == c.tables) << "written";
    EXPECT_EQ(report.kind, device::Refusal::nonfinite_row);
    EXPECT_EQ(report.table, c.bad[0].first);
    EXPECT_EQ(report.position, c.bad[0].second);
    EXPECT_EQ(report.bad_rows, c.bad.size());
    EXPECT_EQ(report.nonfinite_rows, 0u);
    EXPECT_EQ(report.refused, 1);
    EXPECT_EQ(report.batch, 1);
  }
}

TEST(DeviceApply, RefusesAStepThatDoesNotAdvance) {
  BadCase c;
  std::int64_t first_table = -1, first_row = -1;
  for (const Lookup& l : c.batch.lookups) {
    auto& table = c.tables[static_cast<std::size_t>(l.table)];
    if (l.row % 3 != 1) continue;
    table.prev_iter(l.row) = l.row % 2 == 0 ? 5 : 9;
  }
  std::uint64_t stale = 0;
  for (std::size_t t = 0; t < c.tables.size(); ++t) {
    for (std::int64_t r = 0; r < c.tables[t].rows; ++r) {
      if (c.tables[t].prev_iter(r) < 5) continue;
      if (first_table < 0) {
        first_table = static_cast<std::int64_t>(t);
        first_row = r;
      }
      ++stale;
    }
  }
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    auto got = c.tables;
    StepSpec step;
    step.step = 5;
    step.check = static_cast<int>(device::Pass::check_stale);
    device::Report report{};
    EXPECT_EQ(c.run(got, step, report), 4);
    EXPECT_TRUE(got == c.tables);
    EXPECT_EQ(report.kind, device::Refusal::stale_row);
    EXPECT_EQ(report.table, first_table);
    EXPECT_EQ(report.position, first_row);
    EXPECT_EQ(report.value, c.tables[static_cast<std::size_t>(first_table)].prev_iter(first_row));
    EXPECT_EQ(report.bad_rows, stale);
    // One step later than all of them there is nothing to refuse.
    step.step = 10;
    device::Report good{};
    EXPECT_EQ(c.run(got, step, good), 10);
    EXPECT_EQ(good.kind, device::Refusal::none);
  }
}

// A check pass looks for what it was asked for alone.
TEST(DeviceApply, AStaleCheckLetsNonfiniteRowsBeSkipped) {
  BadCase c;
  c.poison();
  auto got = c.tables;
  StepSpec step;
  step.step = 5;
  step.check = static_cast<int>(device::Pass::check_stale);
  device::Report report{};
  EXPECT_EQ(c.run(got, step, report), 5);
  EXPECT_EQ(report.nonfinite_rows, c.bad.size());
}

// -------------------------------------------------------------------------------------- bad batches

TEST(DeviceApply, ABadBatchWritesNothing) {
  struct Case {
    device::Refusal kind;
    std::int64_t position, value;
    std::int32_t feature;
  };
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    BadCase c;
    auto& indices = c.batch.indices;
    auto& offsets = c.batch.offsets;
    const std::vector<std::int64_t> good_indices = indices, good_offsets = offsets;
    const auto last = c.batch.positions() - 1;
    const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
    const auto expect = [&](const Case& want) {
      auto got = c.tables;
      device::Report report{};
      EXPECT_EQ(c.run(got, {}, report), 0) << "the clock ticked";
      EXPECT_TRUE(got == c.tables) << "written";
      EXPECT_EQ(report.kind, want.kind);
      EXPECT_EQ(report.position, want.position);
      EXPECT_EQ(report.value, want.value);
      EXPECT_EQ(report.feature, want.feature);
      if (want.feature >= 0) {
        EXPECT_EQ(report.table, c.spec.feature_tables[at(want.feature)]);
      }
      indices = good_indices;
      offsets = good_offsets;
    };
    const auto feature_of = [&](std::int64_t p) {
      for (std::size_t f = 0; f < c.batch.features.size(); ++f) {
        const Feature& feature = c.batch.features[f];
        if (p >= feature.first_position && p < feature.first_position + feature.positions) {
          return static_cast<std::int32_t>(f);
        }
      }
      return -1;
    };
    // The first of several bad indices; the row after the last; a negative one; the last position.
    indices[at(20)] = 1 << 20;
    indices[at(9)] = -1;
    indices[at(last)] = 1 << 20;
    expect({device::Refusal::index_range, 9, -1, feature_of(9)});
    const std::int64_t rows = c.spec.rows[at(c.spec.feature_tables[at(feature_of(last))])];
    indices[at(last)] = rows;
    expect({device::Refusal::index_range, last, rows, feature_of(last)});
    indices[at(0)] = INT64_MIN;
    expect({device::Refusal::index_range, 0, INT64_MIN, feature_of(0)});
    // Offsets, each of which also hides a bad index.
    indices[at(9)] = -1;
    offsets[0] = 1;
    expect({device::Refusal::offsets_start, 0, 1, -1});
    indices[at(9)] = -1;
    const std::int64_t fallen = offsets[at(50)] - 1;
    offsets[at(51)] = fallen;
    offsets[at(90)] = -5;
    expect({device::Refusal::offsets_decrease, 51, fallen, -1});
    offsets.back() += 1;
    expect({device::Refusal::offsets_end, c.batch.bags, last + 2, -1});
    offsets[at(3)] = 1 << 30;  // far beyond the indices
    expect({device::Refusal::offsets_decrease, 4, good_offsets[at(4)], -1});
  }
}

// The record keeps the first refused batch until it is read; good batches train on.
TEST(DeviceApply, TheRecordKeepsTheFirstRefusal) {
  BadCase c;
  device::Report report{};
  auto got = c.tables;
  StepSpec step;
  const auto good = c.batch.indices;
  EXPECT_EQ(c.run(got, step, report), 1);
  c.batch.indices[4] = 5000;
  step.step = 2;
  EXPECT_EQ(c.run(got, step, report), 1);
  c.batch.indices[2] = 6000;
  EXPECT_EQ(c.run(got, step, report), 1);
  c.batch.indices = good;
  EXPECT_EQ(c.run(got, step, report), 2);
  EXPECT_EQ(report.kind, device::Refusal::index_range);
  EXPECT_EQ(report.position, 4);
  EXPECT_EQ(report.value, 5000);
  EXPECT_EQ(report.batch, 2);
  EXPECT_EQ(report.batches, 4);
  EXPECT_EQ(report.refused, 2);
  report.kind = device::Refusal::none;
  c.batch.indices[7] = -3;
  step.step = 3;
  EXPECT_EQ(c.run(got, step, report), 2);
  EXPECT_EQ(report.value, -3);
  EXPECT_EQ(report.batch, 5);
}

TEST(DeviceApply, StepsLrAndEpochsOutOfRangeAreRefused) {
  const auto expect = [](StepSpec step, device::Refusal kind) {
    BadCase c;
    auto got = c.tables;
    device::Report report{};
    const std::int64_t before = std::int64_t{step.step} - 1;
    EXPECT_EQ(c.run(got, step, report), before);
    EXPECT_TRUE(got == c.tables);
    EXPECT_EQ(report.kind, kind);
  };
  StepSpec step;
  step.step = 0;
  expect(step, device::Refusal::step_range);
  for (const double lr : {-1.0, kInf, static_cast<double>(kNanf), 1e39}) {
    step = {};
    step.lr = lr;
    expect(step, device::Refusal::lr_range);
  }
  step = {};
  step.epoch_start = -1;
  expect(step, device::Refusal::epoch_start_range);
  // The last step there is.
  BadCase c;
  auto got = c.tables;
  device::Report report{};
  step = {};
  step.step = kLastStep;
  EXPECT_EQ(c.run(got, step, report), kLastStep);
  EXPECT_EQ(report.kind, device::Refusal::none);
}

}  // namespace
}  // namespace coldrow_test
