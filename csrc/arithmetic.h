// What happens to one element: conversions of 16-bit floats and the two formulas. Plain C++20; everything is constexpr,
// which nvcc (--expt-relaxed-constexpr) compiles for the device too.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace lesa {

// IEEE 754 half precision, as bits: the standard library of C++20 has no such type.
struct float16 {
  std::uint16_t bits;
};

struct bfloat16 {
  std::uint16_t bits;
};

// The type that sums are kept in: float, or double for double features.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Exact conversion to the type of the sums.
constexpr float widen(float value) { return value; }
constexpr double widen(double value) { return value; }

constexpr float widen(bfloat16 value) { return std::bit_cast<float>(std::uint32_t{value.bits} << 16); }

constexpr float widen(float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const std::uint32_t sign = std::uint32_t{value.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN: the exponent is all ones in both formats; a NaN comes out quiet
    const std::uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return std::bit_cast<float>(sign | 0x7f800000u | quiet | (magnitude << 13));
  }
  if (magnitude >= 0x0400u) {
    return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  }
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(subnormal));
#endif
}

// Conversion from the type of the sums, rounding to nearest, ties to even; NaN stays NaN.
template <typename T>
constexpr T narrow(accumulate_t<T> value) {
  return value;
}

template <>
constexpr bfloat16 narrow<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
  std::uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return {result};
#else
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  }
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
constexpr float16 narrow<float16>(float value) {
#if defined(__CUDA_ARCH__)
  std::uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return {result};
#else
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half = 0;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520: half way from the largest finite number to the next power of two
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14: normal in half precision
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // adding 1/2 leaves the subnormal, rounded to a multiple of 2^-24, in the low bits of the sum
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u;
  }
  return {static_cast<std::uint16_t>(sign | half)};
#endif
}

// One term of a sum over the history.
template <typename A>
constexpr A add_term(A sum, A coefficient, A feature) {
  return sum + coefficient * feature;
}

// Whether float32 sums of products with a feature are exact enough, judged by the sum of the feature's squares: where
// neither this one nor the other feature's overflowed or is so small that what float32 left out counts, the sum of
// their products is good too, since it is no larger than the larger of the two (Cauchy-Schwarz).
constexpr bool fits_float(double squares) { return squares >= 0x1p-96 && squares <= 0x1p127; }

// predict: the newest feature plus the gain times the mix, mix = sum_k weight[k] * history[k] + bias (arXiv
// 2602.20497).
template <typename A>
constexpr A predicted(A newest, A gain, A mix) {
  return newest + gain * mix;
}

// The derivative of |error|: -1, 0 or 1, and NaN for NaN.
template <typename A>
constexpr A sign_of(A error) {
  return error > 0 ? A{1} : error < 0 ? A{-1} : error;
}

// A parameter of a linear forecast: a matrix, vector (one row) or scalar, float or of the features' type T.
template <typename T>
struct Parameter {
  const void* data;
  std::int64_t row_stride;
  std::int64_t column_stride;
  bool is_float;

  constexpr accumulate_t<T> at(std::int64_t row, std::int64_t column) const {
    const std::int64_t index = row * row_stride + column * column_stride;
    return is_float ? static_cast<accumulate_t<T>>(static_cast<const float*>(data)[index])
                    : static_cast<accumulate_t<T>>(widen(static_cast<const T*>(data)[index]));
  }
};

}  // namespace lesa
