// Built once more for each instruction set: Lanes<16> is another type in each.
#include <coldrow/row/lanes.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

template <class T>
class LanesOf : public ::testing::Test {};
using AllNumeric = ::testing::Types<float, half, bfloat16>;
TYPED_TEST_SUITE(LanesOf, AllNumeric, NumericName);

template <class T>
bool equal(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Every value of a 16-bit type (some floats), in blocks of 16.
template <class T>
void for_all_values(const auto& f) {
  Random random(1);
  for (int first = 0; first < 0x10000; first += 16) {
    T values[16];
    for (int k = 0; k < 16; ++k) {
      if constexpr (std::same_as<T, float>) {
        values[k] = float_of(random.bits());
      } else {
        values[k] = {static_cast<std::uint16_t>(first + k)};
      }
    }
    f(values);
  }
}

// Any float32, NaNs and infinities among them, most of a magnitude that T has.
template <class T>
void any_floats(Random& random, float (&x)[16]) {
  for (float& v : x) {
    const int e = static_cast<int>(random.below(Format<T>::max_exponent + 40)) - 30;
    v = static_cast<float>(std::ldexp(random.uniform(-2.0, 2.0), e));
    if (random.below(10) == 0) v = float_of(random.bits());
    if (random.below(50) == 0) v = random.below(2) == 0 ? kInff : -kInff;
    if (random.below(50) == 0) v = float_of(0x7f800001u | random.bits());
  }
}

// A user's policy that needs no random bits and is not Nearest.
struct TowardZero {
  static constexpr bool needs_random = false;
  template <Numeric W>
  W round(float x, std::uint32_t) const {
    return number<W>(rounded<W>(static_cast<double>(x), std::trunc));
  }
  template <int N>
  void random(const ElementKey&, std::int64_t, std::uint32_t (&)[N]) const {}
};
static_assert(RoundingPolicy<TowardZero>);

constexpr std::uint32_t kNoBits[16] = {};

TYPED_TEST(LanesOf, LoadWidensEachElement) {
  using T = TypeParam;
  for_all_values<T>([](const T(&values)[16]) {
    Lanes<16> lanes;
    load(lanes, values);
    float x[16];
    to_array(lanes, x);
    for (int k = 0; k < 16; ++k) {
      ASSERT_EQ(bits_of(x[k]), bits_of(Convert<T>::widen(values[k])));  // those of NaNs too
      if (!std::isnan(x[k])) {
        ASSERT_EQ(x[k], value_of(values[k]));
      }
    }
  });
}

TYPED_TEST(LanesOf, StoreNearestRoundsEachElement) {
  using T = TypeParam;
  Random random(2);
  for (int round = 0; round < 20000; ++round) {
    float x[16];
    any_floats<T>(random, x);
    T stored[16];
    store(x, Nearest{}, kNoBits, stored);
    for (int k = 0; k < 16; ++k) {
      ASSERT_TRUE(equal(stored[k], Convert<T>::nearest(x[k]))) << std::hex << bits_of(x[k]);
      if (!std::isnan(x[k])) {
        ASSERT_TRUE(equal(stored[k], number<T>(x[k]))) << x[k];
      }
    }
  }
}

TYPED_TEST(LanesOf, StoreStochasticUsesEachElementsOwnBits) {
  using T = TypeParam;
  Random random(3);
  for (int round = 0; round < 20000; ++round) {
    float x[16];
    any_floats<T>(random, x);
    std::uint32_t bits[16];
    for (std::uint32_t& b : bits) b = random.bits() & 0xffffu;
    T stored[16];
    store(x, Stochastic{}, bits, stored);
    for (int k = 0; k < 16; ++k) {
      ASSERT_TRUE(equal(stored[k], Convert<T>::stochastic(x[k], bits[k])))
          << std::hex << bits_of(x[k]) << " with " << bits[k];
    }
  }
}

TYPED_TEST(LanesOf, StoreRoundsAsThePolicySays) {
  using T = TypeParam;
  Random random(4);
  float x[16];
  for (float& v : x) v = static_cast<float>(random.uniform(-2.0, 2.0));
  T stored[16];
  store(x, TowardZero{}, kNoBits, stored);
  for (int k = 0; k < 16; ++k) EXPECT_EQ(value_of(stored[k]), rounded<T>(x[k], std::trunc)) << x[k];
}

TYPED_TEST(LanesOf, PartialTouchesCountElementsAndNoMore) {
  using T = TypeParam;
  Random random(5);
  for (int count = 1; count <= 16; ++count) {
    float x[16];
    for (float& v : x) v = static_cast<float>(random.uniform(-2.0, 2.0));
    const AtPageEnd<T> row(std::vector<T>(static_cast<std::size_t>(count)));
    store_partial(x, Nearest{}, kNoBits, row.data(), count);  // faults if it writes further
    Lanes<16> lanes;
    load_partial(lanes, row.data(), count);  // faults if it reads further
    float loaded[16];
    to_array(lanes, loaded);
    for (int k = 0; k < 16; ++k) {
      if (k < count) {
        ASSERT_TRUE(equal(row.data()[k], number<T>(x[k])));
      }
      const double expected = k < count ? value_of(row.data()[k]) : 0.0;
      ASSERT_EQ(bits_of(loaded[k]), bits_of(static_cast<float>(expected)));
    }

    T guarded[17];
    std::memset(guarded, 0xa5, sizeof guarded);
    store_partial(x, Nearest{}, kNoBits, guarded, count);
    for (std::size_t i = sizeof(T) * static_cast<std::size_t>(count); i < sizeof guarded; ++i) {
      ASSERT_EQ(reinterpret_cast<unsigned char*>(guarded)[i], 0xa5) << "count " << count;
    }
  }
}

// ------------------------------------------------------------------------- arithmetic, every width

template <int N>
void check_arithmetic() {
  Random random(6);
  for (int round = 0; round < 200; ++round) {
    float a[N], b[N], c[N], out[N];
    for (int k = 0; k < N; ++k) {
      a[k] = static_cast<float>(random.uniform(-2.0, 2.0));
      b[k] = static_cast<float>(random.uniform(-2.0, 2.0));
      c[k] = static_cast<float>(random.uniform(-2.0, 2.0));
    }
    Lanes<N> x, y, z;
    from_array(x, a);
    from_array(y, b);
    from_array(z, c);
    multiply_add(z, x, y);
    to_array(z, out);
    for (int k = 0; k < N; ++k) ASSERT_EQ(out[k], std::fma(a[k], b[k], c[k])) << "once rounded";

    // Halves are added to halves: the order that every build and every group keeps.
    for (int half = N / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) a[k] += a[k + half];
    }
    ASSERT_EQ(sum(x), a[0]) << N;

    broadcast(x, b[0]);
    to_array(x, out);
    for (int k = 0; k < N; ++k) ASSERT_EQ(out[k], b[0]);
  }
}

TEST(LanesArithmetic, OneRoundingPerElementAndOneOrderOfSums) {
  check_arithmetic<1>();
  check_arithmetic<2>();
  check_arithmetic<4>();
  check_arithmetic<8>();
  check_arithmetic<16>();
}

}  // namespace
}  // namespace coldrow_test
