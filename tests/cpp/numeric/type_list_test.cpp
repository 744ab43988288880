#include <coldrow/numeric/types.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

using List = TypeList<char, double, int>;
static_assert(List::size == 3 && List::bytes == sizeof(double));
static_assert(List::has<double> && !List::has<float>);
static_assert(List::number<char> == 0 && List::number<int> == 2 && List::number<float> == -1);
static_assert(std::same_as<List::At<1>, double>);

TEST(TypeList, EachTypeInOrder) {
  std::vector<std::size_t> sizes;
  List::for_each([&](auto one) { sizes.push_back(sizeof(typename decltype(one)::type)); });
  EXPECT_EQ(sizes, (std::vector<std::size_t>{1, 8, 4}));
  for (int number = 0; number < List::size; ++number) {
    EXPECT_EQ(
        with_type_at<List>(number, [](auto one) { return sizeof(typename decltype(one)::type); }),
        sizes[static_cast<std::size_t>(number)]);
  }
}

TEST(StoredTypes, ByTheirNamesAtRunTime) {
  StoredTypes::for_each([](auto one) {
    using T = typename decltype(one)::type;
    EXPECT_EQ(size_of(kNumericType<T>), static_cast<int>(sizeof(T)));
    with_numeric(kNumericType<T>,
                 [](auto zero) { EXPECT_TRUE((std::same_as<decltype(zero), T>)); });
  });
  // Of a part of the list, which is compiled alone.
  using Part = TypeList<bfloat16>;
  EXPECT_EQ(with_numeric<Part>(NumericType::bfloat16, [](auto zero) { return sizeof zero; }), 2u);
}

}  // namespace
}  // namespace coldrow_test
