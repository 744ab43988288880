#include <algorithm>
#include <coldrow/host/segment.hpp>

#include "../support.hpp"
#include "batches.hpp"

namespace coldrow_test {
namespace {

using host::PlainEntry;
using host::ScaledEntry;
using host::WideEntry;

template <class Entry>
constexpr bool kHasScale = requires(Entry e) { e.scale = 1.0f; };

template <class Entry>
class Segment : public ::testing::Test {};
struct EntryName {
  template <class E>
  static std::string GetName(int) {
    return std::same_as<E, PlainEntry> ? "plain" : std::same_as<E, ScaledEntry> ? "scaled" : "wide";
  }
};
using Entries = ::testing::Types<PlainEntry, ScaledEntry, WideEntry>;
TYPED_TEST_SUITE(Segment, Entries, EntryName);

template <class Entry>
bool equal(const Entry& a, const Entry& b) {
  return a.key == b.key && a.out_row == b.out_row && a.scale == b.scale;
}

// Keys below 2^bits, at most 8 different ones if few.
std::vector<std::int64_t> keys(std::size_t n, int bits, bool few, Random& random) {
  std::vector<std::int64_t> out(n);
  for (std::int64_t& key : out) {
    auto k = bits == 0 ? 0 : random.bits64() >> (64 - bits);
    if (few) k -= k % (std::uint64_t{1} << (bits > 3 ? bits - 3 : 0));
    key = static_cast<std::int64_t>(k);
  }
  return out;
}

template <class Entry>
Entry entry(std::int64_t key, std::int64_t out_row, float scale) {
  Entry e;
  e.key = static_cast<typename Entry::key_type>(key);
  e.out_row = static_cast<std::uint32_t>(out_row);
  if constexpr (kHasScale<Entry>) e.scale = scale;
  return e;
}

// Every key a bag of its own, in two features; what travels along tells entries of equal keys apart.
template <class Entry>
void expect_sorted(std::size_t n, int bits, bool few, Random& random) {
  const std::vector<std::int64_t> input = keys(n, bits, few, random);
  std::vector<float> weights(n);
  std::vector<Entry> expected;
  for (std::size_t i = 0; i < n; ++i) {
    weights[i] = static_cast<float>(i % 1000) + 0.5f;
    expected.push_back(entry<Entry>(input[i], static_cast<std::int64_t>(i), weights[i]));
  }
  std::stable_sort(expected.begin(), expected.end(),
                   [](const Entry& a, const Entry& b) { return a.key < b.key; });
  const auto size = static_cast<std::int64_t>(n), half = size / 2;
  const Feature features[] = {{0, 1, 0, half, 0, half, 0, 0, 1},
                              {0, 1, half, size - half, half, size - half, half, half, 1}};
  const Batch<std::int64_t> batch{input.data(), nullptr, size,          size, features, 2,
                                  true,         false,   weights.data()};
  for (const int threads : {1, 2, 3}) {
    std::vector<Entry> a(n), b(n);
    // Whatever the counters held before.
    std::vector<std::uint32_t> counts(static_cast<std::size_t>(threads * host::kCounts), 12345u);
    const Entry* sorted = host::sort_lookups(host::Lookups<std::int64_t>{batch, features, 2}, bits,
                                             threads, a.data(), b.data(), counts.data());
    ASSERT_TRUE(sorted == a.data() || sorted == b.data());
    for (std::size_t i = 0; i < n; ++i) {
      ASSERT_TRUE(equal(sorted[i], expected[i]))
          << "n " << n << ", bits " << bits << ", threads " << threads << ", at " << i;
    }
  }
}

TYPED_TEST(Segment, SortIsStableForAnyNumberOfBits) {
  Random random(1);
  const int most = sizeof(typename TypeParam::key_type) == 4 ? 32 : 62;
  for (int bits = 0; bits <= most; ++bits) {
    for (const bool few : {false, true}) {
      expect_sorted<TypeParam>(49, bits, few, random);
      expect_sorted<TypeParam>(1000, bits, few, random);
    }
  }
}

TYPED_TEST(Segment, SortIsStableForAnyLength) {
  Random random(2);
  for (const std::size_t n : {0u, 1u, 2u, 3u, 47u, 48u, 49u, 50u, 2049u, 100000u}) {
    for (const int bits : {1, 9, 20, 32}) {
      expect_sorted<TypeParam>(n, bits, false, random);
      expect_sorted<TypeParam>(n, bits, true, random);
    }
  }
}

TEST(RowBits, AreEnoughAndNoMore) {
  EXPECT_EQ(host::row_bits(0), 0);
  EXPECT_EQ(host::row_bits(1), 0);
  EXPECT_EQ(host::row_bits(2), 1);
  EXPECT_EQ(host::row_bits(3), 2);
  EXPECT_EQ(host::row_bits(4), 2);
  EXPECT_EQ(host::row_bits(5), 3);
  EXPECT_EQ(host::row_bits(std::int64_t{1} << 32), 32);
  EXPECT_EQ(host::row_bits((std::int64_t{1} << 32) + 1), 33);
  EXPECT_EQ(host::row_bits(INT64_MAX), 63);
}

TYPED_TEST(Segment, PartsNeverCutARun) {
  Random random(3);
  for (const std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{10}, std::size_t{500}}) {
    for (const int bits : {0, 2, 5, 20}) {
      std::vector<TypeParam> sorted;
      for (const std::int64_t key : keys(n, bits, false, random)) {
        sorted.push_back(entry<TypeParam>(key, 0, 1.0f));
      }
      std::stable_sort(sorted.begin(), sorted.end(),
                       [](const auto& a, const auto& b) { return a.key < b.key; });
      const auto size = static_cast<std::int64_t>(n);
      for (const int parts : {1, 2, 3, 8, 600}) {
        EXPECT_EQ(host::run_begin(sorted.data(), size, 0, parts), 0);
        EXPECT_EQ(host::run_begin(sorted.data(), size, parts, parts), size);
        std::int64_t before = 0;
        for (int part = 1; part < parts; ++part) {
          const std::int64_t begin = host::run_begin(sorted.data(), size, part, parts);
          ASSERT_GE(begin, before);
          before = begin;
          if (begin == 0 || begin == size) continue;
          ASSERT_NE(sorted[static_cast<std::size_t>(begin)].key,
                    sorted[static_cast<std::size_t>(begin) - 1].key);
        }
      }
    }
  }
}

// Parts and the hot runs at their ends together are everything, once, and no long run is in a part.
TYPED_TEST(Segment, HotRunsAreSetApart) {
  Random random(6);
  for (int round = 0; round < 300; ++round) {
    std::vector<TypeParam> sorted;
    while (sorted.size() < 2000) {
      const std::int64_t length = random.below(4) == 0 ? random.below(900) : 1 + random.below(3);
      const auto key = static_cast<std::int64_t>(sorted.size());
      for (std::int64_t i = 0; i < length; ++i) sorted.push_back(entry<TypeParam>(key, 0, 1.0f));
    }
    const auto n = static_cast<std::int64_t>(sorted.size());
    const auto key = [&](std::int64_t i) { return sorted[static_cast<std::size_t>(i)].key; };
    const int parts = 1 + static_cast<int>(random.below(30));
    const std::int64_t hot = n / parts + 2 + random.below(400);
    std::int64_t before = 0;
    for (int part = 0; part < parts; ++part) {
      const host::PartRuns r = host::part_runs(sorted.data(), n, part, parts, hot);
      ASSERT_EQ(r.lo, before);
      ASSERT_LE(r.lo, r.cut);
      ASSERT_LE(r.cut, r.hi);
      before = r.hi;
      if (r.cut < r.hi) {
        ASSERT_GE(r.hi - r.cut, hot);
        ASSERT_EQ(key(r.cut), key(r.hi - 1));
        ASSERT_TRUE(r.cut == 0 || key(r.cut) != key(r.cut - 1));
      }
      std::int64_t begin = r.lo;
      for (std::int64_t i = r.lo; i < r.cut; ++i) {
        if (key(i) != key(begin)) begin = i;
        ASSERT_LT(i - begin + 1, hot);
      }
      ASSERT_TRUE(r.hi == n || key(r.hi) != key(r.hi - 1));
    }
    ASSERT_EQ(before, n);
  }
}

// for_each() and for_keys() against the list of lookups that the batch is by definition, in pieces cut
// anywhere; then each table's lookups sorted apart.
template <class Entry, class Index>
void expect_entries(const BatchSpec& spec, const std::vector<std::int64_t>* base = nullptr) {
  Random random(4);
  const TestBatch<Index> batch(spec, random);
  const std::vector<std::int64_t>& table_base = base != nullptr ? *base : batch.table_base;
  std::vector<Entry> expected;
  for (const Lookup& l : batch.lookups) {
    expected.push_back(entry<Entry>(table_base[static_cast<std::size_t>(l.table)] + l.row,
                                    l.out_row, static_cast<float>(l.scale)));
  }
  const auto n = static_cast<std::int64_t>(expected.size());
  const host::Lookups<Index> all = batch.all(table_base.data());
  ASSERT_EQ(all.count(), n);
  for (const std::int64_t piece : {n + 1, std::int64_t{1}, std::int64_t{7}}) {
    std::vector<Entry> made;
    std::vector<std::int64_t> made_keys;
    for (std::int64_t lo = 0; lo < n; lo += piece) {
      const std::int64_t hi = std::min(n, lo + piece);
      all.for_each(lo, hi, [&](std::int64_t key, std::int64_t out_row, float scale) {
        made.push_back(entry<Entry>(key, out_row, scale));
      });
      all.for_keys(lo, hi, [&](std::int64_t key) { made_keys.push_back(key); });
    }
    ASSERT_EQ(made.size(), expected.size());
    for (std::size_t i = 0; i < made.size(); ++i) {
      ASSERT_TRUE(equal(made[i], expected[i])) << "piece " << piece << ", at " << i;
      ASSERT_EQ(made_keys[i], static_cast<std::int64_t>(made[i].key));
    }
  }

  for (std::size_t t = 0; t < spec.rows.size(); ++t) {
    std::vector<Feature> features;
    for (const Feature& f : batch.features) {
      if (f.table == static_cast<std::int32_t>(t)) features.push_back(f);
    }
    std::vector<Entry> of_table;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const Lookup& l = batch.lookups[i];
      if (l.table == static_cast<std::int64_t>(t)) {
        of_table.push_back(entry<Entry>(l.row, l.out_row, static_cast<float>(l.scale)));
      }
    }
    std::stable_sort(of_table.begin(), of_table.end(),
                     [](const Entry& a, const Entry& b) { return a.key < b.key; });
    for (const int threads : {1, 2, 7}) {
      std::vector<Entry> a(of_table.size()), b(a);
      std::vector<std::uint32_t> counts(static_cast<std::size_t>(threads * host::kCounts));
      const host::Lookups<Index> lookups{batch.view(), features.data(),
                                         static_cast<int>(features.size())};
      const Entry* sorted = host::sort_lookups(lookups, host::row_bits(spec.rows[t]), threads,
                                               a.data(), b.data(), counts.data());
      for (std::size_t i = 0; i < of_table.size(); ++i) {
        ASSERT_TRUE(equal(sorted[i], of_table[i])) << "table " << t << ", at " << i;
      }
    }
  }
}

TEST(Lookups, SumPooling) {
  expect_entries<PlainEntry, std::int32_t>(shared_tables());
  expect_entries<PlainEntry, std::int64_t>(shared_tables());
  expect_entries<ScaledEntry, std::int64_t>(shared_tables());
}

TEST(Lookups, MeanPoolingCarriesOneOverLength) {
  BatchSpec spec = shared_tables();
  spec.mean = true;
  expect_entries<ScaledEntry, std::int32_t>(spec);
  expect_entries<WideEntry, std::int64_t>(spec);
}

TEST(Lookups, WeightsTravelAlong) {
  BatchSpec spec = shared_tables();
  spec.weighted = true;
  expect_entries<ScaledEntry, std::int32_t>(spec);
  expect_entries<WideEntry, std::int64_t>(spec);
}

TEST(Lookups, Unpooled) {
  BatchSpec spec = shared_tables();
  spec.pooled = false;
  expect_entries<PlainEntry, std::int64_t>(spec);
  expect_entries<WideEntry, std::int32_t>(spec);
}

TEST(Lookups, WithoutOffsetsEveryIndexIsABag) {
  BatchSpec spec = shared_tables();
  spec.offsets = false;
  expect_entries<PlainEntry, std::int64_t>(spec);
  spec.mean = true;
  expect_entries<ScaledEntry, std::int64_t>(spec);
}

TEST(Lookups, WeightsTravelAlongWithoutOffsets) {
  BatchSpec spec = shared_tables();
  spec.offsets = false;
  spec.weighted = true;
  expect_entries<ScaledEntry, std::int64_t>(spec);
}

TEST(Lookups, WideKeysPass32Bits) {
  const std::vector<std::int64_t> base = {0, 3000000000, 5000000000, 1000000000000};
  expect_entries<WideEntry, std::int64_t>(shared_tables(), &base);
}

TEST(Lookups, EmptyBatch) {
  BatchSpec spec = shared_tables();
  spec.bags.assign(spec.bags.size(), 0);
  expect_entries<PlainEntry, std::int64_t>(spec);
}

}  // namespace
}  // namespace coldrow_test
