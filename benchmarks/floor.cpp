// The floor under an embedding step on this machine: the work that no implementation can leave
// out, written for three widths and one optimizer, with nothing else around it. cpu.py compiles it
// on the fly and calls it through ctypes. All tables of a workload lie in one array, one after
// another, and a "row" below counts through all of them. A "bag" counts table-major: b + table * B.

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace {

constexpr int kLanes = 16;
using Lane = float __attribute__((vector_size(kLanes * sizeof(float))));

// How many rows ahead of their use prefetches run, and into which cache: the best of those tried on Zen 4.
// Into L2, which waits for more lines at a time than L1; rows to update then go on to L1 shortly before.
constexpr int kReadAhead = 64;
constexpr int kUpdateAhead = 64;
constexpr int kUpdateSoon = 8;
template <int D>
constexpr int kGradAhead = 2048 / D;

struct Record {
  float momentum1;
  std::int32_t prev_iter;
};

template <int D>
inline void prefetch_to_l2(const float* row) {
  for (int d = 0; d < D; d += kLanes) __builtin_prefetch(row + d, 0, 2);
}

template <int D>
void forward(const float* weights, const std::int64_t* base, const std::int64_t* indices,
             const std::int64_t* offsets, int tables, int batch, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (std::int64_t bag = 0; bag < std::int64_t{tables} * batch; ++bag) {
    const std::int64_t table = bag / batch, b = bag % batch;
    // Looking past the end of a table reads the next one's ids: harmless for a prefetch, but the
    // batch's last ids are the end.
    const std::int64_t last = offsets[std::int64_t{tables} * batch] - 1;
    Lane sum[D / kLanes] = {};
    for (std::int64_t i = offsets[bag]; i < offsets[bag + 1]; ++i) {
      prefetch_to_l2<D>(weights + (base[table] + indices[std::min(i + kReadAhead, last)]) * D);
      auto row = reinterpret_cast<const Lane*>(weights + (base[table] + indices[i]) * D);
      for (int k = 0; k < D / kLanes; ++k) sum[k] += row[k];
    }
    auto to = reinterpret_cast<Lane*>(out + (b * tables + table) * D);
    for (int k = 0; k < D / kLanes; ++k) to[k] = sum[k];
  }
}

struct Scalars {
  float lr, eps, beta, alpha, min_shrinkage;
  std::int32_t step;
};

// Segments [first, last): rows[s] receives the gradients of source[start[s] .. start[s + 1]).
template <int D>
void update(float* weights, Record* state, const float* grad, const std::uint32_t* rows,
            const std::uint32_t* start, const std::uint32_t* source, std::int64_t first,
            std::int64_t last, std::uint32_t sources, const Scalars& p) {
  for (std::int64_t s = first; s < last; ++s) {
    const std::int64_t ahead = rows[std::min(s + kUpdateAhead, last - 1)];
    prefetch_to_l2<D>(weights + ahead * D);
    __builtin_prefetch(state + ahead, 0, 2);
    const std::int64_t soon = rows[std::min(s + kUpdateSoon, last - 1)];
    for (int d = 0; d < D; d += kLanes) __builtin_prefetch(weights + soon * D + d, 1);
    __builtin_prefetch(state + soon, 1);
    Lane sum[D / kLanes] = {};
    for (std::uint32_t i = start[s]; i < start[s + 1]; ++i) {
      prefetch_to_l2<D>(grad + std::size_t{source[std::min(i + kGradAhead<D>, sources - 1)]} * D);
      auto from = reinterpret_cast<const Lane*>(grad + std::size_t{source[i]} * D);
      for (int k = 0; k < D / kLanes; ++k) sum[k] += from[k];
    }
    Lane square = {};
    for (int k = 0; k < D / kLanes; ++k) square += sum[k] * sum[k];
    float mean = 0;
    for (int l = 0; l < kLanes; ++l) mean += square[l];

    Record& r = state[rows[s]];
    const float gap = r.prev_iter ? static_cast<float>(p.step - r.prev_iter) : 1.0f;
    r.momentum1 = p.beta * r.momentum1 + (1 - p.beta) * (mean / D);
    r.prev_iter = p.step;
    const float scale = p.lr / (std::sqrt(r.momentum1) + p.eps);
    const float fade = std::max(p.min_shrinkage, 1 - std::clamp(p.lr * p.alpha * gap, 0.0f, 1.0f));
    auto row = reinterpret_cast<Lane*>(weights + std::size_t{rows[s]} * D);
    for (int k = 0; k < D / kLanes; ++k) row[k] = fade * row[k] - scale * sum[k];
  }
}

template <int Passes>
std::uint64_t* radix_sort(const std::int64_t* base, const std::int64_t* indices,
                          const std::int64_t* offsets, int tables, int batch, std::uint64_t* from,
                          std::uint64_t* to, int digit) {
  std::uint32_t slot[Passes][1 << 11] = {};
  const std::uint64_t mask = (std::uint64_t{1} << digit) - 1;
  const auto digit_of = [=](std::uint64_t row, int p) { return row >> p * digit & mask; };

  // Counting reads the ids once; meanwhile the buffers, cold by now, are fetched for the scatter.
  for (int table = 0; table < tables; ++table) {
    const std::int64_t end = offsets[std::int64_t{table + 1} * batch];
    for (std::int64_t i = offsets[std::int64_t{table} * batch]; i < end; ++i) {
      if (i % 8 == 0) {
        __builtin_prefetch(from + i, 1);
        __builtin_prefetch(to + i, 1);
      }
      const auto row = static_cast<std::uint64_t>(base[table] + indices[i]);
      for (int p = 0; p < Passes; ++p) ++slot[p][digit_of(row, p)];
    }
  }
  for (auto& counts : slot) {
    std::uint32_t sum = 0;
    for (std::uint64_t d = 0; d <= mask; ++d) sum += std::exchange(counts[d], sum);
  }
  // The first scatter makes the pairs from the ids, the others move pairs.
  for (int table = 0; table < tables; ++table) {
    for (int b = 0; b < batch; ++b) {
      const std::int64_t bag = std::int64_t{table} * batch + b;
      const auto source = static_cast<std::uint32_t>(b * tables + table);
      const std::int64_t end = offsets[bag + 1];
      for (std::int64_t i = offsets[bag]; i < end; ++i) {
        const auto row = static_cast<std::uint64_t>(base[table] + indices[i]);
        to[slot[0][digit_of(row, 0)]++] = row << 32 | source;
      }
    }
  }
  const std::int64_t ids = offsets[std::int64_t{tables} * batch];
  for (int p = 1; p < Passes; ++p) {
    std::swap(from, to);
    for (std::int64_t i = 0; i < ids; ++i) {
      to[slot[p][digit_of(from[i] >> 32, p)]++] = from[i];
    }
  }
  return to;
}

template <typename Body>
int with_dim(int dim, Body body) {
  if (dim == 16) return body.template operator()<16>(), 0;
  if (dim == 64) return body.template operator()<64>(), 0;
  if (dim == 128) return body.template operator()<128>(), 0;
  return 1;
}

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t in_huge_pages(std::size_t bytes) {
  return (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

}  // namespace

extern "C" {

// Zeroed memory in 4 KiB pages, or in 2 MiB pages where the kernel grants them.
void* floor_allocate(std::size_t bytes, int huge) {
  bytes = in_huge_pages(bytes);
  void* raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  auto address = (reinterpret_cast<std::uintptr_t>(raw) + kHugePage - 1) & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(address), bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return reinterpret_cast<void*>(address);
}

void floor_release(void* address, std::size_t bytes) { munmap(address, in_huge_pages(bytes)); }

int floor_forward(const float* weights, const std::int64_t* base, const std::int64_t* indices,
                  const std::int64_t* offsets, int tables, int batch, int dim, float* out,
                  int threads) {
  return with_dim(dim, [&]<int D>() {
    forward<D>(weights, base, indices, offsets, tables, batch, out, threads);
  });
}

// Sorts (row, gradient row) pairs by row, stable, in as few passes of at most 11 bits as rows need:
// row in the upper half of a word, gradient row in the lower. Returns the one of the two buffers,
// each [ids], that holds the result. On one thread.
std::uint64_t* floor_sort(const std::int64_t* base, const std::int64_t* indices,
                          const std::int64_t* offsets, int tables, int batch, std::uint64_t* pairs,
                          std::uint64_t* spare) {
  const int bits = 64 - __builtin_clzll(static_cast<std::uint64_t>(base[tables]));
  const auto sort = [&]<int Passes>() {
    return radix_sort<Passes>(base, indices, offsets, tables, batch, pairs, spare,
                              (bits + Passes - 1) / Passes);
  };
  if (bits <= 11) return sort.template operator()<1>();
  if (bits <= 22) return sort.template operator()<2>();
  return sort.template operator()<3>();
}

// One step of row-wise RMSprop with FBGEMM's Adaptive Regularization. Threads take segments of
// about equal cost; a segment is never split.
int floor_update(float* weights, void* state, const float* grad, const std::uint32_t* rows,
                 const std::uint32_t* start, const std::uint32_t* source, std::int64_t segments,
                 int dim, float lr, float eps, float beta, float alpha, float min_shrinkage,
                 std::int32_t step, int threads) {
  const Scalars p{lr, eps, beta, alpha, min_shrinkage, step};
  const auto cost = [&](std::int64_t s) { return start[s] + 4 * s; };
  const auto split = [&](int part) {
    std::int64_t low = 0, high = segments;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (cost(middle) * threads < cost(segments) * part) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  return with_dim(dim, [&]<int D>() {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
      update<D>(weights, static_cast<Record*>(state), grad, rows, start, source, split(part),
                split(part + 1), start[segments], p);
    }
  });
}
}
