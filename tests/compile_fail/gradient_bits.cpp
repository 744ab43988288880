// expect: Numeric
#include <coldrow/coldrow.hpp>

#ifdef FIXED
using Grad = coldrow::half;
#else
using Grad = std::uint16_t;  // bits that could be float16 or bfloat16: say which
#endif

coldrow::RowUpdate<float, Grad, coldrow::RowwiseRMSprop, coldrow::NoDecay, coldrow::Nearest> update;
