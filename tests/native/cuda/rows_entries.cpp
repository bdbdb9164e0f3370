// normalize, copy_scaled and forecast_scaled as C functions.
#include <vector>

#include "entries.h"

using namespace lesa::cuda::entries;
using lesa::cuda::Rows;

namespace {

// ScaledSlot without its type.
struct Slot {
  void* elements;
  float* scales;

  template <typename Q>
  lesa::cuda::ScaledSlot<Q> as() const {
    return {static_cast<Q*>(elements), scales};
  }
};

// Calls body.operator()<Q, T>() for int8 or float8, and float32, float16 or bfloat16.
template <typename Body>
void for_scaled(const std::string& scaled, const char* dtype, Body&& body) {
  for_type(dtype, [&]<typename T>() {
    scaled == "int8" ? body.template operator()<std::int8_t, T>() : body.template operator()<lesa::float8, T>();
  });
}

}  // namespace

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

const char* run_copy_scaled(const char* scaled, const char* dtype, const Rows* rows, const void* feature,
                            const Slot* slot) {
  return guarded([&] {
    for_scaled(scaled, dtype, [&]<typename Q, typename T>() {
      lesa::cuda::copy_scaled(*rows, static_cast<const T*>(feature), slot->as<Q>(), kTarget);
    });
  });
}

const char* run_forecast_scaled(const char* scaled, const char* dtype, const Rows* rows, int inputs, int outputs,
                                const Slot* slots, void* out, const Values* values) {
  return guarded([&] {
    for_scaled(scaled, dtype, [&]<typename Q, typename T>() {
      lesa::cuda::ScaledForecasts<Q, T> forecasts{};
      forecasts.rows = *rows;
      for (int k = 0; k < inputs; ++k) {
        forecasts.inputs.push_back(slots[k].as<Q>());
      }
      for (int m = 0; m < outputs; ++m) {
        forecasts.kept.push_back(slots[inputs + m].as<Q>());
      }
      forecasts.out = static_cast<T*>(out);
      forecasts.coefficients = values[0].as<T>();
      forecasts.offsets = values[1].as<T>();
      lesa::cuda::forecast_scaled(forecasts, kTarget);
    });
  });
}

}  // extern "C"
