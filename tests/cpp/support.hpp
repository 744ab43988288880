// inputs.hpp and GoogleTest.
#pragma once

#include <gtest/gtest.h>

#include "inputs.hpp"

namespace coldrow_test {

struct NumericName {
  template <class T>
  static std::string GetName(int) {
    return Format<T>::name;
  }
};

}  // namespace coldrow_test
