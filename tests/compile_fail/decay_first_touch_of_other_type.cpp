// expect: needed: float first_touch(float) const
#include <coldrow/coldrow.hpp>

struct Decay {
  COLDROW_HD float operator()(std::int32_t, float) const { return 0.5f; }
#ifdef FIXED
  COLDROW_HD float first_touch(float) const { return 1.0f; }
#else
  COLDROW_HD float first_touch() const { return 1.0f; }
#endif
};

static_assert(coldrow::DecayPolicy<Decay>);
