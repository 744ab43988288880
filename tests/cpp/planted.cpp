// Mistakes on purpose: what a sanitizer must find, so that "nothing found" means something.
//     planted race|overread|overflow|leak
#include <climits>
#include <coldrow/host/lookup.hpp>
#include <cstdio>
#include <string>

using namespace coldrow;

namespace {

// Two parts of a parallel region write one number.
void race() {
  int sum = 0;
  host::parallel(2, [&](int part) { sum += part; });
  std::printf("%d\n", sum);
}

// A lookup of row 3 of 3.
void overread() {
  auto* weight = new float[3 * 5]();
  const std::int32_t index = 3;
  float out[5];
  const host::Bags<float, std::int32_t> bags{weight, 5, &index, nullptr, 0, 1, 1, nullptr, false};
  host::lookup_bags(bags, out, 5);
  std::printf("%g\n", static_cast<double>(out[4]));
  delete[] weight;
}

void overflow(int argc) { std::printf("%d\n", INT_MAX + argc); }

void leak() {
  // (volatile: no pointer to it may be left in a register.)
  int* volatile lost = new int[1000];
  lost = nullptr;
  std::printf("%d\n", lost == nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "race") race();
  if (what == "overread") overread();
  if (what == "overflow") overflow(argc);
  if (what == "leak") leak();
  return 0;
}
