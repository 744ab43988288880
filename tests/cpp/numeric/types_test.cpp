#include <coldrow/numeric/types.hpp>

#include "../support.hpp"

// Arrays of these are arrays of 16-bit words in somebody else's memory.
static_assert(sizeof(coldrow::half) == 2 && alignof(coldrow::half) == 2);
static_assert(sizeof(coldrow::bfloat16) == 2 && alignof(coldrow::bfloat16) == 2);
static_assert(std::is_trivially_copyable_v<coldrow::half>);
static_assert(std::is_trivially_copyable_v<coldrow::bfloat16>);

static_assert(coldrow::Numeric<float> && coldrow::Numeric<coldrow::half> &&
              coldrow::Numeric<coldrow::bfloat16>);
static_assert(!coldrow::Numeric<double> && !coldrow::Numeric<std::uint16_t> &&
              !coldrow::Numeric<const float>);

namespace coldrow_test {

// The oracle that other tests lean on, by values taken from IEEE 754.
TEST(Types, TestOracleKnowsTheFormats) {
  EXPECT_EQ(value_of(half{0x3c00}), 1.0);
  EXPECT_EQ(value_of(half{0xc500}), -5.0);
  EXPECT_EQ(value_of(half{0x7bff}), 65504.0);
  EXPECT_EQ(value_of(half{0x0001}), 0x1p-24);
  EXPECT_EQ(value_of(half{0x7c00}), kInf);
  EXPECT_EQ(value_of(bfloat16{0x3f80}), 1.0);
  EXPECT_EQ(value_of(bfloat16{0x0001}), 0x1p-133);
  EXPECT_EQ(value_of(bfloat16{0x7f7f}), 0x1.fep127);
  EXPECT_EQ(rounded<half>(2049.0), 2048.0);
  EXPECT_EQ(rounded<half>(2051.0), 2052.0);
  EXPECT_EQ(rounded<half>(65519.0), 65504.0);
  EXPECT_EQ(rounded<half>(65520.0), kInf);
  for (int bits = 0; bits < 0x7c00; ++bits) {
    const half x{static_cast<std::uint16_t>(bits)};
    ASSERT_EQ(number<half>(value_of(x)).bits, x.bits);
  }
}

}  // namespace coldrow_test
