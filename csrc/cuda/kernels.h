// What the ops ask of the kernels. No torch; pointers are never dereferenced on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
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

// M outputs of K inputs. Without a gain, out[m] = sum_k coefficients[m, k] * in[k] + offsets[m]; with one, the formula
// of predict. An output may be an input: each element is read from all inputs before it is written to any output.
template <typename T>
struct Combination {
  Geometry geometry;
  std::vector<Operand> operands;  // K inputs, newest last, then M outputs, which share their strides
  int num_inputs;
  Parameter<T> coefficients;
  Parameter<T> offsets;
  Parameter<T> gain;  // data is null for a forecast

  static constexpr std::int64_t element_size(std::size_t) { return sizeof(T); }  // of an operand
};

template <typename T>
void combine(const Combination<T>& combination, const Target& target);

// The sums from which all gradients of the parameters follow, S_k = sum g * in[k] and S_b = sum g, with the gradient g
// of the forecast given; or, for an L1 loss, g = sign(forecast - target) / N, and the loss itself.
template <typename T>
struct Reduction {
  Geometry geometry;
  std::vector<Operand> operands;  // K inputs, newest last, then the gradient or the target, then the output if any
  int num_inputs;
  Parameter<T> weight;
  Parameter<T> bias;
  Parameter<T> gain;
  bool is_loss;  // the operand after the inputs is the target of an L1 loss; the output receives the forecast

  static constexpr std::int64_t element_size(std::size_t) { return sizeof(T); }  // of an operand
};

// Where a sum goes: fresh, contiguous memory of float32 or the features' type; null where nobody wants it.
struct Result {
  void* data;
  bool is_float;
};

struct Gradients {
  Result weight;
  Result bias;
  Result gain;
  float* loss;     // null unless the reduction is a loss
  float* factors;  // K + 1 floats or null: d forecast / d in[k], then a zero
};

// How many doubles `reduce` needs to work in.
std::int64_t reduction_workspace(int num_inputs, const Target& target);

// Runs the reduction and writes the gradients. Every sum has a fixed order: the same input gives the same bits.
template <typename T>
void reduce(const Reduction<T>& reduction, double* workspace, const Gradients& gradients, const Target& target);

// Sums over all elements of the products of K inputs with each other and with the constant 1.
template <typename T>
struct Products {
  Geometry geometry;
  std::vector<Operand> operands;
  int num_inputs;

  static constexpr std::int64_t element_size(std::size_t) { return sizeof(T); }  // of an operand
};

// How many doubles `sum_products` needs to work in.
std::int64_t gram_workspace(const Target& target);

// Writes result [K + 1, K + 1] = sum of in[i] * in[j], where in[K] is 1. Every sum has a fixed order, as in `reduce`.
template <typename T>
void sum_products(const Products<T>& products, double* workspace, double* result, const Target& target);

// to = from, rounded to nearest where the types differ; bits are kept where they do not.
template <typename To, typename From>
void copy(const Geometry& geometry, const Operand& to, const Operand& from, const Target& target);

}  // namespace lesa::cuda
