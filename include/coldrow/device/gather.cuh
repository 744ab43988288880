// The weighted sum of rows that lie anywhere: what a lookup is of weights and an update of gradients.
//
// A tile's lanes first fetch one term each (where its row is, what it is multiplied by), which costs
// them one round trip to memory for up to 32 terms, and hand them round. Then they load several rows'
// columns before the first is used, 16 bytes per lane and access. Each column is summed by one lane in
// the order of the terms with one fma per term: the bits are those of the host's sums.
#pragma once

#include "batch.cuh"
#include "group.cuh"

COLDROW_BEGIN

namespace device {

struct Term {
  std::int64_t row;  // where its column 0 is, in elements from a base that all terms share
  float scale;
};

// 16 bytes of neighbouring values as they lie in memory.
template <Numeric T>
struct Packed {
  static constexpr int count = 16 / static_cast<int>(sizeof(T));
  Words<16> words;

  // Columns [c, c + count) of a row of dim columns; those from dim on read as zero. Aligned: all of
  // them exist, and they are one access.
  template <bool Aligned>
  __device__ __forceinline__ void load(const T* row, int c, int dim) {
    if constexpr (Aligned) {
      words = *reinterpret_cast<const Words<16>*>(row + c);
    } else {
      words = {};
      COLDROW_LANES
      for (int k = 0; k < count; ++k) {
        if (c + k >= dim) continue;
        if constexpr (sizeof(T) == 4) {
          words.word[k] = bit_cast<std::uint32_t>(row[c + k]);
        } else {
          words.word[k / 2] |= static_cast<std::uint32_t>(row[c + k].bits) << (k % 2 * 16);
        }
      }
    }
  }
  __device__ __forceinline__ float value(int k) const {
    return Convert<T>::widen(value_in<T>(words, k));
  }
};

// Columns that a lane sums, Vectors * 16 bytes of them, and their sums so far.
template <int Vectors, bool Aligned, Numeric T>
struct ColumnSums {
  static constexpr int K = Packed<T>::count;
  int column[Vectors];  // of a lane that has none there: 0, which it reads for nothing
  float sum[Vectors][K];

  // Adds terms [j, j + Terms) of those that the tile's lanes hold. All are loaded before the first is
  // used; nothing here depends on a condition, so that every value is in a register of its own for
  // no longer than it is needed.
  template <int Terms, class G>
  __device__ __forceinline__ void add(const G& tile, const T* base, const Term& mine, int j,
                                      int dim) {
    Packed<T> loaded[Terms][Vectors];
    float scale[Terms];
    COLDROW_LANES
    for (int u = 0; u < Terms; ++u) {
      const T* const row = base + tile.from(mine.row, j + u);
      scale[u] = tile.from(mine.scale, j + u);
      COLDROW_LANES
      for (int v = 0; v < Vectors; ++v) loaded[u][v].template load<Aligned>(row, column[v], dim);
    }
    COLDROW_LANES
    for (int u = 0; u < Terms; ++u) {
      COLDROW_LANES
      for (int v = 0; v < Vectors; ++v) {
        COLDROW_LANES
        for (int k = 0; k < K; ++k) {
          sum[v][k] = math::fma(scale[u], loaded[u][v].value(k), sum[v][k]);
        }
      }
    }
  }
  // Adds terms [j, n), 2 * Terms, Terms, ... at a time.
  template <int Terms, class G>
  __device__ __forceinline__ void add_rest(const G& tile, const T* base, const Term& mine, int j,
                                           int n, int dim) {
    if constexpr (Terms > 0) {
      if (n - j >= Terms) {
        add<Terms>(tile, base, mine, j, dim);
        j += Terms;
      }
      add_rest<Terms / 2>(tile, base, mine, j, n, dim);
    }
  }
};

// Sums columns [column, ...) of `count` terms, Vectors * 16 bytes of them per lane, Unroll terms at
// a time, and gives emit(c, values, valid) each block of columns [c, c + valid).
template <int Vectors, int Unroll, bool Aligned, Numeric T, class G, class Fetch, class Emit>
__device__ __forceinline__ void sum_columns(const G& tile, const T* base, const Fetch& fetch,
                                            std::int64_t count, int column, int dim,
                                            const Emit& emit) {
  constexpr int K = Packed<T>::count;
  const int rank = tile.rank();
  const int lanes = tile.size();
  ColumnSums<Vectors, Aligned, T> sums;
  COLDROW_LANES
  for (int v = 0; v < Vectors; ++v) {
    const int c = column + (v * lanes + rank) * K;
    sums.column[v] = c < dim ? c : 0;
    COLDROW_LANES
    for (int k = 0; k < K; ++k) sums.sum[v][k] = 0.0f;
  }
  COLDROW_ROLLED
  for (std::int64_t first = 0; first < count; first += lanes) {
    const int n = static_cast<int>(min_of<std::int64_t>(lanes, count - first));
    Term mine{0, 0.0f};
    if (rank < n) mine = fetch(first + rank);
    int j = 0;
    COLDROW_ROLLED
    for (; n - j >= Unroll; j += Unroll) sums.template add<Unroll>(tile, base, mine, j, dim);
    sums.template add_rest<Unroll / 2>(tile, base, mine, j, n, dim);
  }
  COLDROW_LANES
  for (int v = 0; v < Vectors; ++v) {
    const int c = column + (v * lanes + rank) * K;
    if (c < dim) emit(c, sums.sum[v], min_of(K, dim - c));
  }
}

// All columns of rows counted from `data`. aligned: every row begins at a multiple of 16 bytes and is as long as one. Wide rows go
// through the terms once for each 2 * 16 bytes per lane.
template <Numeric T, class G, class Fetch, class Emit>
__device__ __forceinline__ void sum_rows(const G& tile, bool aligned, const void* data,
                                         const Fetch& fetch, std::int64_t count, int dim,
                                         const Emit& emit) {
  const auto* const base = static_cast<const T*>(data);
  const int step = tile.size() * Packed<T>::count;
  int column = 0;
  if (!aligned) {
    COLDROW_ROLLED
    for (; column < dim; column += step) {
      sum_columns<1, 2, false, T>(tile, base, fetch, count, column, dim, emit);
    }
    return;
  }
  COLDROW_ROLLED
  for (; dim - column > step; column += 2 * step) {
    sum_columns<2, 2, true, T>(tile, base, fetch, count, column, dim, emit);
  }
  if (column < dim) sum_columns<1, 4, true, T>(tile, base, fetch, count, column, dim, emit);
}

// Stores a block of columns as float32. out is aligned to 16 bytes, c is a multiple of K.
template <int K>
__device__ __forceinline__ void store_floats(float* out, int c, const float (&values)[K],
                                             int valid) {
  if (valid == K) {
    store_aligned(values, out + c);
    return;
  }
  COLDROW_LANES
  for (int k = 0; k < K; ++k) {
    if (k < valid) out[c + k] = values[k];
  }
}

}  // namespace device

COLDROW_END
