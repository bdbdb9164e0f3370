// B-spline bases at one point, as lesa_kernels/reference.py defines them: Cox-de Boor on half-open intervals, with any
// ascending knots. At a point only order + 1 bases are not zero, and only those are evaluated. Plain C++20.
#pragma once

#include <type_traits>
#include <utility>

namespace lesa {

// kMost + 1 bases in a row, of an order up to kMost: values[r] is basis first + r. Bases that do not exist are zero,
// and so are the first kMost - order ones.
template <int kMost>
struct LocalBases {
  int first;
  float values[kMost + 1];
  float slopes[kMost + 1];  // derivatives in x
};

// Calls body with 0 .. kCount - 1 as compile-time constants, so that arrays stay in registers whatever the compiler.
template <int kCount, typename Body>
constexpr void unrolled(const Body& body) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    (body(std::integral_constant<int, kIndices>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Returns j with knots(j) <= x < knots(j + 1), or -1. Right at the first guess where the knots are uniform.
template <typename Knots>
constexpr int find_span(float x, const Knots& knots, int count) {
  const float low = knots(0), high = knots(count - 1);
  if (!(x >= low && x < high)) {
    return -1;
  }
  const int guess = static_cast<int>((x - low) / (high - low) * static_cast<float>(count - 1));
  int span = guess < 0 ? 0 : guess > count - 2 ? count - 2 : guess;
  while (span > 0 && x < knots(span)) {
    --span;
  }
  while (span < count - 2 && x >= knots(span + 1)) {
    ++span;
  }
  return span;
}

// Evaluates the bases of an order (at most kMost) that are not zero at x. Outside the knots, `first` is past the last.
template <int kMost, typename Knots>
constexpr LocalBases<kMost> bases_at(float x, const Knots& knots, int count, int order) {
  LocalBases<kMost> result{count, {}, {}};
  const int span = find_span(x, knots, count);
  if (span < 0) {
    return result;
  }
  result.first = span - kMost;
  result.values[kMost] = 1.0f;
  unrolled<kMost>([&](auto step) {
    constexpr int kDegree = step + 1;
    if (kDegree > order) {
      return;
    }
    unrolled<kDegree + 1>([&](auto offset) {
      constexpr int r = kMost - kDegree + offset;
      const int i = result.first + r;
      float rising = 0.0f, falling = 0.0f, slope = 0.0f;
      if (i >= 0 && i + kDegree + 1 < count) {
        if constexpr (offset > 0) {
          const float share = result.values[r] / (knots(i + kDegree) - knots(i));
          rising = (x - knots(i)) * share;
          slope += share;
        }
        if constexpr (r < kMost) {
          const float share = result.values[r + 1] / (knots(i + kDegree + 1) - knots(i + 1));
          falling = (knots(i + kDegree + 1) - x) * share;
          slope -= share;
        }
      }
      result.values[r] = rising + falling;
      if (kDegree == order) {
        result.slopes[r] = kDegree * slope;
      }
    });
  });
  return result;
}

}  // namespace lesa
