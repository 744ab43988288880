// expect: coldrow needs C++20
// standard: 17
#include <coldrow/coldrow.hpp>
