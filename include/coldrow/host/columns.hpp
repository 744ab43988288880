// The columns of a row on the host, some blocks of 16 at a time.
#pragma once

#include "../row/lanes.hpp"

COLDROW_BEGIN

namespace host {

// A row's columns with those that fill its last block: how far sums of rows lie apart.
constexpr int padded(int dim) { return (dim + 15) / 16 * 16; }

// Calls f with a row's width as a constant where it is a common one, else with 0: loops over columns are
// then unrolled, which is worth a tenth of a step.
template <class F>
COLDROW_HOST_INLINE void with_width(int dim, const F& f) {
  using std::integral_constant;
  switch (dim) {
    case 16:
      return f(integral_constant<int, 16>{});
    case 32:
      return f(integral_constant<int, 32>{});
    case 64:
      return f(integral_constant<int, 64>{});
    case 128:
      return f(integral_constant<int, 128>{});
    default:
      return f(integral_constant<int, 0>{});
  }
}

// Calls f(blocks, whole, column) for the columns of a row of `dim`, 16 * blocks at a time, of which all
// exist (whole) or, in the last one, dim - column. Width: dim where it is known when compiling, or 0.
template <int Width, class F>
COLDROW_HOST_INLINE void for_columns(int dim, const F& f) {
  using std::integral_constant;
  if constexpr (Width > 0) {
    static_assert(Width % 16 == 0 && Width <= 128);
    f(integral_constant<int, Width / 16>{}, std::true_type{}, 0);
  } else {
    int c = 0;
    for (; c + 128 <= dim; c += 128) f(integral_constant<int, 8>{}, std::true_type{}, c);
    if (c + 64 <= dim) {
      f(integral_constant<int, 4>{}, std::true_type{}, c);
      c += 64;
    }
    if (c + 32 <= dim) {
      f(integral_constant<int, 2>{}, std::true_type{}, c);
      c += 32;
    }
    if (c + 16 <= dim) {
      f(integral_constant<int, 1>{}, std::true_type{}, c);
      c += 16;
    }
    if (c < dim) f(integral_constant<int, 1>{}, std::false_type{}, c);
  }
}

// 16 * Blocks columns, in registers.
template <int Blocks>
struct Columns {
  Lanes<16> block[Blocks];

  COLDROW_HOST_INLINE Columns() {
    for (auto& b : block) broadcast(b, 0.0f);
  }
  // Whole: all columns exist; else Blocks is 1 and `count` do.
  template <bool Whole, Numeric T>
  COLDROW_HOST_INLINE void add(float scale, const T* from, int count) {
    Lanes<16> s, x;
    broadcast(s, scale);
    for (int b = 0; b < Blocks; ++b) {
      if constexpr (Whole) {
        load(x, from + 16 * b);
      } else {
        load_partial(x, from + 16 * b, count);
      }
      multiply_add(block[b], s, x);
    }
  }
  COLDROW_HOST_INLINE void operator+=(const Columns& other) {
    Lanes<16> one;
    broadcast(one, 1.0f);
    for (int b = 0; b < Blocks; ++b) multiply_add(block[b], one, other.block[b]);
  }
  COLDROW_HOST_INLINE void write(float* out) const {  // all of them
    for (int b = 0; b < Blocks; ++b) {
      float values[16];
      to_array(block[b], values);
      for (int k = 0; k < 16; ++k) out[16 * b + k] = values[k];
    }
  }
};

}  // namespace host

COLDROW_END
