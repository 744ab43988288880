// expect: Numeric
#include <coldrow/coldrow.hpp>

#ifdef FIXED
using Weight = float;
#else
using Weight = double;  // tables are float32, float16 or bfloat16
#endif

coldrow::Table<Weight, coldrow::RowwiseRMSprop> table;
