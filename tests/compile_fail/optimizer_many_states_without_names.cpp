// expect: state_name()
#include <coldrow/coldrow.hpp>

struct Five {
  static constexpr int scalar_states = 3;
  static constexpr int vector_states = 2;
#ifdef FIXED
  static constexpr const char* state_name(int i) {
    constexpr const char* names[] = {"a", "b", "c", "d", "e"};
    return names[i];
  }
#endif
  coldrow::RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  float element(const coldrow::RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};

constexpr auto kernels = coldrow::host::OptimizerKernels::of<Five>();
