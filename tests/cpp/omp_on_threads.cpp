// What gcc's OpenMP asks of its runtime, on std::thread: for ThreadSanitizer, which does not see how
// libgomp's threads wait for each other (it is not instrumented) and would call every result of a
// parallel region a race. The drivers are compiled as ever, with -fopenmp, and linked with this instead.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0, count = 1;
}

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return count; }
int omp_get_max_threads() { return 4; }
int omp_in_parallel() { return count > 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned /*flags*/) {
  const int asked = count > 1      ? 1
                    : threads == 0 ? omp_get_max_threads()
                                   : static_cast<int>(threads);
  const auto run = [=](int n) {
    const int outer_number = number, outer_count = count;
    number = n;
    count = asked;
    body(data);
    number = outer_number;
    count = outer_count;
  };
  std::vector<std::thread> others;
  for (int n = 1; n < asked; ++n) others.emplace_back(run, n);
  run(0);
  for (std::thread& t : others) t.join();
}
}
