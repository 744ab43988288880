// expect: RoundingPolicy
#include <coldrow/coldrow.hpp>

struct UpperHalf {
  static constexpr bool needs_random = false;
#ifdef FIXED
  template <coldrow::Numeric W>
  W round(float x, std::uint32_t) const {
    return coldrow::Convert<W>::nearest(x);
  }
#else
  coldrow::bfloat16 round(float x, std::uint32_t) const {  // not for any weight type
    return coldrow::Convert<coldrow::bfloat16>::nearest(x);
  }
#endif
  template <int N>
  void random(const coldrow::ElementKey&, std::int64_t, std::uint32_t (&)[N]) const {}
};

coldrow::RowUpdate<coldrow::bfloat16, float, coldrow::RowwiseRMSprop, coldrow::NoDecay, UpperHalf>
    update;
