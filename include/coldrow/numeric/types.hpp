// Numeric types a table or a gradient may have. 16-bit types are storage only: all arithmetic is in
// float32.
#pragma once

#include "type_list.hpp"

// Their names where they are known at run time only. (Outside the namespace of a build: numbers that
// several builds hand each other.)
namespace coldrow {
enum class NumericType : std::int32_t { float32, float16, bfloat16 };
}  // namespace coldrow

COLDROW_BEGIN

// IEEE binary16. (Not _Float16: it does not exist in device code and gcc 12 does not vectorise it.)
struct half {
  std::uint16_t bits;
};

// The upper 16 bits of an IEEE binary32.
struct bfloat16 {
  std::uint16_t bits;
};

// The list. A type's number is its NumericType.
using StoredTypes = TypeList<float, half, bfloat16>;

template <class T>
concept Numeric = StoredTypes::has<T>;

template <Numeric T>
inline constexpr auto kNumericType = static_cast<NumericType>(StoredTypes::number<T>);

static_assert(StoredTypes::size == 3 && kNumericType<float> == NumericType::float32 &&
                  kNumericType<half> == NumericType::float16 &&
                  kNumericType<bfloat16> == NumericType::bfloat16,
              "NumericType names the types of StoredTypes in the order of that list");

// Bytes of one number.
template <int From = 0>
COLDROW_HD constexpr int size_of(NumericType type) {
  using T = StoredTypes::At<From>;
  if constexpr (From + 1 < StoredTypes::size) {
    if (type != kNumericType<T>) return size_of<From + 1>(type);
  }
  return static_cast<int>(sizeof(T));
}

// Calls f with a zero of the type, on the host. Types: those among which it is; each is compiled.
template <class Types = StoredTypes, int From = 0, class F>
COLDROW_HOST_INLINE auto with_numeric(NumericType type, const F& f) {
  using T = typename Types::template At<From>;
  if constexpr (From + 1 < Types::size) {
    if (type != kNumericType<T>) return with_numeric<Types, From + 1>(type, f);
  }
  return f(T{});
}

COLDROW_END
