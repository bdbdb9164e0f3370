// One fault for each sanitizer, to see that it is found.
#include <cstdlib>
#include <thread>

extern "C" {
int past_the_end(int count) {
  volatile char* bytes = static_cast<char*>(std::malloc(count));
  const int read = bytes[count];
  std::free(const_cast<char*>(bytes));
  return read;
}
int overflow(int number) { return number + 2147483647; }
int race(int rounds) {
  int shared = 0;
  auto add = [&] {
    for (int round = 0; round < rounds; ++round) ++shared;
  };
  std::thread other(add);
  add();
  other.join();
  return shared;
}
int nothing(int) { return 0; }
}
