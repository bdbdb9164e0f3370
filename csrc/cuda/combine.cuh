// The kernel of predict, forecast and forecast_into: M linear combinations of K features in one pass.
//
// A thread reads its item (one vector) of every input into registers, at most 64 floats, and only then computes and
// writes the M outputs: each input is read from memory once, and an output may take the place of an input. Up to 8
// inputs, their number is known at compile time and vectors have 16 bytes; 16 and 32 inputs take narrower vectors; more
// inputs, odd alignments and most strides go one element at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>

#include "cuda/device.cuh"

namespace lesa::cuda {

// What one launch is told. Inputs are right-aligned: the newest is the last, the first `unused` do not exist.
template <typename T, int kInputs, int kWidth, bool kStrided>
struct CombineTask {
  static constexpr int kBytes = kWidth * sizeof(T);

  void* inputs[kInputs];
  void* outputs[kMostOutputs];
  Parameter<T> coefficients;
  Parameter<T> offsets;
  Parameter<T> gain;
  std::int64_t items;
  int rows;
  int unused;
  Walk<kStrided, kInputs, kBytes, kBytes> walk;
};

template <typename T, int kInputs, int kWidth, bool kStrided>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    combine_kernel(const __grid_constant__ CombineTask<T, kInputs, kWidth, kStrided> task) {
  constexpr bool kExact = !kStrided && kInputs <= kExactInputs;
  constexpr int kItems = items_in_flight(kInputs);
  alignas(16) __shared__ float coefficients[kMostOutputs * kInputs];
  __shared__ float offsets[kMostOutputs];

  const int unused = kExact ? 0 : task.unused;
  for (int i = threadIdx.x; i < task.rows * kInputs; i += kThreads) {
    const int k = i % kInputs - unused;
    coefficients[i] = k < 0 ? 0.0f : task.coefficients.at(i / kInputs, k);
  }
  for (int m = threadIdx.x; m < task.rows; m += kThreads) {
    offsets[m] = task.offsets.at(0, m);
  }
  const bool predicts = task.gain.data != nullptr;
  const float gain = predicts ? task.gain.at(0, 0) : 0.0f;
  __syncthreads();

  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; first < task.items;
       first += kItems * threads) {
    Vector<T, kWidth> inputs[kItems][kInputs];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const auto place = task.walk.place(first + i * threads);
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        if (k >= unused && (i == 0 || first + i * threads < task.items)) {
          inputs[i][k] = load<T, kWidth>(advance(task.inputs[k], task.walk.input(k, place)));
        } else {
          inputs[i][k] = {};
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i > 0 && first + i * threads >= task.items) {
        break;
      }
      float features[kInputs][kWidth];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          features[k][e] = widen(inputs[i][k][e]);
        }
      }
      const std::int64_t output = task.walk.output(task.walk.place(first + i * threads));
#pragma unroll 1
      for (int m = 0; m < task.rows; ++m) {
        Vector<T, kWidth> result;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          float sum = 0.0f;
#pragma unroll
          for (int k = 0; k < kInputs; ++k) {
            sum = add_term(sum, coefficients[m * kInputs + k], features[k][e]);
          }
          sum += offsets[m];
          result[e] = narrow<T>(predicts ? predicted(features[kInputs - 1][e], gain, sum) : sum);
        }
        store<T, kWidth>(advance(task.outputs[m], output), result);
      }
    }
  }
}

template <typename T, int kInputs, int kWidth, bool kStrided>
void launch_combine(const Combination<T>& combination, const Target& target) {
  const auto& [geometry, operands, num_inputs, coefficients, offsets, gain] = combination;
  CombineTask<T, kInputs, kWidth, kStrided> task{};
  task.coefficients = coefficients;
  task.offsets = offsets;
  task.gain = gain;
  task.items = geometry.numel / kWidth;
  task.rows = static_cast<int>(operands.size()) - num_inputs;
  task.unused = kInputs - num_inputs;
  for (int k = 0; k < num_inputs; ++k) {
    task.inputs[task.unused + k] = operands[k].data;
  }
  for (int m = 0; m < task.rows; ++m) {
    task.outputs[m] = operands[num_inputs + m].data;
  }
  if constexpr (kStrided) {
    task.walk.extent = extent_of(geometry, kWidth);
    for (int k = 0; k < num_inputs; ++k) {
      task.walk.inputs[task.unused + k] = steps_of(geometry, operands[k], kWidth, sizeof(T));
    }
    task.walk.outputs = steps_of(geometry, operands[num_inputs], kWidth, sizeof(T));
  }
  launch<combine_kernel<T, kInputs, kWidth, kStrided>>(task, items_in_flight(kInputs), target);
}

template <typename T>
void launch_elements(const Combination<T>& combination, const Target& target) {
  combination.num_inputs <= kExactInputs ? launch_combine<T, kExactInputs, 1, true>(combination, target)
                                         : launch_combine<T, kMostInputs, 1, true>(combination, target);
}

// Contiguous, aligned tensors: vectors, then one by one the few elements that are left.
template <typename T, int kInputs>
void launch_vectors(const Combination<T>& combination, const Target& target) {
  constexpr int kWidth = vector_width(kInputs, sizeof(T));
  const std::int64_t whole = combination.geometry.numel / kWidth * kWidth;
  if (whole > 0) {
    launch_combine<T, kInputs, kWidth, false>(combination, target);
  }
  if (whole < combination.geometry.numel) {
    Combination<T> rest = combination;
    rest.geometry = from_element(rest.geometry, whole);
    for (Operand& operand : rest.operands) {
      operand = from_element(operand, whole, sizeof(T));
    }
    launch_elements(rest, target);
  }
}

template <typename T, int... kInputs>
void launch_exact(std::integer_sequence<int, kInputs...>, const Combination<T>& combination, const Target& target) {
  ((combination.num_inputs == kInputs + 1 ? launch_vectors<T, kInputs + 1>(combination, target) : void()), ...);
}

template <typename T>
void combine(const Combination<T>& combination, const Target& target) {
  const Geometry& geometry = combination.geometry;
  if (geometry.numel == 0) {
    return;
  }
  if (geometry.dims > kWalkedDims) {
    Combination<T> part = combination;
    part.geometry = without_first(geometry);
    for (std::int64_t i = 0; i < geometry.sizes[0]; ++i) {
      std::transform(combination.operands.begin(), combination.operands.end(), part.operands.begin(),
                     [i](const Operand& operand) { return at_first(operand, i, sizeof(T)); });
      combine(part, target);
    }
    return;
  }
  const int inputs = combination.num_inputs;
  const auto fits = [&](int width) {
    return std::all_of(combination.operands.begin(), combination.operands.end(),
                       [&](const Operand& operand) { return takes_vectors(geometry, operand, width, sizeof(T)); });
  };
  if (inputs <= kExactInputs && fits(vector_width(kExactInputs, sizeof(T)))) {
    geometry.dims == 1
        ? launch_exact(std::make_integer_sequence<int, kExactInputs>{}, combination, target)
        : launch_combine<T, kExactInputs, vector_width(kExactInputs, sizeof(T)), true>(combination, target);
  } else if (inputs > kExactInputs && inputs <= 16 && geometry.dims == 1 && fits(vector_width(16, sizeof(T)))) {
    launch_vectors<T, 16>(combination, target);
  } else if (inputs > 16 && inputs <= 32 && geometry.dims == 1 && fits(vector_width(32, sizeof(T)))) {
    launch_vectors<T, 32>(combination, target);
  } else {
    launch_elements(combination, target);
  }
}

}  // namespace lesa::cuda
