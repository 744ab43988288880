// expect: Group
#include <coldrow/coldrow.hpp>

struct OneThread {
  static constexpr int block = 8;
  int rank() const { return 0; }
  int size() const { return 1; }
#ifdef FIXED
  float sum(float x) const { return x; }
#endif
};

using Update =
    coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop, coldrow::NoDecay, coldrow::Nearest>;

void touch(const Update& update, const coldrow::Row<float, coldrow::RowwiseRMSprop>& row,
           const float* grad, int dim) {
  update(OneThread{}, row, grad, dim, {});
}
