// What the C functions share through which the tests reach the host side of the kernels.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

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

// Coefficients, offsets and gain, or weight, bias and gain.
template <typename T>
LinearMap<T> map_of(const Values* values) {
  return {values[0].as<T>(), values[1].as<T>(), values[2].as<T>()};
}

inline Tensors tensors_of(int dims, const std::int64_t* sizes, int count, const TensorView* views, int inputs) {
  Tensors tensors{{}, std::vector<Operand>(count), inputs};
  tensors.merged = merge_dimensions({sizes, static_cast<std::size_t>(dims)}, {views, static_cast<std::size_t>(count)},
                                    tensors.operands);
  return tensors;
}

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
