// expect: needed: auto prepare(std::int32_t, double) const
#include <coldrow/coldrow.hpp>

struct Optimizer : coldrow::SGD {
#ifdef FIXED
  COLDROW_HD Optimizer prepare(std::int32_t, double) const { return *this; }
#else
  COLDROW_HD Optimizer prepare() const { return *this; }
#endif
};

static_assert(coldrow::OptimizerPolicy<Optimizer>);
