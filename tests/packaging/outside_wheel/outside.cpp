#include <coldrow/coldrow.hpp>

// The factor of a built-in decay, for ctypes.
extern "C" float shrink(std::int32_t gap, float lr, float alpha) {
  return coldrow::LinearClipped{.alpha = alpha}(gap, lr);
}
