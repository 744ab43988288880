// The F16C instructions, in a translation unit of their own that is compiled for them.
#pragma once

#include <cstdint>

namespace coldrow_test {

bool has_f16c();
void hardware_widen(const std::uint16_t* from, float* to, int n);    // n a multiple of 8
void hardware_nearest(const float* from, std::uint16_t* to, int n);  // n a multiple of 8

}  // namespace coldrow_test
