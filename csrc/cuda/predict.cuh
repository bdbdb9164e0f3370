// The kernels of predict_backward and predict_l1: S_k = sum g * in[k], S_b = sum g and the loss from K + 1 features,
// then the gradients.
//
// Up to 8 inputs, a thread holds its vector of every input, so that a loss reads each element from memory once although
// it needs it twice: for the forecast, and for the sums once the sign of the error is known. With more inputs it reads
// them again, which the L1 cache serves. Sums: float32 over a vector and over the vectors of a thread, double from
// there on, in a fixed order without atomics.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"

namespace lesa::cuda {

// Inputs are right-aligned as in combine; the one after them is the gradient of the forecast, or the target.
template <typename T, int kInputs, int kWidth, bool kStrided>
struct ReduceParams : FeatureParams<T, kInputs + 1, kWidth, kStrided> {
  void* output;  // receives the forecast; may be null
  double* partials;
  LinearMap<T> map;
  int unused;
  int begun;  // rows of partials that earlier launches have written: blocks add to theirs
};

// Adds up the sums of a block's threads into its row of partials: column k for input k, then S_b, then the loss.
template <typename Params, int kSums>
__device__ void finish_block(const Params& params, const float (&sums)[kSums]) {
  __shared__ double of_warps[kWarps][kSums];
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int lane = thread % kWarpThreads, warp = thread / kWarpThreads;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const double sum = sum_of_warp(sums[i]);
    if (lane == 0) {
      of_warps[warp][i] = sum;
    }
  }
  __syncthreads();
  const int columns = kSums - params.unused;
  if (thread < columns) {
    double* into = params.partials + std::int64_t{block} * columns + thread;
    double sum = block < params.begun ? *into : 0.0;
    for (int w = 0; w < kWarps; ++w) {
      sum += of_warps[w][params.unused + thread];
    }
    *into = sum;
  }
}

// From 16 inputs on, their sums and the loads in flight do not fit into half of a multiprocessor's registers.
template <int kInputs>
inline constexpr int kReduceBlocks = kInputs <= kExactInputs ? kResidentBlocks : 1;

template <typename T, int kInputs, int kWidth, bool kStrided, bool kLoss>
__global__ void __launch_bounds__(kThreads, kReduceBlocks<kInputs>)
    reduce_kernel(const __grid_constant__ ReduceParams<T, kInputs, kWidth, kStrided> params) {
  constexpr bool kHolds = kInputs <= kExactInputs;
  constexpr int kGroup = kHolds ? kInputs : kLoadsInFlight;
  __shared__ float weights[kInputs];

  const int unused = params.unused;
  if (kLoss && threadIdx.x < kInputs) {
    const int k = static_cast<int>(threadIdx.x) - unused;
    weights[threadIdx.x] = k < 0 ? 0.0f : params.map.coefficients.at(0, k);
  }
  const float bias = kLoss ? params.map.offsets.at(0, 0) : 0.0f, gain = kLoss ? params.map.gain.at(0, 0) : 0.0f;
  __syncthreads();

  float sums[kInputs + 2] = {};
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; item < params.items; item += threads) {
    const auto position = params.iterator.position(item);
    const Packed<T, kWidth> other = params.load_input(kInputs, position);
    Packed<T, kWidth> group[kGroup];
    const auto read_group = [&](int first) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int k = first + j;
        group[j] = {};
        if (k >= unused) {
          group[j] = params.load_input(k, position);
        }
      }
    };
    if (kHolds) {
      read_group(0);
    }
    float slopes[kWidth];
    if constexpr (kLoss) {
      float mixes[kWidth] = {};
#pragma unroll 1  // one turn where a thread holds its inputs; else addresses would outlive it
      for (int first = 0; first < kInputs; first += kGroup) {
        if (!kHolds) {
          read_group(first);
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            mixes[e] = add_term(mixes[e], weights[first + j], group[j].widened(e));
          }
        }
      }
      const Packed<T, kWidth> newest = group[kGroup - 1];
      float loss = 0.0f;
      Vector<T, kWidth> forecast;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const float value = predicted(newest.widened(e), gain, mixes[e] + bias);
        const float error = value - other.widened(e);
        forecast[e] = narrow<T>(value);
        slopes[e] = sign_of(error);
        loss += error < 0 ? -error : error;
      }
      sums[kInputs + 1] += loss;
      if (params.output != nullptr) {
        store<T, kWidth>(advance(params.output, params.iterator.output(position)), forecast);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        slopes[e] = other.widened(e);
      }
    }
    float total = 0.0f;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      total += slopes[e];
    }
    sums[kInputs] += total;
#pragma unroll
    for (int first = 0; first < kInputs; first += kGroup) {
      if (!kHolds) {
        read_group(first);
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        float product = 0.0f;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          product = add_term(product, slopes[e], group[j].widened(e));
        }
        sums[first + j] += product;
      }
    }
  }
  finish_block(params, sums);
}

template <typename T>
struct GradientParams {
  const double* partials;  // [rows, num_inputs + 2]
  std::int64_t rows;
  int num_inputs;
  double divisor;  // N for a mean, else 1
  LinearMap<T> map;
  Gradients gradients;
};

// d loss / d weight[k] = gain * S_k, d bias = gain * S_b, d gain = sum_k weight[k] * S_k + bias * S_b. One block.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    gradient_kernel(const __grid_constant__ GradientParams<T> params) {
  __shared__ double sums[kMostInputs + 2];
  const int lane = threadIdx.x % kWarpThreads, inputs = params.num_inputs, columns = inputs + 2;
  for (int column = threadIdx.x / kWarpThreads; column < columns; column += kWarps) {
    double sum = 0.0;
    for (std::int64_t row = lane; row < params.rows; row += kWarpThreads) {
      sum += params.partials[row * columns + column];
    }
    sum = sum_of_warp(sum);
    if (lane == 0) {
      sums[column] = sum / params.divisor;
    }
  }
  __syncthreads();
  const auto& [weight, bias, gain, loss, factors] = params.gradients;
  const double scale = params.map.gain.at(0, 0);
  for (int k = threadIdx.x; k < inputs; k += kThreads) {
    write<T>(weight, k, scale * sums[k]);
    if (factors != nullptr) {
      factors[k] = static_cast<float>(scale) * params.map.coefficients.at(0, k) + (k + 1 == inputs ? 1.0f : 0.0f);
    }
  }
  if (threadIdx.x == 0) {
    write<T>(bias, 0, scale * sums[inputs]);
    double for_gain = params.map.offsets.at(0, 0) * sums[inputs];
    for (int k = 0; k < inputs; ++k) {
      for_gain += params.map.coefficients.at(0, k) * sums[k];
    }
    write<T>(gain, 0, for_gain);
    if (loss != nullptr) {
      *loss = static_cast<float>(sums[inputs + 1]);
    }
    if (factors != nullptr) {
      factors[inputs] = 0.0f;
    }
  }
}

template <typename T>
std::int64_t PredictKernels<T>::workspace(int num_inputs, const Target& target) {
  return most_partials(target) * (num_inputs + 2);
}

// Returns how many rows of partials there are now: each launch uses as many as it has blocks.
template <typename T, int kInputs, int kWidth, bool kStrided, bool kLoss>
int launch_reduce(const Tensors& tensors, const LinearMap<T>& map, double* partials, int begun, const Target& target) {
  const std::size_t inputs = tensors.num_inputs;
  ReduceParams<T, kInputs, kWidth, kStrided> params{};
  params.output = tensors.operands.size() > inputs + 1 ? tensors.operands[inputs + 1].data : nullptr;
  params.partials = partials;
  params.map = map;
  params.unused = kInputs - tensors.num_inputs;
  params.begun = begun;
  params.set_tensors(tensors, tensors.num_inputs + 1, params.unused);
  return launch_partials<reduce_kernel<T, kInputs, kWidth, kStrided, kLoss>>(params, target);
}

template <typename T>
void PredictKernels<T>::reduce(const Tensors& tensors, const LinearMap<T>& map, double* workspace,
                               const Gradients& gradients, const Target& target) {
  const bool is_loss = gradients.loss != nullptr;
  int rows = 0;
  launch_parts<sizeof(T)>(
      KernelSizes<kExactInputs, kMostInputs, 4, 8, 16, 32>{}, tensors,
      [&]<int kInputs, int kWidth, bool kStrided>(const Tensors& part) {
        rows = is_loss ? launch_reduce<T, kInputs, kWidth, kStrided, true>(part, map, workspace, rows, target)
                       : launch_reduce<T, kInputs, kWidth, kStrided, false>(part, map, workspace, rows, target);
      });
  const double divisor = is_loss ? static_cast<double>(std::max<std::int64_t>(tensors.merged.numel, 1)) : 1.0;
  const GradientParams<T> params{workspace, rows, tensors.num_inputs, divisor, map, gradients};
  launch_blocks<gradient_kernel<T>>(params, 1, target);
}

}  // namespace lesa::cuda
