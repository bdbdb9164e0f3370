// normalize as a C function.
#include <vector>

#include "entries.h"

using namespace lesa::cuda::entries;
using lesa::cuda::Rows;

extern "C" {

const char* run_normalize(const char* dtype, const Rows* rows, std::int64_t rows_per_entry, int count,
                          const void* const* inputs, void* kept, void* out, const Values* values, float eps) {
  return guarded([&] {
    for_type(dtype, [&]<typename T>() {
      std::vector<const T*> slots;
      for (int k = 0; k < count; ++k) {
        slots.push_back(static_cast<const T*>(inputs[k]));
      }
      lesa::cuda::normalize<T>({*rows, rows_per_entry, slots, static_cast<T*>(kept), static_cast<T*>(out),
                                values[0].as<T>(), values[1].as<T>(), values[2].as<T>(), values[3].as<T>(), eps},
                               kTarget);
    });
  });
}

}  // extern "C"
