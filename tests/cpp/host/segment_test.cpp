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

// Keys below 2^bits; out_row tells entries of equal keys apart.
template <class Entry>
std::vector<Entry> entries(std::size_t n, int bits, bool few, Random& random) {
  std::vector<Entry> out(n);
  for (std::size_t i = 0; i < n; ++i) {
    std::uint64_t key = bits == 0 ? 0 : random.bits64() >> (64 - bits);
    if (few) key -= key % (std::uint64_t{1} << (bits > 3 ? bits - 3 : 0));  // at most 8 keys
    out[i].key = static_cast<typename Entry::key_type>(key);
    out[i].out_row = static_cast<std::uint32_t>(i);
    if constexpr (kHasScale<Entry>) out[i].scale = static_cast<float>(i % 1000) + 0.5f;
  }
  return out;
}

template <class Entry>
void expect_sorted(std::size_t n, int bits, bool few, Random& random) {
  const std::vector<Entry> input = entries<Entry>(n, bits, few, random);
  std::vector<Entry> expected = input;
  std::stable_sort(expected.begin(), expected.end(),
                   [](const Entry& a, const Entry& b) { return a.key < b.key; });
  for (const int threads : {1, 2, 3}) {
    std::vector<Entry> a = input, b(n);
    // Whatever the counters held before.
    std::vector<std::uint32_t> counts(static_cast<std::size_t>(threads * host::kDigits), 12345u);
    const Entry* sorted = host::sort_entries(a.data(), b.data(), static_cast<std::int64_t>(n), bits,
                                             threads, counts.data());
    ASSERT_TRUE(sorted == a.data() || sorted == b.data());
    for (std::size_t i = 0; i < n; ++i) {
      ASSERT_TRUE(equal(sorted[i], expected[i]))
          << "n " << n << ", bits " << bits << ", threads " << threads << ", at " << i;
    }
  }
}

TYPED_TEST(Segment, SortIsStableForAnyNumberOfBits) {
  Random random(1);
  const int most = sizeof(typename TypeParam::key_type) == 4 ? 32 : 40;
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

TYPED_TEST(Segment, PartsNeverCutARun) {
  Random random(3);
  for (const std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{10}, std::size_t{500}}) {
    for (const int bits : {0, 2, 5, 20}) {
      auto sorted = entries<TypeParam>(n, bits, false, random);
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

// make_entries against the list of lookups that the batch is by definition.
template <class Entry, class Index>
void expect_entries(const BatchSpec& spec, const std::vector<std::int64_t>* base = nullptr) {
  Random random(4);
  const TestBatch<Index> batch(spec, random);
  const std::vector<std::int64_t>& table_base = base != nullptr ? *base : batch.table_base;
  for (const int threads : {1, 2, 3, 7}) {
    std::vector<Entry> made(batch.indices.size(), Entry{});
    host::make_entries(batch.view(), table_base.data(), threads, made.data());
    ASSERT_EQ(batch.lookups.size(), made.size());
    for (const Lookup& l : batch.lookups) {
      const Entry& e = made[static_cast<std::size_t>(l.position)];
      ASSERT_EQ(static_cast<std::int64_t>(e.key),
                table_base[static_cast<std::size_t>(l.table)] + l.row);
      ASSERT_EQ(e.out_row, static_cast<std::uint32_t>(l.out_row));
      const float scale = kHasScale<Entry> ? static_cast<float>(l.scale) : 1.0f;
      ASSERT_EQ(e.scale, scale) << l.position;
    }
  }
}

TEST(MakeEntries, SumPooling) {
  expect_entries<PlainEntry, std::int32_t>(shared_tables());
  expect_entries<PlainEntry, std::int64_t>(shared_tables());
  expect_entries<ScaledEntry, std::int64_t>(shared_tables());
}

TEST(MakeEntries, MeanPoolingCarriesOneOverLength) {
  BatchSpec spec = shared_tables();
  spec.mean = true;
  expect_entries<ScaledEntry, std::int32_t>(spec);
  expect_entries<WideEntry, std::int64_t>(spec);
}

TEST(MakeEntries, WeightsTravelAlong) {
  BatchSpec spec = shared_tables();
  spec.weighted = true;
  expect_entries<ScaledEntry, std::int32_t>(spec);
  expect_entries<WideEntry, std::int64_t>(spec);
}

TEST(MakeEntries, Unpooled) {
  BatchSpec spec = shared_tables();
  spec.pooled = false;
  expect_entries<PlainEntry, std::int64_t>(spec);
  expect_entries<WideEntry, std::int32_t>(spec);
}

TEST(MakeEntries, WithoutOffsetsEveryIndexIsABag) {
  BatchSpec spec = shared_tables();
  spec.offsets = false;
  expect_entries<PlainEntry, std::int64_t>(spec);
  spec.mean = true;
  expect_entries<ScaledEntry, std::int64_t>(spec);
}

TEST(MakeEntries, WeightsTravelAlongWithoutOffsets) {
  BatchSpec spec = shared_tables();
  spec.offsets = false;
  spec.weighted = true;
  expect_entries<ScaledEntry, std::int64_t>(spec);
}

TEST(MakeEntries, WideKeysPass32Bits) {
  const std::vector<std::int64_t> base = {0, 3000000000, 5000000000, 1000000000000};
  expect_entries<WideEntry, std::int64_t>(shared_tables(), &base);
}

TEST(MakeEntries, EmptyBatch) {
  BatchSpec spec = shared_tables();
  spec.bags.assign(spec.bags.size(), 0);
  expect_entries<PlainEntry, std::int64_t>(spec);
}

}  // namespace
}  // namespace coldrow_test
