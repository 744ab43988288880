#include "run.hpp"

namespace coldrow_test {
namespace {

using device::LongRun;

// Sorted entries and runs of a batch, as the device finds them.
template <class Index>
struct Segmented {
  DeviceBatch<Index> d;
  std::vector<std::uint64_t> keys;
  std::vector<device::ScaledRow> payloads;
  std::vector<std::int32_t> begin, table_run;
  std::vector<LongRun> long_runs;
  device::RunCounts counts{};

  template <class W, class Optimizer>
  Segmented(const TestBatch<Index>& test, std::vector<TestTable<W, Optimizer>>& tables,
            std::int64_t more_rows = 0)
      : d(test, tables) {
    // Empty tables before the others push their keys up.
    for (auto& b : d.base) b += more_rows;
    d.base[0] = more_rows;
    d.extent.total_rows += more_rows;
    device::Queue queue(nullptr);
    std::size_t sort_bytes = 0;
    queue.add(device::radix_sort_bytes(d.extent, sort_bytes));
    const auto take = [&](device::Workspace w, device::SegmentSpace& space) {
      space = device::take_segment_space(w, d.extent, sort_bytes);
      return w.bytes();
    };
    device::SegmentSpace space;
    const DeviceMemory memory(take(device::Workspace(nullptr), space));
    take(device::Workspace(memory.data()), space);
    // Reading beyond the last entry is a fault.
    using Bytes = std::vector<unsigned char>;
    const auto n = static_cast<std::size_t>(d.extent.positions);
    const AtPageEnd<unsigned char> keys_at[2] = {
        AtPageEnd<unsigned char>(Bytes(n * (device::wide_keys(d.extent) ? 8 : 4))),
        AtPageEnd<unsigned char>(Bytes(n * (device::wide_keys(d.extent) ? 8 : 4)))};
    const AtPageEnd<unsigned char> payloads_at[2] = {
        AtPageEnd<unsigned char>(Bytes(n * (device::scaled_payloads(d.extent) ? 8 : 4))),
        AtPageEnd<unsigned char>(Bytes(n * (device::scaled_payloads(d.extent) ? 8 : 4)))};
    for (const int i : {0, 1}) {
      space.entries[i].keys = keys_at[i].data();
      space.entries[i].payloads = payloads_at[i].data();
    }
    device::begin_batch(queue, &d.report, true);
    device::check_batch(queue, d.batch, d.layout, &d.report, kMachine);
    const device::Entries sorted =
        device::segment(queue, d.batch, d.layout, d.extent, space, &d.report);
    EXPECT_EQ(queue.error, cudaSuccess);
    EXPECT_TRUE(memory.intact());
    EXPECT_EQ(d.report.found, device::kNothing);
    for (std::int64_t i = 0; i < d.batch.positions; ++i) {
      keys.push_back(sorted.key(i));
      payloads.push_back(sorted.payload(i));
    }
    counts = *space.runs.counts;
    begin.assign(space.runs.begin, space.runs.begin + counts.runs + 1);
    long_runs.assign(space.runs.long_runs, space.runs.long_runs + counts.long_runs);
    table_run.assign(space.runs.table_run, space.runs.table_run + d.layout.num_tables + 1);
  }
};

template <class Index>
void expect_segments(const BatchSpec& spec, std::uint64_t seed, std::int64_t more_rows = 0) {
  Random random(seed);
  auto tables = test_tables<half, RowwiseRMSprop>(spec, random);
  TestBatch<Index> batch(spec, random);
  if (!spec.pooled) flatten_unpooled(batch);
  // By the definition: lookups in order of the batch, sorted stably by row.
  std::vector<Lookup> want = batch.lookups;
  const auto key_of = [&](const Lookup& l) {
    return static_cast<std::uint64_t>(more_rows +
                                      batch.table_base[static_cast<std::size_t>(l.table)] + l.row);
  };
  std::stable_sort(want.begin(), want.end(),
                   [&](const Lookup& a, const Lookup& b) { return key_of(a) < key_of(b); });
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    const Segmented<Index> s(batch, tables, more_rows);
    ASSERT_EQ(s.keys.size(), want.size());
    std::vector<std::int32_t> begin;
    for (std::size_t i = 0; i < want.size(); ++i) {
      ASSERT_EQ(s.keys[i], key_of(want[i]));
      ASSERT_EQ(s.payloads[i].out_row, want[i].out_row);
      ASSERT_EQ(s.payloads[i].scale, static_cast<float>(want[i].scale));
      if (i == 0 || key_of(want[i - 1]) != key_of(want[i])) {
        begin.push_back(static_cast<std::int32_t>(i));
      }
    }
    const auto runs = begin.size();
    begin.push_back(static_cast<std::int32_t>(want.size()));
    ASSERT_EQ(s.begin, begin);
    for (std::size_t t = 0; t <= tables.size(); ++t) {
      std::size_t r = 0;
      const auto base = static_cast<std::uint64_t>(s.d.base[t]);
      while (r < runs && key_of(want[static_cast<std::size_t>(begin[r])]) < base) ++r;
      ASSERT_EQ(s.table_run[t], static_cast<std::int32_t>(r)) << "table " << t;
    }
    // Long runs, their parts and slices.
    std::size_t l = 0;
    std::int32_t parts = 0, slices = 0;
    for (std::size_t r = 0; r < runs; ++r) {
      const std::int32_t length = begin[r + 1] - begin[r];
      if (length <= kLongRun) continue;
      ASSERT_LT(l, s.long_runs.size());
      const LongRun& run = s.long_runs[l++];
      ASSERT_EQ(run.begin, begin[r]);
      ASSERT_EQ(run.end, begin[r + 1]);
      ASSERT_EQ(run.first_part, parts);
      ASSERT_EQ(run.parts, (length + kPart - 1) / kPart);
      ASSERT_EQ(run.first_slice, slices);
      ASSERT_EQ(run.slices > 0, run.parts > kMaxParts);
      ASSERT_LE(run.slices, kMaxParts);
      parts += run.parts;
      slices += run.slices;
    }
    ASSERT_EQ(l, s.long_runs.size());
    ASSERT_EQ(s.counts.parts, parts);
    ASSERT_EQ(s.counts.slices, slices);
    ASSERT_LE(parts, device::most_parts(batch.positions()));
  }
}

TEST(DeviceSegment, SharedTables) {
  std::uint64_t seed = 0;
  for (const bool pooled : {true, false}) {
    for (const int how : {0, 1, 2}) {
      if (!pooled && how > 0) continue;
      for (const bool offsets : {true, false}) {
        BatchSpec spec = shared_tables();
        spec.pooled = pooled;
        spec.mean = how == 1 && offsets;
        spec.weighted = how == 2;
        spec.offsets = offsets;
        expect_segments<std::int32_t>(spec, seed++);
        expect_segments<std::int64_t>(spec, seed++);
      }
    }
  }
}

// Bags of all lengths against the 256 positions that a warp takes and the 32 bags it looks at.
TEST(DeviceSegment, BagsOfAllLengths) {
  for (const int longest : {0, 1, 2, 30, 300, 900}) {
    BatchSpec spec;
    spec.rows = {300, 20};
    spec.dims = {4, 4};
    spec.feature_tables = {0, 1, 0};
    spec.bags = {longest > 100 ? 3 : 400, 5, 70};
    spec.longest = longest;
    spec.mean = true;
    expect_segments<std::int32_t>(spec, static_cast<std::uint64_t>(longest));
  }
}

TEST(DeviceSegment, ManyEmptyBags) {
  Random random(1);
  BatchSpec spec;
  spec.rows = {50};
  spec.dims = {4};
  spec.feature_tables = {0};
  spec.bags = {3000};
  spec.longest = 0;
  TestBatch<std::int32_t> batch(spec, random);
  // Indices in three bags alone; the rest are empty.
  batch.spec.mean = true;
  std::fill(batch.offsets.begin(), batch.offsets.end(), 0);
  for (const auto& [bag, length] : {std::pair{40, 3}, {2000, 290}, {2999, 1}}) {
    for (std::size_t b = static_cast<std::size_t>(bag) + 1; b < batch.offsets.size(); ++b) {
      batch.offsets[b] += length;
    }
    for (int i = 0; i < length; ++i) batch.indices.push_back(i % 50);
  }
  batch.features[0].positions = batch.positions();
  auto tables = test_tables<float, RowwiseRMSprop>(spec, random);
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    const Segmented<std::int32_t> s(batch, tables);
    ASSERT_EQ(s.keys.size(), 294u);
    int in[3] = {};
    for (const auto& p : s.payloads) {
      const int which = p.out_row == 40 ? 0 : p.out_row == 2000 ? 1 : p.out_row == 2999 ? 2 : -1;
      ASSERT_GE(which, 0);
      ++in[which];
      const float lengths[3] = {3.0f, 290.0f, 1.0f};
      ASSERT_EQ(p.scale, 1.0f / lengths[which]);
    }
    EXPECT_EQ(in[0], 3);
    EXPECT_EQ(in[1], 290);
    EXPECT_EQ(in[2], 1);
  }
}

// Runs longer than a warp's 1024 entries, and of 64 parts and more.
TEST(DeviceSegment, LongRuns) {
  for (const std::int64_t n : {128, 129, 1023, 1024, 1025, 3000, 4096, 4097, 10000}) {
    BatchSpec spec;
    spec.rows = {2, 1, 2};
    spec.dims = {4, 4, 4};
    spec.feature_tables = {1, 0};
    spec.bags = {n, n / 3};
    spec.offsets = false;
    expect_segments<std::int32_t>(spec, static_cast<std::uint64_t>(n));
  }
}

// The sums over warps, where there are more of them than a block has threads.
TEST(DeviceSegment, CountsAreSummedInAnyNumber) {
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    for (const std::int64_t n : {0, 1, 31, 32, 33, 64, 65, 1000}) {
      for (const int threads : {32, 64, 96}) {
        Random random(static_cast<std::uint64_t>(n));
        std::vector<device::RunCounts> counts, expected;
        device::RunCounts sum{};
        for (std::int64_t i = 0; i < n; ++i) {
          const auto some = [&] { return static_cast<std::int32_t>(random.below(1000)); };
          counts.push_back({some(), some(), some(), some()});
          expected.push_back(sum);
          sum = sum + counts.back();
        }
        device::RunCounts totals{-1, -1, -1, -1};
        device::Report report{};
        report.found = device::kNothing;
        device::Queue queue(nullptr);
        queue.run(device::kernel::scan_counts<>, device::Launch{1, threads, 0}, counts.data(), n,
                  &totals, static_cast<const device::Report*>(&report));
        expected.push_back(sum);
        counts.push_back(totals);
        ASSERT_TRUE(same_bits(counts, expected)) << n << " counts, " << threads << " threads";
      }
    }
  }
}

// Keys of 32 bits up to 2^32 rows, of 64 beyond.
TEST(DeviceSegment, WideKeys) {
  const std::int64_t limit = std::int64_t{1} << 32;
  BatchSpec spec = shared_tables();
  const std::int64_t rows = 40 + 7 + 1000 + 3;
  expect_segments<std::int32_t>(spec, 1, limit - rows);
  expect_segments<std::int32_t>(spec, 2, limit - rows + 1);
  expect_segments<std::int64_t>(spec, 3, std::int64_t{1} << 45);
  spec.weighted = true;
  expect_segments<std::int64_t>(spec, 4, limit);

  device::Extent e;
  e.total_rows = limit;
  EXPECT_FALSE(device::wide_keys(e));
  EXPECT_EQ(device::key_bits(e), 32);
  e.total_rows = limit + 1;
  EXPECT_TRUE(device::wide_keys(e));
  EXPECT_EQ(device::key_bits(e), 33);
  for (const auto& [total, bits] : {std::pair{0, 1}, {1, 1}, {2, 1}, {3, 2}, {256, 8}, {257, 9}}) {
    e.total_rows = total;
    EXPECT_EQ(device::key_bits(e), bits);
  }
}

}  // namespace
}  // namespace coldrow_test
