#include <coldrow/platform.hpp>

#include "support.hpp"

// The version is written in two places, here and in CMakeLists.txt.
TEST(Platform, HeaderAndProjectHaveOneVersion) {
  const std::string version = std::to_string(COLDROW_VERSION_MAJOR) + "." +
                              std::to_string(COLDROW_VERSION_MINOR) + "." +
                              std::to_string(COLDROW_VERSION_PATCH);
  EXPECT_EQ(version, COLDROW_TEST_PROJECT_VERSION);
}
