// The kernels that the ops on CUDA launch, one class for each family of ops; T is the features' type. No torch;
// pointers are never dereferenced on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "arithmetic.h"
#include "strides.h"

namespace lesa::cuda {

// Where to launch, and for which op (messages name it). The device must be the current one.
struct Target {
  const char* op;
  int device;
  cudaStream_t stream;
};

// Strided tensors of one shape: K inputs, newest last, then what else a kernel reads or writes.
struct Tensors {
  MergedShape merged;
  std::vector<Operand> operands;
  int num_inputs;
};

// Coefficients [M, K] and offsets [M]: output m is sum_k coefficients[m, k] * in[k] + offsets[m]. With a gain (its data
// is not null) M is 1 and the output is that of predict: in[K - 1] + gain * this sum.
template <typename T>
struct LinearMap {
  Parameter<T> coefficients;
  Parameter<T> offsets;
  Parameter<T> gain;
};

template <typename T>
struct ForecastKernels {
  // The M outputs are the tensors after the inputs and share their strides. An output may be an input: each element is
  // read from all inputs before it is written to any output.
  static void combine(const Tensors& tensors, const LinearMap<T>& map, const Target& target);
};

template <typename To>
struct IdentityKernels {
  // Copies one input into one output, rounded to nearest where the types differ; bits are kept where they do not. The
  // value of the input's type only selects the overload.
  static void copy(float, const Tensors& tensors, const Target& target);
  static void copy(float16, const Tensors& tensors, const Target& target);
  static void copy(bfloat16, const Tensors& tensors, const Target& target);
};

// Where a sum goes: fresh, contiguous memory of float32 or the features' type.
struct Result {
  void* data;
  bool is_float;
};

struct Gradients {
  Result weight;
  Result bias;
  Result gain;
  float* loss;     // null for predict_backward
  float* factors;  // K + 1 floats or null: d forecast / d in[k], then a zero
};

template <typename T>
struct PredictKernels {
  // How many doubles `reduce` needs to work in.
  static std::int64_t workspace(int num_inputs, const Target& target);

  // Writes the gradients of predict's parameters from the sums S_k = sum g * in[k] and S_K = sum g. The tensor after
  // the inputs is the gradient g of the forecast; where a loss is wanted it is the target of an L1 loss, so that
  // g = sign(forecast - target) / N, and a further tensor receives the forecast. Every sum has a fixed order: the same
  // input gives the same bits.
  static void reduce(const Tensors& tensors, const LinearMap<T>& map, double* workspace, const Gradients& gradients,
                     const Target& target);
};

template <typename T>
struct GramKernels {
  // How many doubles `sum_products` needs to work in.
  static std::int64_t workspace(const Target& target);

  // Writes result [K + 1, K + 1] = sum of in[i] * in[j], where in[K] is 1. Every sum has a fixed order.
  static void sum_products(const Tensors& tensors, double* workspace, double* result, const Target& target);
};

// The order of the splines that the kernels of kan evaluate, and the bases that they hold at once, are bounded.
inline constexpr int kMostOrder = 8;
inline constexpr int kMostBases = 255;

// N rows, I inputs, O outputs and B bases; all contiguous. Parameters are float or T, each on its own.
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

template <typename T>
struct KanKernels {
  // out [N, O].
  static void forward(const KanLayer<T>& layer, T* out, const Target& target);

  // grad [N, O]. Every sum has a fixed order.
  static void backward(const KanLayer<T>& layer, const T* grad, const KanGradients& gradients, const Target& target);
};

}  // namespace lesa::cuda
