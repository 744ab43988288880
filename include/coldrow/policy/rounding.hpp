// Rounding policies: how a float32 result becomes a stored weight.
//
// A rounding policy has
//     static constexpr bool needs_random;
//     template <Numeric W> W round(float x, std::uint32_t random16) const;
//     template <int N> void random(const ElementKey&, std::int64_t column, std::uint32_t (&out)[N])
//     const;
// where random() fills 16-bit numbers for N neighbouring columns; it is not called where
// needs_random is false.
#pragma once

#include "../numeric/convert.hpp"
#include "../numeric/philox.hpp"

COLDROW_BEGIN

// Names one row of one table at one step, for random bits that do not depend on the layout.
// row and column are global: a shard passes its offsets.
struct ElementKey {
  std::uint64_t table = 0;      // hash of the table's name
  std::int64_t row = 0;         // global row
  std::int64_t col_offset = 0;  // global column of local column 0
  std::int32_t step = 0;
};

// Round to nearest, ties to even. In 16 bits a factor close to 1 is lost: bfloat16 keeps 8
// significant bits, so any decay above about 1 - 2^-9 rounds back to the same weight.
struct Nearest {
  static constexpr const char* name = "nearest";
  template <class Self, class F>
  static constexpr void fields(Self&, const F&) {}

  static constexpr bool needs_random = false;
  template <Numeric W>
  COLDROW_HD W round(float x, std::uint32_t) const {
    return Convert<W>::nearest(x);
  }
  template <int N>
  COLDROW_HD void random(const ElementKey&, std::int64_t, std::uint32_t (&)[N]) const {}
};

// Unbiased: rounds up with a probability equal to the fraction dropped. The bits are Philox of
// (seed, table) as key and (column / 8, row, step) as counter, so a run repeats bit for bit
// whatever the threads, ranks or device.
struct Stochastic {
  std::uint64_t seed = 0;

  static constexpr const char* name = "stochastic";
  template <class Self, class F>
  static constexpr void fields(Self& self, const F& f) {
    f("seed", self.seed);
  }

  static constexpr bool needs_random = true;
  template <Numeric W>
  COLDROW_HD W round(float x, std::uint32_t random16) const {
    return Convert<W>::stochastic(x, random16);
  }
  template <int N>
  COLDROW_HD void random(const ElementKey& key, std::int64_t column,
                         std::uint32_t (&out)[N]) const {
    const std::uint64_t k = mix64(seed ^ mix64(key.table));
    const std::int64_t first = key.col_offset + column;
    const int skip = static_cast<int>(first & 7);
    // One Philox call serves eight columns; a start that is no multiple of eight needs one more.
    constexpr int kCalls = (N + 7) / 8;
    const auto eight = [&](std::int64_t which) {
      return philox4x32_10({{static_cast<std::uint32_t>(which), static_cast<std::uint32_t>(key.row),
                             static_cast<std::uint32_t>(static_cast<std::uint64_t>(key.row) >> 32),
                             static_cast<std::uint32_t>(key.step)}},
                           static_cast<std::uint32_t>(k), static_cast<std::uint32_t>(k >> 32));
    };
#if defined(COLDROW_ON_DEVICE)
    // The same numbers, two to a word. The first `skip` are dropped by moves of four, two and one:
    // an index that is no constant would put the array into a device's memory.
    constexpr int kWords = 4 * (kCalls + 1);
    std::uint32_t word[kWords] = {};
    COLDROW_LANES
    for (int c = 0; c <= kCalls; ++c) {
      if (8 * c >= skip + N) continue;
      const Philox4 r = eight((first >> 3) + c);
      COLDROW_LANES
      for (int i = 0; i < 4; ++i) word[4 * c + i] = r.word[i];
    }
    if ((skip & 4) != 0) {
      COLDROW_LANES
      for (int i = 0; i + 2 < kWords; ++i) word[i] = word[i + 2];
    }
    if ((skip & 2) != 0) {
      COLDROW_LANES
      for (int i = 0; i + 1 < kWords; ++i) word[i] = word[i + 1];
    }
    if ((skip & 1) != 0) {
      COLDROW_LANES
      for (int i = 0; i + 1 < kWords; ++i) word[i] = word[i] >> 16 | word[i + 1] << 16;
    }
    COLDROW_LANES
    for (int i = 0; i < N; ++i) out[i] = i % 2 != 0 ? word[i / 2] >> 16 : word[i / 2] & 0xffffu;
#else
    std::uint32_t bits[8 * (kCalls + 1)] = {};
    const int calls = (skip + N + 7) / 8;
    for (int c = 0; c < calls; ++c) {
      const Philox4 r = eight((first >> 3) + c);
      for (int i = 0; i < 4; ++i) {
        bits[8 * c + 2 * i] = r.word[i] & 0xffffu;
        bits[8 * c + 2 * i + 1] = r.word[i] >> 16;
      }
    }
    for (int i = 0; i < N; ++i) out[i] = bits[skip + i];
#endif
  }
};

template <class R>
concept RoundingPolicy = std::is_trivially_copyable_v<R> &&
                         requires(const R r, const ElementKey key, std::uint32_t (&bits)[4]) {
                           { R::needs_random } -> std::convertible_to<bool>;
                           { r.template round<float>(0.0f, 0u) } -> std::same_as<float>;
                           { r.template round<bfloat16>(0.0f, 0u) } -> std::same_as<bfloat16>;
                           r.template random<4>(key, std::int64_t{0}, bits);
                         };

// The built-in roundings: those that the Python module knows.
using BuiltinRoundings = TypeList<Nearest, Stochastic>;

// The rounding that stores a W where R is asked for: float32 is stored unrounded.
template <Numeric W, RoundingPolicy R>
using RoundingOf = std::conditional_t<std::same_as<W, float>, Nearest, R>;

COLDROW_END
