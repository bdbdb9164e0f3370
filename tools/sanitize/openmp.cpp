// Parallel regions on threads that are started and joined: what ThreadSanitizer can follow. libgomp's own wait for each
// other by futexes, which it does not see, so it would call everything that they hand over a race.
#include <omp.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {
// As OpenMP has it, each thread has a limit of its own.
thread_local int number = 0, team = 1, most = 4;

void run(void (*body)(void*), void* data, int index, int count) {
  number = index;
  team = count;
  body(data);
  number = 0;
  team = 1;
}
}  // namespace

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  // A region within a region gets one thread, as libgomp has it unless told otherwise.
  const int count = team > 1 ? 1 : threads ? static_cast<int>(threads) : most;
  std::vector<std::thread> others;
  for (int index = 1; index < count; ++index) others.emplace_back(run, body, data, index, count);
  const int outer = team, own = number;
  run(body, data, 0, count);
  team = outer;
  number = own;
  for (std::thread& other : others) other.join();
}
int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team; }
int omp_get_max_threads() { return most; }
int omp_in_parallel() { return team > 1; }
void omp_set_num_threads(int count) { most = std::max(count, 1); }
}
