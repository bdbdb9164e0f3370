// What the ops on the CPU share: outputs, parameters as the loops take them, linear forecasts, sums and copies.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "contract.h"
#include "cpu/isa.h"
#include "cpu/iterate.h"

namespace lesa::cpu {

static_assert(kMaxHistory == kMaxInputs && kMaxForecasts == kMaxRows);

// Outputs from this size on are worth a system call; the C library keeps smaller memory for the next call.
inline constexpr std::uintptr_t kHugeBytes = 8 * 1024 * 1024;

// As fresh_like, and requests huge pages: an allocator hands out large memory as fresh pages each time, and faulting
// them in 4 KiB at a time takes longer than a forecast (docs/performance.md). Where there are none, this changes
// nothing.
inline Tensor fresh_pages_like(const Tensor& like) {
  Tensor out = fresh_like(like);
#if defined(__linux__)
  constexpr std::uintptr_t kHuge = 2 * 1024 * 1024;
  const auto begin = reinterpret_cast<std::uintptr_t>(out.data_ptr());
  const std::uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const std::uintptr_t last = (begin + out.numel() * out.element_size()) / kHuge * kHuge;
  if (last >= first + kHugeBytes) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

// Calls body.operator()<T>() for the features' type; the checks have admitted no other.
template <typename Body>
void for_feature(ScalarType dtype, Body&& body) {
  for_dtype<float, float16, bfloat16, double>(dtype, body);
}

// Every NaN is the same: a float32 one may have bits that rounding to bfloat16 would carry into its sign.
template <typename A>
A canonical(A value) {
  return std::isnan(value) ? std::numeric_limits<A>::quiet_NaN() : value;
}

template <typename T>
std::vector<accumulate_t<T>> read_parameter(const Tensor& tensor, std::int64_t rows, std::int64_t columns) {
  const auto parameter = parameter_of<T>(tensor);
  std::vector<accumulate_t<T>> values;
  values.reserve(rows * columns);
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t k = 0; k < columns; ++k) {
      values.push_back(canonical(parameter.at(m, k)));
    }
  }
  return values;
}

template <typename T>
accumulate_t<T> read_scalar(const Tensor& tensor) {
  return canonical(parameter_of<T>(tensor).at(0, 0));
}

// Where results go, rounded to the tensor's dtype: float32 or T.
template <typename T>
class Result {
 public:
  explicit Result(const Tensor& tensor)
      : data_(tensor.data_ptr()), is_float_(tensor.scalar_type() == ScalarType::Float) {}

  template <typename Value>
  void put(std::int64_t first, std::int64_t count, const Value* values) const {
    if (is_float_) {
      std::transform(values, values + count, static_cast<float*>(data_) + first,
                     [](Value value) { return static_cast<float>(value); });
    } else {
      std::transform(values, values + count, static_cast<T*>(data_) + first,
                     [](Value value) { return narrow<T>(static_cast<accumulate_t<T>>(value)); });
    }
  }

 private:
  void* data_;
  bool is_float_;
};

// Computes the M outputs of an iterator from its K inputs.
template <typename T>
void run_forecast(const TensorIterator& iterator, const LinearMap<T>& map) {
  const auto loop = chosen_isa().of<T>().forecast;
  iterator.for_each(
      [&](void* const* pointers, std::int64_t count) { loop(map, pointers + map.rows, pointers, count); });
}

// Returns `width` sums over all elements: loop(pointers, count, sums) adds those of a run, parts of so many elements
// have sums of their own, and those are added in order: sums do not depend on the number of threads.
template <typename Loop>
std::vector<double> sum_in_parts(const TensorIterator& iterator, std::int64_t elements, std::size_t width,
                                 const Loop& loop) {
  const std::int64_t numel = iterator.merged().numel, parts = (numel + elements - 1) / elements;
  std::vector<double> partial(parts * width, 0.0), sums(width, 0.0);
  iterator.parallel_blocks(parts, elements, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t part = first; part < last; ++part) {
      double* into = partial.data() + part * width;
      iterator.for_range(part * elements, std::min((part + 1) * elements, numel),
                         [&](void* const* pointers, std::int64_t count) { loop(pointers, count, into); });
    }
  });
  for (std::size_t i = 0; i < partial.size(); ++i) {
    sums[i % width] += partial[i];
  }
  return sums;
}

// Converts by way of float32, as Tensor.copy_ does; bits are kept where the types are one.
template <typename From, typename To>
void convert(const From* from, To* to, std::int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::memmove(to, from, count * sizeof(To));
  } else if constexpr (std::is_same_v<From, float>) {
    chosen_isa().of<To>().from_float(from, to, count);
  } else if constexpr (std::is_same_v<To, float>) {
    chosen_isa().of<From>().to_float(from, to, count);
  } else {
    constexpr std::int64_t kPart = 1024;
    float part[kPart];
    for (std::int64_t i = 0; i < count; i += kPart) {
      const std::int64_t length = std::min(kPart, count - i);
      convert(from + i, part, length);
      convert(part, to + i, length);
    }
  }
}

// Copies the input of an iterator into its output.
template <typename From, typename To>
void run_copy(const TensorIterator& iterator) {
  iterator.for_each([](void* const* pointers, std::int64_t count) {
    convert(static_cast<const From*>(pointers[1]), static_cast<To*>(pointers[0]), count);
  });
}

}  // namespace lesa::cpu
