// expect: needed: auto prepare(std::int32_t, double, std::int32_t) const
#include <coldrow/coldrow.hpp>

struct Decay {
  float factor;
  COLDROW_HD float operator()(std::int32_t, float) const { return factor; }
#ifdef FIXED
  COLDROW_HD Decay prepare(std::int32_t, double, std::int32_t) const { return *this; }
#else
  COLDROW_HD Decay prepare(std::int32_t) const { return *this; }
#endif
};

static_assert(coldrow::DecayPolicy<Decay>);
