// What the C functions share through which the tests reach the host side of the kernels.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

#include "arithmetic.h"
#include "cuda/kernels.h"

namespace lesa::cuda::entries {

// Parameter without its type.
struct Values {
  const void* data;
  std::int64_t row_stride;
  std::int64_t column_stride;
  bool is_float;

  template <typename T>
  Parameter<T> as() const {
    return {data, row_stride, column_stride, is_float};
  }
};

inline constexpr Target kTarget{"test", 0, nullptr};

// Calls body.operator()<T>() for float32, float16 or bfloat16.
template <typename Body>
void for_type(const std::string& name, Body&& body) {
  if (name == "float32") {
    body.template operator()<float>();
  } else if (name == "float16") {
    body.template operator()<float16>();
  } else {
    body.template operator()<bfloat16>();
  }
}

// Keeps the message of what body throws; an empty one means success.
template <typename Body>
const char* guarded(Body&& body) {
  static std::string message;
  message.clear();
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace lesa::cuda::entries
