// expect: at most 64 bytes
#include <coldrow/coldrow.hpp>

struct ByTable {
#ifdef FIXED
  float factors[16];
#else
  float factors[17];
#endif
  float operator()(std::int32_t gap, float) const { return factors[gap & 15]; }
};

constexpr auto functions = coldrow::ExternalDecay::of<ByTable>();
