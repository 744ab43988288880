// From a batch of indices to sorted runs of equal rows: one sort per table.
//
// Sorted apart, a table's entries need no more passes than its own rows ask for, and lie in the cache
// while they are moved. The sort is stable: duplicates keep the order of the batch, and their
// gradients are summed in it. It is a radix sort, least significant digit first, and its first pass
// makes the entries.
#pragma once

#include "../table/batch.hpp"
#include "parallel.hpp"

COLDROW_BEGIN

namespace host {

// What is sorted: the row touched, the output row whose gradient touches it, and what that gradient
// is multiplied by (per-sample weight or 1/length), which travels along.
struct PlainEntry {
  using key_type = std::uint32_t;
  std::uint32_t key;
  std::uint32_t out_row;
  static constexpr float scale = 1.0f;
};
struct ScaledEntry {
  using key_type = std::uint32_t;
  std::uint32_t key;
  std::uint32_t out_row;
  float scale;
};
// For a table of more than 2^32 rows.
struct WideEntry {
  using key_type = std::uint64_t;
  std::uint64_t key;
  std::uint32_t out_row;
  float scale;
};

inline constexpr int kDigits = 1 << kDigitBits;
inline constexpr int kMaxPasses = 6;                                         // over keys of 63 bits
inline constexpr std::int64_t kCounts = std::int64_t{kMaxPasses} * kDigits;  // a thread's counters
inline constexpr std::int64_t kMaxPositions = INT32_MAX;

// Bits that tell `rows` rows apart.
inline int row_bits(std::int64_t rows) {
  int bits = 0;
  while (bits < 63 && (rows - 1) >> bits > 0) ++bits;
  return bits;
}

// Some features of a batch, their lookups counted through them from 0 on.
template <class Index>
struct Lookups {
  Batch<Index> batch;
  const Feature* features;
  int num_features;
  const std::int64_t* table_base =
      nullptr;  // added to an index to make its key, by table; null: nothing is

  std::int64_t count() const {
    std::int64_t n = 0;
    for (int f = 0; f < num_features; ++f) n += features[f].positions;
    return n;
  }

  // Calls f(feature, first key, p, end): positions [p, end) of one feature after the other.
  template <class F>
  COLDROW_HOST_INLINE void for_positions(std::int64_t lo, std::int64_t hi, const F& f) const {
    std::int64_t before = 0;
    for (int i = 0; i < num_features && before < hi; before += features[i++].positions) {
      const Feature& feature = features[i];
      const std::int64_t p = max_of<std::int64_t>(lo - before, 0);
      const std::int64_t end = min_of(hi - before, feature.positions);
      const std::int64_t base = table_base != nullptr ? table_base[feature.table] : 0;
      if (p < end) f(feature, base, feature.first_position + p, feature.first_position + end);
    }
  }

  // Calls f(key) for lookups [lo, hi).
  template <class F>
  COLDROW_HOST_INLINE void for_keys(std::int64_t lo, std::int64_t hi, const F& f) const {
    const Index* const indices = batch.indices;
    for_positions(lo, hi, [&](const Feature&, std::int64_t base, std::int64_t p, std::int64_t end) {
      for (; p < end; ++p) f(base + indices[p]);
    });
  }

  // Calls f(key, output row, scale) for lookups [lo, hi).
  template <class F>
  COLDROW_HOST_INLINE void for_each(std::int64_t lo, std::int64_t hi, const F& f) const {
    const Index *const indices = batch.indices, *const offsets = batch.offsets;
    const float* const weights = batch.pooled ? batch.per_sample_weights : nullptr;
    for_positions(lo, hi,
                  [&](const Feature& feature, std::int64_t base, std::int64_t p, std::int64_t end) {
                    if (!batch.pooled || offsets == nullptr) {
                      std::int64_t row = feature.first_row + (p - feature.first_position);
                      for (; p < end; ++p) {
                        f(base + indices[p], row++, weights != nullptr ? weights[p] : 1.0f);
                      }
                      return;
                    }
                    std::int64_t bag = feature.first_bag, after = bag + feature.bags;
                    while (after - bag > 1) {  // the last bag that begins at or before p
                      const std::int64_t middle = bag + (after - bag) / 2;
                      (static_cast<std::int64_t>(offsets[middle]) <= p ? bag : after) = middle;
                    }
                    for (; p < end; ++bag) {
                      const std::int64_t bag_begin = offsets[bag], bag_end = offsets[bag + 1];
                      const float bag_scale =
                          batch.mean ? 1.0f / static_cast<float>(bag_end - bag_begin) : 1.0f;
                      for (const std::int64_t stop = min_of(bag_end, end); p < stop; ++p) {
                        f(base + indices[p], bag, weights != nullptr ? weights[p] : bag_scale);
                      }
                    }
                  });
  }
};

// Makes the entries of some lookups, sorted by key: [n] of them, n the number of lookups. Keys are
// below 2^bits. entries, other: [n] each. counts: [threads * kCounts]. Returns where the
// sorted entries are: `entries` or `other`.
template <class Entry, class Index>
Entry* sort_lookups(const Lookups<Index>& lookups, int bits, int threads, Entry* entries,
                    Entry* other, std::uint32_t* counts) {
  using Key = typename Entry::key_type;
  const std::int64_t n = lookups.count();
  const auto make = [](std::int64_t key, std::int64_t out_row, float scale) {
    Entry e;
    e.key = static_cast<Key>(key);
    e.out_row = static_cast<std::uint32_t>(out_row);
    if constexpr (requires { e.scale = scale; }) e.scale = scale;
    return e;
  };
  if (n <= kInsertionSort) {  // (stable too)
    std::int64_t i = 0;
    lookups.for_each(0, n, [&](std::int64_t key, std::int64_t out_row, float scale) {
      const Entry e = make(key, out_row, scale);
      std::int64_t j = i++;
      for (; j > 0 && entries[j - 1].key > e.key; --j) entries[j] = entries[j - 1];
      entries[j] = e;
    });
    return entries;
  }
  const int passes = max_of(1, (bits + kDigitBits - 1) / kDigitBits);
  const int digit_bits = (bits + passes - 1) / passes;
  const auto mask = static_cast<std::uint32_t>((1 << digit_bits) - 1);
  const auto digit = [=](Key key, int pass) {
    return static_cast<std::uint32_t>(key >> (pass * digit_bits)) & mask;
  };
  const auto counts_of = [=](int part, int pass) {
    return counts + part * kCounts + pass * kDigits;
  };
  // One thread counts the digits of two passes in one go: they are the same in any order.
  const bool both = threads == 1 && passes == 2;
  Entry* from = nullptr;
  Entry* to = entries;
  const auto count_digits = [&](int part, int pass, std::int64_t lo, std::int64_t hi) {
    std::uint32_t* const count = counts_of(part, pass);
    std::uint32_t* const next = counts_of(part, 1);
    for (std::uint32_t d = 0; d <= mask; ++d) count[d] = 0;
    if (pass > 0) {
      for (std::int64_t i = lo; i < hi; ++i) ++count[digit(from[i].key, pass)];
      return;
    }
    // What is written is fetched meanwhile: scattered writes would each wait for memory.
    const Entry* first = entries + lo;
    const Entry* second = other + lo;
    const auto fetch_next = [&] {
      __builtin_prefetch(first++, 1, 3);
      if (passes > 1) __builtin_prefetch(second++, 1, 3);
    };
    if (both) {
      for (std::uint32_t d = 0; d <= mask; ++d) next[d] = 0;
      lookups.for_keys(lo, hi, [&](std::int64_t key) {
        fetch_next();
        ++count[digit(static_cast<Key>(key), 0)];
        ++next[digit(static_cast<Key>(key), 1)];
      });
      return;
    }
    lookups.for_keys(lo, hi, [&](std::int64_t key) {
      fetch_next();
      ++count[digit(static_cast<Key>(key), 0)];
    });
  };
  for (int pass = 0; pass < passes; ++pass) {
    if (pass == 0 || !both) {
      parallel(threads, [&](int part) {
        count_digits(part, pass, part_begin(n, part, threads), part_begin(n, part + 1, threads));
      });
    }
    std::uint32_t sum = 0;
    for (std::uint32_t d = 0; d <= mask; ++d) {
      for (int part = 0; part < threads; ++part) {
        std::uint32_t& count = counts_of(part, pass)[d];
        const std::uint32_t here = count;
        count = sum;
        sum += here;
      }
    }
    parallel(threads, [&](int part) {
      std::uint32_t* const next = counts_of(part, pass);
      const std::int64_t lo = part_begin(n, part, threads), hi = part_begin(n, part + 1, threads);
      if (pass == 0) {
        lookups.for_each(lo, hi, [&](std::int64_t key, std::int64_t out_row, float scale) {
          const Entry e = make(key, out_row, scale);
          to[next[digit(e.key, 0)]++] = e;
        });
        return;
      }
      for (std::int64_t i = lo; i < hi; ++i) {
        const Entry e = from[i];
        to[next[digit(e.key, pass)]++] = e;
      }
    });
    from = to;
    to = to == entries ? other : entries;
  }
  return from;
}

// The first i in [lo, hi) for which after(i), or hi; what follows one for which it holds is so too.
template <class F>
std::int64_t first_where(std::int64_t lo, std::int64_t hi, const F& after) {
  while (lo < hi) {
    const std::int64_t middle = lo + (hi - lo) / 2;
    if (after(middle)) {
      hi = middle;
    } else {
      lo = middle + 1;
    }
  }
  return lo;
}

// Where `part` begins when sorted entries are cut into `parts` without cutting a run of equal keys.
template <class Entry>
std::int64_t run_begin(const Entry* sorted, std::int64_t n, int part, int parts) {
  const std::int64_t i = part_begin(n, part, parts);
  if (i == 0 || i == n || sorted[i].key != sorted[i - 1].key) return i;
  return first_where(i, n, [&](std::int64_t j) { return sorted[j].key != sorted[i].key; });
}

// The runs of one part: [lo, cut), and, where the last of them is `hot` or longer, that one, [cut, hi).
// A run that is longer than a part is the last of one.
struct PartRuns {
  std::int64_t lo, cut, hi;
};
template <class Entry>
PartRuns part_runs(const Entry* sorted, std::int64_t n, int part, int parts, std::int64_t hot) {
  PartRuns r{run_begin(sorted, n, part, parts), 0, run_begin(sorted, n, part + 1, parts)};
  r.cut = r.hi;
  if (r.hi - r.lo >= hot) {
    const std::int64_t last = first_where(
        r.lo, r.hi, [&](std::int64_t j) { return sorted[j].key == sorted[r.hi - 1].key; });
    if (r.hi - last >= hot) r.cut = last;
  }
  return r;
}

}  // namespace host

COLDROW_END
