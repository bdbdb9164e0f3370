// The kernel of forecast, forecast_into and predict: M linear combinations of K features,
// out[m] = sum_k coefficients[m, k] * in[k] + offsets[m], and for predict in[K - 1] + gain * this.
//
// A thread reads its item (one vector) of every input into registers, at most 64 floats, and only then computes and
// writes the M outputs: each input is read from memory once, and an output may take the place of an input. Up to 8
// inputs, their number is known at compile time and vectors have 16 bytes; 16 and 32 inputs and tensors that are not
// aligned alike take narrower vectors; more inputs and most strides go one element at a time.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace lesa::cuda {

// Inputs are right-aligned: the newest is the last, the first `unused` do not exist.
template <typename T, int kInputs, int kWidth, bool kStrided>
struct CombineParams : FeatureParams<T, kInputs, kWidth, kStrided> {
  void* outputs[kMostOutputs];
  LinearMap<T> map;
  int rows;
  int unused;
};

template <typename T, int kInputs, int kWidth, bool kStrided>
inline constexpr int kCombineItems = kStrided ? 1 : items_in_flight(kInputs, kWidth * sizeof(T));

// Places in tensors of any strides take registers too.
template <typename T, int kInputs, int kWidth, bool kStrided>
inline constexpr int kCombineBlocks =
    kStrided ? 4 : combine_blocks(kCombineItems<T, kInputs, kWidth, kStrided> * kInputs * kWidth);

template <typename T, int kInputs, int kWidth, bool kStrided>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks<T, kInputs, kWidth, kStrided>)
    combine_kernel(const __grid_constant__ CombineParams<T, kInputs, kWidth, kStrided> params) {
  constexpr bool kExact = !kStrided && kInputs <= kExactInputs && kWidth == vector_width(kInputs, sizeof(T));
  constexpr int kItems = kCombineItems<T, kInputs, kWidth, kStrided>;
  alignas(16) __shared__ float coefficients[kMostOutputs * kInputs];
  __shared__ float offsets[kMostOutputs];
  __shared__ float gain;

  const int unused = kExact ? 0 : params.unused, thread = static_cast<int>(threadIdx.x);
  const bool predicts = params.map.gain.data != nullptr;
  bool ready = false;
  const std::int64_t threads = std::int64_t{gridDim.x} * kCombineThreads;
  std::int64_t first = std::int64_t{blockIdx.x} * kCombineThreads + thread;
  const bool idle = first >= params.items;  // such a thread reads the last item, so that loads need no condition
  if (idle) {
    first = params.items - 1;
  }
#pragma unroll 1
  do {
    Packed<T, kWidth> inputs[kItems][kInputs];
    decltype(params.iterator.position(0)) positions[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const std::int64_t item = first + i * threads;
      positions[i] = params.iterator.position(item);
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        if (k >= unused && (i == 0 || item < params.items)) {
          inputs[i][k] = params.load_input(k, positions[i]);
        } else {
          inputs[i][k] = {};
        }
      }
    }
    if (!ready) {  // while the first items are under way; three warps wait for three parameters at once
#pragma unroll 1
      for (int i = thread; i < params.rows * kInputs; i += kCombineThreads) {
        const int k = i % kInputs - unused;
        coefficients[i] = k < 0 ? 0.0f : params.map.coefficients.at(i / kInputs, k);
      }
#pragma unroll 1
      for (int m = kCombineThreads - 1 - thread; m < params.rows; m += kCombineThreads) {
        offsets[m] = params.map.offsets.at(0, m);
      }
      if (thread == kWarpThreads) {
        gain = predicts ? params.map.gain.at(0, 0) : 0.0f;
      }
      __syncthreads();
      ready = true;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i == 0 ? idle : first + i * threads >= params.items) {
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
      const std::int64_t output = params.iterator.output(positions[i]);
#pragma unroll 1
      for (int m = 0; m < params.rows; ++m) {
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
        store<T, kWidth>(advance(params.outputs[m], output), result);
      }
    }
    first += kItems * threads;
  } while (first < params.items);
}

template <typename T, int kInputs, int kWidth, bool kStrided>
void launch_combine(const Tensors& tensors, const LinearMap<T>& map, const Target& target) {
  const int inputs = tensors.num_inputs;
  CombineParams<T, kInputs, kWidth, kStrided> params{};
  params.map = map;
  params.rows = static_cast<int>(tensors.operands.size()) - inputs;
  params.unused = kInputs - inputs;
  params.set_tensors(tensors, inputs, params.unused);
  for (int m = 0; m < params.rows; ++m) {
    params.outputs[m] = tensors.operands[inputs + m].data;
  }
  launch<combine_kernel<T, kInputs, kWidth, kStrided>, kCombineThreads>(
      params, kCombineItems<T, kInputs, kWidth, kStrided>, target);
}

template <typename T>
void ForecastKernels<T>::combine(const Tensors& tensors, const LinearMap<T>& map, const Target& target) {
  launch_parts<sizeof(T)>(KernelSizes<kExactInputs, kMostInputs, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32>{}, tensors,
                          [&]<int kInputs, int kWidth, bool kStrided>(const Tensors& part) {
                            launch_combine<T, kInputs, kWidth, kStrided>(part, map, target);
                          });
}

}  // namespace lesa::cuda
