#include "run.hpp"

namespace coldrow_test {
namespace {

static_assert(Group<device::Tile<4>> && Group<device::Tile<8>>);

// All lanes get the same sum, of their own tile, in the order of a butterfly, whoever goes first;
// other tiles of the warp may be elsewhere.
TEST(DeviceGroup, TilesSumInAFixedOrder) {
  Random random(1);
  const auto x = random.numbers<float>(64, -1e6, 1e6);
  for (const simt::Order& order : all_orders()) {
    const simt::WithOrder with(order);
    for (const int lanes : {1, 2, 4, 8, 16, 32}) {
      std::vector<float> sums(64);
      std::vector<int> ranks(64), from(64);
      simt::launch(1, 64, 0, [&] {
        const device::Tile<4> tile{lanes};
        const auto i = static_cast<std::size_t>(threadIdx.x);
        ranks[i] = tile.rank();
        if (tile.number() % 3 == 1) return;  // some tiles have nothing to do
        for (int k = 0; k <= tile.number(); ++k) tile.sync();
        sums[i] = tile.sum(x[i]);
        from[i] = tile.from(static_cast<int>(i), lanes - 1);
      });
      for (std::size_t i = 0; i < 64; ++i) {
        const std::size_t first =
            i / static_cast<std::size_t>(lanes) * static_cast<std::size_t>(lanes);
        EXPECT_EQ(ranks[i], static_cast<int>(i - first));
        if (first / static_cast<std::size_t>(lanes) % 3 == 1) continue;
        std::vector<float> a(x.begin() + static_cast<std::ptrdiff_t>(first),
                             x.begin() + static_cast<std::ptrdiff_t>(first) + lanes);
        for (std::size_t d = a.size() / 2; d > 0; d /= 2) {
          for (std::size_t k = 0; k < d; ++k) a[k] += a[k + d];
        }
        EXPECT_EQ(bits_of(sums[i]), bits_of(a[0])) << lanes << " lanes";
        EXPECT_EQ(from[i], static_cast<int>(first) + lanes - 1);
      }
    }
  }
}

// Random bits in the device's form: those of Philox by the definition, wherever a block begins.
template <int N>
void expect_random() {
  const Stochastic rounding{99};
  for (const std::int64_t offset : {0, 1, 2, 3, 4, 5, 6, 7, 8, 1000003}) {
    for (std::int64_t column = 0; column < 3 * N; column += N) {
      const ElementKey key{7, (std::int64_t{1} << 40) + 5, offset, 12};
      std::uint32_t out[N];
      rounding.random<N>(key, column, out);
      const std::uint64_t k = mix64(99 ^ mix64(7));
      for (int i = 0; i < N; ++i) {
        const std::int64_t c = offset + column + i;
        const Philox4 r =
            philox4x32_10({{static_cast<std::uint32_t>(c >> 3), 5u, 1u << 8, 12u}},
                          static_cast<std::uint32_t>(k), static_cast<std::uint32_t>(k >> 32));
        const std::uint32_t word = r.word[(c & 7) / 2];
        ASSERT_EQ(out[i], (c & 1) != 0 ? word >> 16 : word & 0xffffu) << N << ", column " << c;
      }
    }
  }
}
TEST(DeviceGroup, RandomBitsDoNotDependOnTheBlock) {
  expect_random<1>();
  expect_random<2>();
  expect_random<4>();
  expect_random<8>();
  expect_random<16>();
}

// A block is moved whole where its address allows, value by value elsewhere, and never more than it.
template <Numeric T, int N>
void expect_moves() {
  Random random(2);
  const auto values = random.numbers<T>(64);
  for (int first = 0; first < 20; ++first) {
    for (int count = 1; count <= N; ++count) {
      alignas(16) T memory[64];
      std::memcpy(static_cast<void*>(memory), values.data(), sizeof memory);
      Lanes<N> x;
      if (count == N) {
        load(x, memory + first);
      } else {
        load_partial(x, memory + first, count);
      }
      for (int k = 0; k < N; ++k) {
        const auto i = static_cast<std::size_t>(first + k);
        ASSERT_EQ(value_of(x.v[k]), k < count ? value_of(values[i]) : 0.0);
        x.v[k] = static_cast<float>(k) + 0.5f;
      }
      const std::uint32_t none[N] = {};
      if (count == N) {
        store(x.v, Nearest{}, none, memory + first);
      } else {
        store_partial(x.v, Nearest{}, none, memory + first, count);
      }
      for (int i = 0; i < 64; ++i) {
        const int k = i - first;
        ASSERT_EQ(value_of(memory[i]),
                  k >= 0 && k < count ? k + 0.5 : value_of(values[static_cast<std::size_t>(i)]));
      }
    }
  }
}
TEST(DeviceGroup, BlocksMoveAtAnyAddress) {
  expect_moves<float, 1>();
  expect_moves<float, 4>();
  expect_moves<float, 8>();
  expect_moves<half, 1>();
  expect_moves<half, 2>();
  expect_moves<half, 4>();
  expect_moves<coldrow::bfloat16, 8>();
  expect_moves<half, 16>();
}

}  // namespace
}  // namespace coldrow_test
