// expect: needed: float operator()(std::int32_t, float) const
#include <coldrow/coldrow.hpp>

struct Halves {
#ifdef FIXED
  float operator()(std::int32_t, float) const { return 0.5f; }
#else
  float operator()(std::int32_t, float) { return 0.5f; }  // all threads share one policy
#endif
};

coldrow::EpochGated<Halves> decay;
