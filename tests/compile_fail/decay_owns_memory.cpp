// expect: needed: plain fields, no container or virtual function
#include <coldrow/coldrow.hpp>
#include <vector>

struct ByTable {
#ifdef FIXED
  const float* factors;
#else
  std::vector<float> factors;  // cannot be handed to a kernel
#endif
  float operator()(std::int32_t gap, float) const { return factors[gap]; }
};

coldrow::EpochGated<ByTable> decay;
