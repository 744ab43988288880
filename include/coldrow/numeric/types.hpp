// Numeric types a table or a gradient may have. 16-bit types are storage only: all arithmetic is in
// float32.
#pragma once

#include "../platform.hpp"

COLDROW_BEGIN

// IEEE binary16. (Not _Float16: it does not exist in device code and gcc 12 does not vectorise it.)
struct half {
  std::uint16_t bits;
};

// The upper 16 bits of an IEEE binary32.
struct bfloat16 {
  std::uint16_t bits;
};

template <class T>
concept Numeric = std::same_as<T, float> || std::same_as<T, half> || std::same_as<T, bfloat16>;

COLDROW_END
