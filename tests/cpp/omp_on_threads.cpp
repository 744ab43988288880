// What gcc's OpenMP asks of its runtime, on std::thread: for ThreadSanitizer, which does not see how
// libgomp's threads wait for each other (it is not instrumented) and would call every result of a
// parallel region a race. The drivers are compiled as ever, with -fopenmp, and linked with this instead.
// (The names are gcc's; one that is missing here is an error of the linker.)
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// A parallel region, and the loop in it that threads take their turns from.
struct Team {
  int threads = 1;
  std::once_flag started;
  std::atomic<long> next{0};
  long end = 0, step = 1;
};

Team alone;
thread_local Team* team = &alone;
thread_local int number = 0;

int asked(unsigned threads) {
  if (team->threads > 1) return 1;  // regions within regions are not parallel
  return threads == 0 ? 4 : static_cast<int>(threads);
}

void run(Team& with, void (*body)(void*), void* data) {
  const auto one = [&](int n) {
    Team* const outer = team;
    const int outer_number = number;
    team = &with;
    number = n;
    body(data);
    team = outer;
    number = outer_number;
  };
  std::vector<std::thread> others;
  for (int n = 1; n < with.threads; ++n) others.emplace_back(one, n);
  one(0);
  for (std::thread& t : others) t.join();
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team->threads; }
int omp_get_max_threads() { return 4; }
int omp_in_parallel() { return team->threads > 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned /*flags*/) {
  Team with;
  with.threads = asked(threads);
  run(with, body, data);
}

// schedule(dynamic), one loop in a region: `chunk` passes at a time, to whichever thread asks.
bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  *begin = team->next.fetch_add(team->step, std::memory_order_relaxed);
  if (*begin >= team->end) return false;
  *end = *begin + team->step < team->end ? *begin + team->step : team->end;
  return true;
}
bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk, long* begin,
                                          long* end) {
  std::call_once(team->started, [&] {
    team->next = first;
    team->end = last;
    team->step = step * chunk;
  });
  return GOMP_loop_nonmonotonic_dynamic_next(begin, end);
}
// (What gcc makes of the same where it optimises more.)
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned threads,
                                             long first, long last, long step, long chunk,
                                             unsigned /*flags*/) {
  Team with;
  with.threads = asked(threads);
  with.next = first;
  with.end = last;
  with.step = step * chunk;
  run(with, body, data);
}
void GOMP_loop_end_nowait() {}
}
