// expect: needed: float operator()(std::int32_t, float) const
#include <coldrow/coldrow.hpp>

struct HalfLife {
  float half_life;
#ifdef FIXED
  float operator()(std::int32_t gap, float) const {
#else
  double operator()(std::int32_t gap, float) const {  // factors are float32
#endif
      return half_life / (half_life + static_cast<float>(gap));
}
}
;

using Update =
    coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop, HalfLife, coldrow::Nearest>;
const Update update = Update::at(1, 0.02, {}, {100.0f});
