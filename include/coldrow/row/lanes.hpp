// N neighbouring columns of a row in registers, as float32, and how they get there and back.
//
// Policies are written on single floats. Around them the drivers load and store whole blocks, convert
// 16-bit storage, and accumulate; Lanes<N> is that block. For N = 16 it is one AVX-512 register or two
// of AVX2; on lesser processors, for other N and on the device it is an array. Every form gives the
// same bits: conversions those of Convert<T>, fma one rounding per element, sums one fixed order.
#pragma once

#include "../policy/rounding.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#define COLDROW_X86_LANES
#pragma GCC diagnostic push  // gcc 12 warns about its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

COLDROW_BEGIN

template <int N>
struct Lanes {
  float v[N];
};

#if defined(COLDROW_X86_LANES)

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
struct Vector {
  static constexpr int width = 16;
  __m512 v;
};
COLDROW_INLINE void load(Vector& x, const float* p) { x.v = _mm512_loadu_ps(p); }
COLDROW_INLINE void load(Vector& x, const half* p) {
  x.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
COLDROW_INLINE void load(Vector& x, const bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  x.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
COLDROW_INLINE void store(const Vector& x, float* p) { _mm512_storeu_ps(p, x.v); }
COLDROW_INLINE void store_nearest(const Vector& x, half* p) {
  const __m256i bits = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
// Convert<bfloat16>: keep the upper half of the sum, but of NaNs that of x, made quiet.
COLDROW_INLINE void store_cut(const Vector& x, __m512i sum, bfloat16* p) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet_bit = _mm512_set1_epi32(0x400000);
  const __m512i out = _mm512_mask_or_epi32(sum, nan, _mm512_castps_si512(x.v), quiet_bit);
  const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper);
}
COLDROW_INLINE void store_nearest(const Vector& x, bfloat16* p) {
  const __m512i b = _mm512_castps_si512(x.v);
  const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000));
  const __m512i sum = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
  store_cut(x, _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1)), p);
}
COLDROW_INLINE void store_stochastic(const Vector& x, const std::uint32_t* random16, bfloat16* p) {
  const __m512i b = _mm512_castps_si512(x.v);
  store_cut(x, _mm512_add_epi32(b, _mm512_loadu_si512(random16)), p);
}
COLDROW_INLINE void multiply_add(Vector& acc, const Vector& a, const Vector& b) {
  acc.v = _mm512_fmadd_ps(a.v, b.v, acc.v);
}
COLDROW_INLINE void broadcast(Vector& x, float s) { x.v = _mm512_set1_ps(s); }
COLDROW_INLINE __m256 add_halves(const Vector* x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x[0].v), _mm512_extractf32x8_ps(x[0].v, 1));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct Vector {
  static constexpr int width = 8;
  __m256 v;
};
COLDROW_INLINE void load(Vector& x, const float* p) { x.v = _mm256_loadu_ps(p); }
COLDROW_INLINE void load(Vector& x, const half* p) {
  x.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
COLDROW_INLINE void load(Vector& x, const bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  x.v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
COLDROW_INLINE void store(const Vector& x, float* p) { _mm256_storeu_ps(p, x.v); }
COLDROW_INLINE void store_nearest(const Vector& x, half* p) {
  const __m128i bits = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}
COLDROW_INLINE void store_cut(__m256i b, __m256i addend, bfloat16* p) {
  const __m256i rest = _mm256_and_si256(b, _mm256_set1_epi32(0x7fffffff));
  const __m256i nan = _mm256_cmpgt_epi32(rest, _mm256_set1_epi32(0x7f800000));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(b, addend), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(0x40));
  const __m256i out = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m128i low = _mm256_castsi256_si128(out);
  const __m128i high = _mm256_extracti128_si256(out, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
COLDROW_INLINE void store_nearest(const Vector& x, bfloat16* p) {
  const __m256i b = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  store_cut(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)), p);
}
COLDROW_INLINE void store_stochastic(const Vector& x, const std::uint32_t* random16, bfloat16* p) {
  const __m256i random = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(random16));
  store_cut(_mm256_castps_si256(x.v), random, p);
}
COLDROW_INLINE void multiply_add(Vector& acc, const Vector& a, const Vector& b) {
  acc.v = _mm256_fmadd_ps(a.v, b.v, acc.v);
}
COLDROW_INLINE void broadcast(Vector& x, float s) { x.v = _mm256_set1_ps(s); }
COLDROW_INLINE __m256 add_halves(const Vector* x) { return _mm256_add_ps(x[0].v, x[1].v); }

#else
#undef COLDROW_X86_LANES  // before AVX2 there is no fma to build on: the array form
#endif

#endif  // COLDROW_X86_LANES

#if defined(COLDROW_X86_LANES)
template <>
struct Lanes<16> {
  static constexpr int vectors = 16 / Vector::width;
  Vector v[vectors];
};

template <Numeric T>
COLDROW_INLINE void load(Lanes<16>& x, const T* p) {
  for (int i = 0; i < Lanes<16>::vectors; ++i) load(x.v[i], p + i * Vector::width);
}
COLDROW_INLINE void to_array(const Lanes<16>& x, float (&out)[16]) {
  for (int i = 0; i < Lanes<16>::vectors; ++i) store(x.v[i], out + i * Vector::width);
}
COLDROW_INLINE void from_array(Lanes<16>& x, const float (&in)[16]) { load(x, in); }
COLDROW_INLINE void broadcast(Lanes<16>& x, float s) {
  for (Vector& v : x.v) broadcast(v, s);
}
COLDROW_INLINE void multiply_add(Lanes<16>& acc, const Lanes<16>& a, const Lanes<16>& b) {
  for (int i = 0; i < Lanes<16>::vectors; ++i) multiply_add(acc.v[i], a.v[i], b.v[i]);
}
// ((x0+x8) + (x4+x12)) + ... : halves added to halves, as in the array form.
COLDROW_INLINE float sum(const Lanes<16>& x) {
  const __m256 eight = add_halves(x.v);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif

#if defined(__CUDACC__) || defined(COLDROW_SIMT)
// On a device a block is moved in accesses of 16 bytes (or all it has) where its address allows it,
// which every block does in rows of a size that is a multiple of 16.
template <int Bytes>
struct alignas(Bytes) Words {
  std::uint32_t word[Bytes / 4];
};
template <int N, class T>
inline constexpr int kAccess = min_of<int>(16, N* static_cast<int>(sizeof(T)));

template <int N, class T>
COLDROW_INLINE bool is_aligned(const T* p) {
  return kAccess<N, T> >= 4 && reinterpret_cast<std::uintptr_t>(p) % kAccess<N, T> == 0;
}
template <class T, int Bytes>
COLDROW_INLINE T value_in(const Words<Bytes>& words, int i) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(words.word[i]);
  } else {
    return {static_cast<std::uint16_t>(words.word[i / 2] >> (i % 2 * 16))};
  }
}
template <int N, class T>
COLDROW_INLINE void load_aligned(const T* p, float (&out)[N]) {
  constexpr int kBytes = max_of(4, kAccess<N, T>);
  constexpr int kValues = kBytes / static_cast<int>(sizeof(T));
  COLDROW_LANES
  for (int i = 0; i < N / kValues; ++i) {
    const auto words = *reinterpret_cast<const Words<kBytes>*>(p + i * kValues);
    COLDROW_LANES
    for (int k = 0; k < kValues; ++k) {
      out[i * kValues + k] = Convert<T>::widen(value_in<T>(words, k));
    }
  }
}
template <int N, class T>
COLDROW_INLINE void store_aligned(const T (&values)[N], T* p) {
  constexpr int kBytes = max_of(4, kAccess<N, T>);
  constexpr int kValues = kBytes / static_cast<int>(sizeof(T));
  COLDROW_LANES
  for (int i = 0; i < N / kValues; ++i) {
    Words<kBytes> words;
    COLDROW_LANES
    for (int w = 0; w < kBytes / 4; ++w) {
      if constexpr (sizeof(T) == 4) {
        words.word[w] = bit_cast<std::uint32_t>(values[i * kValues + w]);
      } else {
        const int k = i * kValues + 2 * w;
        words.word[w] = values[k].bits | static_cast<std::uint32_t>(values[k + 1].bits) << 16;
      }
    }
    *reinterpret_cast<Words<kBytes>*>(p + i * kValues) = words;
  }
}
#endif

// The array form.

template <int N, Numeric T>
COLDROW_INLINE void load(Lanes<N>& x, const T* p) {
#if defined(COLDROW_ON_DEVICE)
  if (is_aligned<N>(p)) {
    load_aligned(p, x.v);
    return;
  }
#endif
  COLDROW_LANES
  for (int k = 0; k < N; ++k) x.v[k] = Convert<T>::widen(p[k]);
}
template <int N>
COLDROW_INLINE void to_array(const Lanes<N>& x, float (&out)[N]) {
  COLDROW_LANES
  for (int k = 0; k < N; ++k) out[k] = x.v[k];
}
template <int N>
COLDROW_INLINE void from_array(Lanes<N>& x, const float (&in)[N]) {
  COLDROW_LANES
  for (int k = 0; k < N; ++k) x.v[k] = in[k];
}
template <int N>
COLDROW_INLINE void broadcast(Lanes<N>& x, float s) {
  COLDROW_LANES
  for (int k = 0; k < N; ++k) x.v[k] = s;
}
// acc = a * b + acc, rounded once.
template <int N>
COLDROW_INLINE void multiply_add(Lanes<N>& acc, const Lanes<N>& a, const Lanes<N>& b) {
  COLDROW_LANES
  for (int k = 0; k < N; ++k) acc.v[k] = math::fma(a.v[k], b.v[k], acc.v[k]);
}
template <int N>
COLDROW_INLINE float sum(const Lanes<N>& x) {
  if constexpr (N == 1) {
    return x.v[0];
  } else {
    Lanes<N / 2> half;
    for (int k = 0; k < N / 2; ++k) half.v[k] = x.v[k] + x.v[k + N / 2];
    return sum(half);
  }
}

// Rounds N values to T by `rounding`, with 16 random bits for each.
template <int N, Numeric T, RoundingPolicy Rounding>
COLDROW_INLINE void store(const float (&x)[N], const Rounding& rounding,
                          const std::uint32_t (&random16)[N], T* p) {
#if defined(COLDROW_X86_LANES)
  constexpr bool nearest = std::same_as<Rounding, Nearest>;
  constexpr bool stochastic = std::same_as<Rounding, Stochastic>;
  if constexpr (N == 16 && !std::same_as<T, float> &&
                (nearest || (stochastic && std::same_as<T, bfloat16>))) {
    for (int k = 0; k < N; k += Vector::width) {
      Vector v;
      load(v, x + k);
      if constexpr (nearest) {
        store_nearest(v, p + k);
      } else {
        store_stochastic(v, random16 + k, p + k);
      }
    }
    return;
  }
#endif
#if defined(COLDROW_ON_DEVICE)
  if (is_aligned<N>(p)) {
    T rounded[N];
    COLDROW_LANES
    for (int k = 0; k < N; ++k) rounded[k] = rounding.template round<T>(x[k], random16[k]);
    store_aligned(rounded, p);
    return;
  }
#endif
  COLDROW_LANES
  for (int k = 0; k < N; ++k) p[k] = rounding.template round<T>(x[k], random16[k]);
}

// The end of a row: `count` < N columns. What lies beyond reads as zero and is not written.
// (On a device every index into an array is a constant, or the array would lie in memory.)
template <int N, Numeric T>
COLDROW_INLINE void load_partial(Lanes<N>& x, const T* p, int count) {
#if defined(COLDROW_ON_DEVICE)
  COLDROW_LANES
  for (int k = 0; k < N; ++k) x.v[k] = k < count ? Convert<T>::widen(p[k]) : 0.0f;
#else
  T padded[N] = {};
  for (int k = 0; k < count; ++k) padded[k] = p[k];
  load(x, padded);
#endif
}
template <int N, Numeric T, RoundingPolicy Rounding>
COLDROW_INLINE void store_partial(const float (&x)[N], const Rounding& rounding,
                                  const std::uint32_t (&random16)[N], T* p, int count) {
#if defined(COLDROW_ON_DEVICE)
  COLDROW_LANES
  for (int k = 0; k < N; ++k) {
    if (k < count) p[k] = rounding.template round<T>(x[k], random16[k]);
  }
#else
  T padded[N];
  store(x, rounding, random16, padded);
  for (int k = 0; k < count; ++k) p[k] = padded[k];
#endif
}

COLDROW_END
