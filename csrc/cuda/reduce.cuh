// The kernels of predict_backward and predict_l1: K + 2 sums in one pass over K + 1 features, then the gradients.
//
// Up to 8 inputs, a thread holds its vector of every input, so that a loss reads each element from memory once although
// it needs it twice: for the forecast, and for the sums once the sign of the error is known. With more inputs it reads
// them again, which the L1 cache serves. Sums: float32 over a vector and over the vectors of a thread, double from
// there on, in a fixed order without atomics.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/pass.cuh"

namespace lesa::cuda {

// What one launch is told. Inputs are right-aligned as in combine; the walk's last input is `other`.
template <typename T, int kInputs, int kWidth, bool kStrided>
struct ReduceTask {
  static constexpr int kBytes = kWidth * sizeof(T);

  void* inputs[kInputs];
  void* other;   // the gradient of the forecast, or the target
  void* output;  // receives the forecast; may be null
  double* partials;
  Parameter<T> weight;
  Parameter<T> bias;
  Parameter<T> gain;
  std::int64_t items;
  int unused;
  int begun;  // rows of partials that earlier launches have written: blocks add to theirs
  Walk<kStrided, kInputs + 1, kBytes, kBytes> walk;
};

// Adds up the sums of a block's threads into its row of partials: column k for input k, then S_b, then the loss.
template <typename Task, int kSums>
__device__ void finish_block(const Task& task, const float (&sums)[kSums]) {
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
  const int columns = kSums - task.unused;
  if (thread < columns) {
    double* into = task.partials + std::int64_t{block} * columns + thread;
    double sum = block < task.begun ? *into : 0.0;
    for (int w = 0; w < kWarps; ++w) {
      sum += of_warps[w][task.unused + thread];
    }
    *into = sum;
  }
}

// From 16 inputs on, their sums and the loads in flight do not fit into half of a multiprocessor's registers.
template <int kInputs>
inline constexpr int kReduceBlocks = kInputs <= kExactInputs ? kResidentBlocks : 1;

template <typename T, int kInputs, int kWidth, bool kStrided, bool kLoss>
__global__ void __launch_bounds__(kThreads, kReduceBlocks<kInputs>)
    reduce_kernel(const __grid_constant__ ReduceTask<T, kInputs, kWidth, kStrided> task) {
  constexpr bool kHolds = kInputs <= kExactInputs;
  constexpr int kGroup = kHolds ? kInputs : kLoadsInFlight;
  __shared__ float weights[kInputs];

  const int unused = task.unused;
  if (kLoss && threadIdx.x < kInputs) {
    const int k = static_cast<int>(threadIdx.x) - unused;
    weights[threadIdx.x] = k < 0 ? 0.0f : task.weight.at(0, k);
  }
  const float bias = kLoss ? task.bias.at(0, 0) : 0.0f, gain = kLoss ? task.gain.at(0, 0) : 0.0f;
  __syncthreads();

  float sums[kInputs + 2] = {};
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; item < task.items; item += threads) {
    const auto place = task.walk.place(item);
    const Packed<T, kWidth> other = load_packed<T, kWidth>(advance(task.other, task.walk.input(kInputs, place)));
    Packed<T, kWidth> group[kGroup];
    const auto read_group = [&](int first) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int k = first + j;
        group[j] = {};
        if (k >= unused) {
          group[j] = load_packed<T, kWidth>(advance(task.inputs[k], task.walk.input(k, place)));
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
      if (task.output != nullptr) {
        store<T, kWidth>(advance(task.output, task.walk.output(place)), forecast);
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
  finish_block(task, sums);
}

// What the last kernel is told: rows of partials, and how sums become gradients.
template <typename T>
struct GradientTask {
  const double* partials;
  std::int64_t rows;
  int num_inputs;
  double divisor;  // N for a mean, else 1
  Parameter<T> weight;
  Parameter<T> bias;
  Parameter<T> gain;
  Gradients gradients;
};

// d loss / d weight[k] = gain * S_k, d bias = gain * S_b, d gain = sum_k weight[k] * S_k + bias * S_b. One block.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    gradient_kernel(const __grid_constant__ GradientTask<T> task) {
  __shared__ double sums[kMostInputs + 2];
  const int lane = threadIdx.x % kWarpThreads, inputs = task.num_inputs, columns = inputs + 2;
  for (int column = threadIdx.x / kWarpThreads; column < columns; column += kWarps) {
    double sum = 0.0;
    for (std::int64_t row = lane; row < task.rows; row += kWarpThreads) {
      sum += task.partials[row * columns + column];
    }
    sum = sum_of_warp(sum);
    if (lane == 0) {
      sums[column] = sum / task.divisor;
    }
  }
  __syncthreads();
  const auto& [weight, bias, gain, loss, factors] = task.gradients;
  const double scale = task.gain.at(0, 0);
  for (int k = threadIdx.x; k < inputs; k += kThreads) {
    write<T>(weight, k, scale * sums[k]);
    if (factors != nullptr) {
      factors[k] = static_cast<float>(scale) * task.weight.at(0, k) + (k + 1 == inputs ? 1.0f : 0.0f);
    }
  }
  if (threadIdx.x == 0) {
    write<T>(bias, 0, scale * sums[inputs]);
    double for_gain = task.bias.at(0, 0) * sums[inputs];
    for (int k = 0; k < inputs; ++k) {
      for_gain += task.weight.at(0, k) * sums[k];
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

// Rows of partial sums, one a block: a number that does not depend on the kernel, so that the workspace can be
// allocated.
inline std::int64_t most_partials(const Target& target) {
  return std::int64_t{multiprocessors(target)} * kResidentBlocks;
}

// The partial sums of one reduction: each launch uses as many rows as it has blocks.
struct Partials {
  double* data;
  std::int64_t rows = 0;
};

template <typename T, int kInputs, int kWidth, bool kStrided, bool kLoss>
void launch_reduce(const Reduction<T>& reduction, Partials& partials, const Target& target) {
  const auto& [geometry, operands, num_inputs, weight, bias, gain, is_loss] = reduction;
  ReduceTask<T, kInputs, kWidth, kStrided> task{};
  task.other = operands[num_inputs].data;
  task.output = static_cast<int>(operands.size()) > num_inputs + 1 ? operands[num_inputs + 1].data : nullptr;
  task.partials = partials.data;
  task.weight = weight;
  task.bias = bias;
  task.gain = gain;
  task.items = geometry.numel / kWidth;
  task.unused = kInputs - num_inputs;
  task.begun = static_cast<int>(partials.rows);
  for (int k = 0; k < num_inputs; ++k) {
    task.inputs[task.unused + k] = operands[k].data;
  }
  if constexpr (kStrided) {
    task.walk.extent = extent_of(geometry, kWidth);
    for (int k = 0; k <= num_inputs; ++k) {
      task.walk.inputs[task.unused + k] = steps_of(geometry, operands[k], kWidth, sizeof(T));
    }
    task.walk.outputs = steps_of(geometry, operands.back(), kWidth, sizeof(T));
  }
  const std::int64_t blocks = std::min((task.items + kThreads - 1) / kThreads, most_partials(target));
  launch_blocks<reduce_kernel<T, kInputs, kWidth, kStrided, kLoss>>(task, blocks, target);
  partials.rows = std::max(partials.rows, blocks);
}

template <typename T>
void reduce(const Reduction<T>& reduction, double* workspace, const Gradients& gradients, const Target& target) {
  Partials partials{workspace};
  run_pass<sizeof(T)>(FeatureKernels<4, 8, 16, 32>{}, reduction,
                      [&]<int kInputs, int kWidth, bool kStrided>(const Reduction<T>& part) {
                        part.is_loss ? launch_reduce<T, kInputs, kWidth, kStrided, true>(part, partials, target)
                                     : launch_reduce<T, kInputs, kWidth, kStrided, false>(part, partials, target);
                      });
  GradientTask<T> task{};
  task.partials = workspace;
  task.rows = partials.rows;
  task.num_inputs = reduction.num_inputs;
  task.divisor = reduction.is_loss ? static_cast<double>(std::max<std::int64_t>(reduction.geometry.numel, 1)) : 1.0;
  task.weight = reduction.weight;
  task.bias = reduction.bias;
  task.gain = reduction.gain;
  task.gradients = gradients;
  launch_blocks<gradient_kernel<T>>(task, 1, target);
}

}  // namespace lesa::cuda
