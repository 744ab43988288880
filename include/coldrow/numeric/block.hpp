// Blocks of N neighbouring values between memory and float32 registers.
//
// Policies are written on floats; these functions convert around them. On the host N is 16 and the
// 16-bit conversions use F16C / AVX-512 where the build has them, with the bits of Convert<T>. (The
// maskz forms with a full mask compile to the plain ones; gcc 12 warns about its own plain ones.)
#pragma once

#if !defined(__CUDACC__) && defined(__F16C__)
#include <immintrin.h>
#endif

#include "../policy/rounding.hpp"

COLDROW_BEGIN

template <int N, Numeric T>
COLDROW_HD void load_block(const T* source, float (&out)[N]) {
#if !defined(__CUDACC__) && defined(__F16C__)
  if constexpr (std::same_as<T, half> && N == 16) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    _mm512_storeu_ps(out, _mm512_maskz_cvtph_ps(0xffff, bits));
#else
    for (int k = 0; k < 16; k += 8) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + k));
      _mm256_storeu_ps(out + k, _mm256_cvtph_ps(bits));
    }
#endif
    return;
  }
#endif
  COLDROW_LANES
  for (int k = 0; k < N; ++k) out[k] = Convert<T>::widen(source[k]);
}

template <int N, Numeric T, RoundingPolicy Rounding>
COLDROW_HD void store_block(T* target, const float (&x)[N], const Rounding& rounding,
                            const std::uint32_t (&random16)[N]) {
#if !defined(__CUDACC__) && defined(__F16C__)
  if constexpr (std::same_as<T, half> && N == 16 && !Rounding::needs_random) {
#if defined(__AVX512F__)
    const __m256i bits =
        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bits);
#else
    for (int k = 0; k < 16; k += 8) {
      const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(x + k), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + k), bits);
    }
#endif
    return;
  }
#endif
  COLDROW_LANES
  for (int k = 0; k < N; ++k) target[k] = rounding.template round<T>(x[k], random16[k]);
}

// The last block of a row: count < N values; the others read as zero and are not written.
template <int N, Numeric T>
COLDROW_HD void load_partial(const T* source, int count, float (&out)[N]) {
  T padded[N] = {};
  for (int k = 0; k < count; ++k) padded[k] = source[k];
  load_block<N>(padded, out);
}

template <int N, Numeric T, RoundingPolicy Rounding>
COLDROW_HD void store_partial(T* target, int count, const float (&x)[N], const Rounding& rounding,
                              const std::uint32_t (&random16)[N]) {
  T padded[N];
  store_block<N>(padded, x, rounding, random16);
  for (int k = 0; k < count; ++k) target[k] = padded[k];
}

template <int N, Numeric T>
COLDROW_HD void load_columns(const T* row, int column, int dim, float (&out)[N]) {
  if (column + N <= dim) {
    load_block<N>(row + column, out);
  } else {
    load_partial<N>(row + column, dim - column, out);
  }
}

template <int N, Numeric T, RoundingPolicy Rounding>
COLDROW_HD void store_columns(T* row, int column, int dim, const float (&x)[N],
                              const Rounding& rounding, const std::uint32_t (&random16)[N]) {
  if (column + N <= dim) {
    store_block<N>(row + column, x, rounding, random16);
  } else {
    store_partial<N>(row + column, dim - column, x, rounding, random16);
  }
}

COLDROW_END
