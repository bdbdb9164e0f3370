// What the ops ask of the kernels. No torch; pointers are never dereferenced on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "arithmetic.h"
#include "geometry.h"

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
};

template <typename T>
void combine(const Combination<T>& combination, const Target& target);

// to = from, rounded to nearest where the types differ; bits are kept where they do not.
template <typename To, typename From>
void copy(const Geometry& geometry, const Operand& to, const Operand& from, const Target& target);

}  // namespace lesa::cuda
