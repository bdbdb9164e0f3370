// What the ops of a KAN layer ask of the kernels: N rows, I inputs, O outputs, B bases, I knots each. No torch.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "cuda/kernels.h"

namespace lesa::cuda {

// The order of the splines that the kernels evaluate, and the bases that they hold at once, are bounded.
inline constexpr int kMostOrder = 8;
inline constexpr int kMostBases = 255;

// A layer and its input, all contiguous. T is the features' type; parameters are float or T, each on its own.
template <typename T>
struct KanLayer {
  const T* x;           // [N, I]
  Parameter<T> grid;    // [I, B + order + 1]
  Parameter<T> base;    // [O, I]
  Parameter<T> spline;  // [O, I, B]
  Parameter<T> scaler;  // [O, I]
  std::int64_t rows;
  std::int64_t inputs;
  std::int64_t outputs;
  int bases;
  int order;
};

struct KanGradients {
  void* x;      // [N, I], of the features' type
  Result base;  // as the parameters
  Result spline;
  Result scaler;
};

// out [N, O].
template <typename T>
void kan_forward(const KanLayer<T>& layer, T* out, const Target& target);

// grad [N, O]. Every sum has a fixed order.
template <typename T>
void kan_backward(const KanLayer<T>& layer, const T* grad, const KanGradients& gradients, const Target& target);

}  // namespace lesa::cuda
