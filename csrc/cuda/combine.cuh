// The kernel of predict, forecast and forecast_into: M linear combinations of K features in one pass.
//
// A thread reads its item (one vector) of every input into registers, at most 64 floats, and only then computes and
// writes the M outputs: each input is read from memory once, and an output may take the place of an input. Up to 8
// inputs, their number is known at compile time and vectors have 16 bytes; 16 and 32 inputs and tensors that are not
// aligned alike take narrower vectors; more inputs and most strides go one element at a time.
#pragma once

#include <cstdint>

#include "cuda/pass.cuh"

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
inline constexpr int kCombineItems = kStrided ? 1 : items_in_flight(kInputs, kWidth * sizeof(T));

// Places in tensors of any strides take registers too.
template <typename T, int kInputs, int kWidth, bool kStrided>
inline constexpr int kCombineBlocks =
    kStrided ? 4 : combine_blocks(kCombineItems<T, kInputs, kWidth, kStrided> * kInputs * kWidth);

template <typename T, int kInputs, int kWidth, bool kStrided>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks<T, kInputs, kWidth, kStrided>)
    combine_kernel(const __grid_constant__ CombineTask<T, kInputs, kWidth, kStrided> task) {
  constexpr bool kExact = !kStrided && kInputs <= kExactInputs && kWidth == vector_width(kInputs, sizeof(T));
  constexpr int kItems = kCombineItems<T, kInputs, kWidth, kStrided>;
  alignas(16) __shared__ float coefficients[kMostOutputs * kInputs];
  __shared__ float offsets[kMostOutputs];
  __shared__ float gain;

  const int unused = kExact ? 0 : task.unused, thread = static_cast<int>(threadIdx.x);
  const bool predicts = task.gain.data != nullptr;
  bool ready = false;
  const std::int64_t threads = std::int64_t{gridDim.x} * kCombineThreads;
  std::int64_t first = std::int64_t{blockIdx.x} * kCombineThreads + thread;
  const bool idle = first >= task.items;  // such a thread reads the last item, so that loads need no condition
  if (idle) {
    first = task.items - 1;
  }
#pragma unroll 1
  do {
    Packed<T, kWidth> inputs[kItems][kInputs];
    decltype(task.walk.place(0)) places[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const std::int64_t item = first + i * threads;
      places[i] = task.walk.place(item);
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        if (k >= unused && (i == 0 || item < task.items)) {
          inputs[i][k] = load_packed<T, kWidth>(advance(task.inputs[k], task.walk.input(k, places[i])));
        } else {
          inputs[i][k] = {};
        }
      }
    }
    if (!ready) {  // while the first items are under way; three warps wait for three parameters at once
#pragma unroll 1
      for (int i = thread; i < task.rows * kInputs; i += kCombineThreads) {
        const int k = i % kInputs - unused;
        coefficients[i] = k < 0 ? 0.0f : task.coefficients.at(i / kInputs, k);
      }
#pragma unroll 1
      for (int m = kCombineThreads - 1 - thread; m < task.rows; m += kCombineThreads) {
        offsets[m] = task.offsets.at(0, m);
      }
      if (thread == kWarpThreads) {
        gain = predicts ? task.gain.at(0, 0) : 0.0f;
      }
      __syncthreads();
      ready = true;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i == 0 ? idle : first + i * threads >= task.items) {
        break;
      }
      float features[kInputs][kWidth];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          features[k][e] = inputs[i][k].widened(e);
        }
      }
      const std::int64_t output = task.walk.output(places[i]);
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
    first += kItems * threads;
  } while (first < task.items);
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
  launch<combine_kernel<T, kInputs, kWidth, kStrided>, kCombineThreads>(
      task, kCombineItems<T, kInputs, kWidth, kStrided>, target);
}

template <typename T>
void combine(const Combination<T>& combination, const Target& target) {
  run_pass<sizeof(T)>(FeatureKernels<1, 2, 3, 4, 5, 6, 7, 8, 16, 32>{}, combination,
                      [&]<int kInputs, int kWidth, bool kStrided>(const Combination<T>& part) {
                        launch_combine<T, kInputs, kWidth, kStrided>(part, target);
                      });
}

}  // namespace lesa::cuda
