// From a batch of indices to sorted runs of equal rows: one sort over all tables.
//
// Rows of all tables are numbered through (row + table_base[table]), so the sort is by table, then
// row. The sort is stable: duplicates keep the order of the batch, and their gradients are summed
// in it. It is a radix sort (least significant digit first) over no more bits than the rows need.
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
// For tables of 2^32 rows and more in all.
struct WideEntry {
  using key_type = std::uint64_t;
  std::uint64_t key;
  std::uint32_t out_row;
  float scale;
};

inline constexpr int kDigitBits = 11;
inline constexpr int kDigits = 1 << kDigitBits;
inline constexpr std::int64_t kMaxPositions = INT32_MAX;

// Writes one entry per position, in order.
template <class Entry, class Index>
void make_entries(const Batch<Index>& batch, const std::int64_t* table_base, int threads,
                  Entry* entries) {
  parallel(threads, [&](int part) {
    for (std::int32_t f = 0; f < batch.num_features; ++f) {
      const Feature& feature = batch.features[f];
      const std::int64_t base = table_base[feature.table];
      const auto put = [&](std::int64_t p, std::int64_t out_row, float scale) {
        Entry& e = entries[p];
        e.key = static_cast<typename Entry::key_type>(base + batch.indices[p]);
        e.out_row = static_cast<std::uint32_t>(out_row);
        if constexpr (requires { e.scale = scale; }) e.scale = scale;
      };
      if (!batch.pooled || batch.offsets == nullptr) {
        const std::int64_t lo = part_begin(feature.positions, part, threads);
        const std::int64_t hi = part_begin(feature.positions, part + 1, threads);
        for (std::int64_t i = lo; i < hi; ++i) {
          const std::int64_t p = feature.first_position + i;
          const bool weighted = batch.pooled && batch.per_sample_weights != nullptr;
          put(p, feature.first_row + i, weighted ? batch.per_sample_weights[p] : 1.0f);
        }
        continue;
      }
      const std::int64_t lo = part_begin(feature.bags, part, threads);
      const std::int64_t hi = part_begin(feature.bags, part + 1, threads);
      for (std::int64_t b = feature.first_bag + lo; b < feature.first_bag + hi; ++b) {
        const std::int64_t begin = batch.offsets[b];
        const std::int64_t end = batch.offsets[b + 1];
        const float bag_scale = batch.mean ? 1.0f / static_cast<float>(end - begin) : 1.0f;
        for (std::int64_t p = begin; p < end; ++p) {
          put(p, b, batch.per_sample_weights != nullptr ? batch.per_sample_weights[p] : bag_scale);
        }
      }
    }
  });
}

// Sorts `entries` by key. Keys are below 2^bits. counts: [threads * kDigits]. Returns where the
// sorted entries are: `entries` or `other`.
template <class Entry>
Entry* sort_entries(Entry* entries, Entry* other, std::int64_t n, int bits, int threads,
                    std::uint32_t* counts) {
  if (n <= 48) {  // insertion sort: stable, and quicker than clearing the counters
    for (std::int64_t i = 1; i < n; ++i) {
      const Entry e = entries[i];
      std::int64_t j = i;
      for (; j > 0 && entries[j - 1].key > e.key; --j) entries[j] = entries[j - 1];
      entries[j] = e;
    }
    return entries;
  }
  const int passes = (bits + kDigitBits - 1) / kDigitBits;
  const int digit_bits = passes == 0 ? 0 : (bits + passes - 1) / passes;
  const int digits = 1 << digit_bits;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit_bits;
    const auto mask = static_cast<std::uint32_t>(digits - 1);
    const Entry* const from = entries;
    Entry* const to = other;
    parallel(threads, [=](int part) {
      std::uint32_t* const count = counts + part * kDigits;
      for (int d = 0; d < digits; ++d) count[d] = 0;
      const std::int64_t hi = part_begin(n, part + 1, threads);
      for (std::int64_t i = part_begin(n, part, threads); i < hi; ++i) {
        // The first pass is the first to touch `to`; scattered writes would each wait for memory.
        if (pass == 0) __builtin_prefetch(to + i, 1, 3);
        ++count[static_cast<std::uint32_t>(from[i].key >> shift) & mask];
      }
    });
    std::uint32_t sum = 0;
    for (int d = 0; d < digits; ++d) {
      for (int part = 0; part < threads; ++part) {
        std::uint32_t& count = counts[part * kDigits + d];
        const std::uint32_t here = count;
        count = sum;
        sum += here;
      }
    }
    parallel(threads, [=](int part) {
      std::uint32_t* const next = counts + part * kDigits;
      const std::int64_t hi = part_begin(n, part + 1, threads);
      for (std::int64_t i = part_begin(n, part, threads); i < hi; ++i) {
        const Entry e = from[i];
        to[next[static_cast<std::uint32_t>(e.key >> shift) & mask]++] = e;
      }
    });
    Entry* const swap = entries;
    entries = other;
    other = swap;
  }
  return entries;
}

// Where `part` begins when sorted entries are cut into `parts` without cutting a run of equal keys.
template <class Entry>
std::int64_t run_begin(const Entry* sorted, std::int64_t n, int part, int parts) {
  std::int64_t i = part_begin(n, part, parts);
  while (i > 0 && i < n && sorted[i].key == sorted[i - 1].key) ++i;
  return i;
}

}  // namespace host

COLDROW_END
