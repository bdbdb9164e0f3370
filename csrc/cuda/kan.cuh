// The kernels of kan_linear: one for the forward, two for the backward. A layer has 1 to 50 rows, so that what counts
// is how few launches there are and how many loads are under way, not arithmetic: eager torch launches some twenty
// kernels for it. The forward of LESA's largest layer, 256 to 256, reads 2.6 MB of weights once for every four rows. Of
// the bases of an input, only the order + 1 that are not zero meet their weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "cuda/launch.cuh"

namespace lesa::cuda {

// B-spline bases at one point as lesa_kernels/ops/kan.py defines them: Cox-de Boor on half-open intervals, with any
// ascending knots. At a point only order + 1 bases are not zero, and only those are evaluated.
//
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

// Evaluates the bases of an input that are not zero at x. Outside the knots, `first` is past the last. With the knots
// t: B_i,d = (x - t_i) / (t_i+d - t_i) * B_i,d-1 + (t_i+d+1 - x) / (t_i+d+1 - t_i+1) * B_i+1,d-1.
template <int kMost, typename T>
__device__ LocalBases<kMost> bases_at(const KanLayer<T>& layer, float x, std::int64_t input) {
  const int order = layer.order, count = layer.bases + order + 1;
  const auto knots = [&layer, start = input * count](int j) { return layer.grid.at(0, start + j); };
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

// Rows whose sums share the weights that a warp has read.
inline constexpr int kRowTile = 4;
// Inputs and rows of grad_x that a block works on; its threads split the outputs.
inline constexpr int kInputTile = 8;
inline constexpr int kOutputGroups = kThreads / kInputTile;
// Outputs whose weight gradients a thread sums at once.
inline constexpr int kOutputTile = 16;

// Splines of a high order take more registers than two blocks leave each other.
template <int kMost>
inline constexpr int kKanBlocks = kMost <= 3 ? kResidentBlocks : 1;

template <typename T>
struct KanParams {
  KanLayer<T> layer;
  const T* grad;
  T* out;  // the forward's result, or grad_x
  KanGradients gradients;
};

// What the bases that do not exist at x are: the recursion makes those of NaN no numbers, those of order 0 are zero.
template <typename T>
__device__ float other_bases(const KanLayer<T>& layer, float x) {
  return layer.order > 0 && x != x ? x : 0.0f;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// out[n, o] = sum_i base[o, i] * silu(x[n, i]) + scaler[o, i] * sum_b spline[o, i, b] * B_b(x[n, i]).
// One warp an output, kRowTile rows a block. The block evaluates 256 inputs at a time for all its warps.
template <typename T, int kMost>
__global__ void __launch_bounds__(kThreads, kKanBlocks<kMost>)
    kan_forward_kernel(const __grid_constant__ KanParams<T> params) {
  __shared__ float smooth[kRowTile][kThreads];
  __shared__ int first[kRowTile][kThreads];
  __shared__ float values[kRowTile][kMost + 1][kThreads];
  const KanLayer<T>& layer = params.layer;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  const std::int64_t output_blocks = (layer.outputs + kWarps - 1) / kWarps;
  const std::int64_t row = blockIdx.x / output_blocks * kRowTile;
  const std::int64_t output = blockIdx.x % output_blocks * kWarps + thread / kWarpThreads;
  const int rows = static_cast<int>(std::min<std::int64_t>(kRowTile, layer.rows - row));
  float sums[kRowTile] = {};
  for (std::int64_t start = 0; start < layer.inputs; start += kThreads) {
    if (start + thread < layer.inputs) {
      for (int r = 0; r < rows; ++r) {
        const float x = widen(params.layer.x[(row + r) * layer.inputs + start + thread]);
        const auto local = bases_at<kMost>(layer, x, start + thread);
        smooth[r][thread] = x * sigmoid(x);  // NaN where x is
        first[r][thread] = local.first;
#pragma unroll
        for (int b = 0; b <= kMost; ++b) {
          values[r][b][thread] = local.values[b];
        }
      }
    }
    __syncthreads();
    const int count = static_cast<int>(std::min<std::int64_t>(kThreads, layer.inputs - start));
    if (output < layer.outputs) {
#pragma unroll 2
      for (int i = lane; i < count; i += kWarpThreads) {
        const std::int64_t weight = output * layer.inputs + start + i;
        const float base = layer.base.at(0, weight), scaler = layer.scaler.at(0, weight);
#pragma unroll
        for (int r = 0; r < kRowTile; ++r) {
          if (r < rows) {
            float spline = 0.0f;
#pragma unroll
            for (int b = 0; b <= kMost; ++b) {
              const int basis = first[r][i] + b;
              if (basis >= 0 && basis < layer.bases) {
                spline += values[r][b][i] * layer.spline.at(0, weight * layer.bases + basis);
              }
            }
            sums[r] += base * smooth[r][i] + scaler * spline;
          }
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kRowTile; ++r) {
    const float sum = sum_of_warp(sums[r]);
    if (lane == 0 && r < rows && output < layer.outputs) {
      params.out[(row + r) * layer.outputs + output] = narrow<T>(sum);
    }
  }
}

// grad_x[n, i] = sum_o grad[n, o] * (base[o, i] * silu'(x) + scaler[o, i] * sum_b spline[o, i, b] * B_b'(x)).
// 8 inputs in one row: 32 groups of threads take every 32nd output, and their sums are added in order.
template <typename T, int kMost>
__global__ void __launch_bounds__(kThreads, kKanBlocks<kMost>)
    kan_inputs_kernel(const __grid_constant__ KanParams<T> params) {
  __shared__ float partial[kOutputGroups][kInputTile];
  const KanLayer<T>& layer = params.layer;
  const int thread = static_cast<int>(threadIdx.x), group = thread / kInputTile;
  const std::int64_t input_blocks = (layer.inputs + kInputTile - 1) / kInputTile;
  const std::int64_t row = blockIdx.x / input_blocks;
  const std::int64_t input = blockIdx.x % input_blocks * kInputTile + thread % kInputTile;
  float sum = 0.0f;
  if (input < layer.inputs) {
    const float x = widen(layer.x[row * layer.inputs + input]);
    const auto local = bases_at<kMost>(layer, x, input);
    float base = 0.0f, splines[kMost + 1] = {};
#pragma unroll 2
    for (std::int64_t output = group; output < layer.outputs; output += kOutputGroups) {
      const float grad = widen(params.grad[row * layer.outputs + output]);
      const std::int64_t weight = output * layer.inputs + input;
      const float scaled = grad * layer.scaler.at(0, weight);
      base += grad * layer.base.at(0, weight);
#pragma unroll
      for (int b = 0; b <= kMost; ++b) {
        const int basis = local.first + b;
        if (basis >= 0 && basis < layer.bases) {
          splines[b] += scaled * layer.spline.at(0, weight * layer.bases + basis);
        }
      }
    }
    const float s = sigmoid(x);
    sum = base * s * (1.0f + x * (1.0f - s));
#pragma unroll
    for (int b = 0; b <= kMost; ++b) {
      sum += local.slopes[b] * splines[b];
    }
  }
  partial[group][thread % kInputTile] = sum;
  __syncthreads();
  if (group == 0 && input < layer.inputs) {
    for (int g = 1; g < kOutputGroups; ++g) {
      sum += partial[g][thread];
    }
    params.out[row * layer.inputs + input] = narrow<T>(sum);
  }
}

// Pairs of a row and an input, and rows, whose bases and gradients a block of the next kernel holds at a time.
inline constexpr int kHeldPairs = 2 * kThreads;
inline constexpr int kHeldRows = 32;

// What the gradients of an input's weights take from one row: its bases from `first` on, `other` for those that it does
// not have (zero, or no number), and silu.
template <int kMost>
struct HeldBases {
  float values[kHeldPairs][kMost + 1];
  int first[kHeldPairs];
  float other[kHeldPairs];
  float smooth[kHeldPairs];

  __device__ float of_channel(int pair, int channel) const {
    const int b = channel - first[pair];
    return b >= 0 && b <= kMost ? values[pair][b] : other[pair];
  }
};

// grad_base[o, i] = sum_n grad[n, o] * silu(x[n, i]); with G_b = sum_n grad[n, o] * B_b(x[n, i]),
// grad_spline[o, i, b] = scaler[o, i] * G_b and grad_scaler[o, i] = sum_b spline[o, i, b] * G_b.
// Gradients of the weights of 16 outputs and as many inputs as have their bases, and one thread more for silu, fit into
// a block. Its threads evaluate the bases of some rows at a time, each once; then each sums one basis of one input over
// these rows, in their order.
template <typename T, int kMost>
__global__ void __launch_bounds__(kThreads, kKanBlocks<kMost>)
    kan_weights_kernel(const __grid_constant__ KanParams<T> params) {
  __shared__ HeldBases<kMost> held;
  alignas(16) __shared__ float grads[kHeldRows][kOutputTile];
  __shared__ float shares[kOutputTile][kThreads];
  const KanLayer<T>& layer = params.layer;
  const int channels = layer.bases + 1, tile = kThreads / channels;
  const int thread = static_cast<int>(threadIdx.x), channel = thread % channels;
  const std::int64_t input_blocks = (layer.inputs + tile - 1) / tile;
  const std::int64_t first_input = blockIdx.x % input_blocks * tile, input = first_input + thread / channels;
  const std::int64_t first_output = blockIdx.x / input_blocks * kOutputTile;
  const int inputs = static_cast<int>(std::min<std::int64_t>(tile, layer.inputs - first_input));
  const int outputs = static_cast<int>(std::min<std::int64_t>(kOutputTile, layer.outputs - first_output));
  const bool works = thread < inputs * channels, smooth = channel == layer.bases;
  float sums[kOutputTile] = {};
  const int most_rows = tile * kHeldRows < kHeldPairs ? kHeldRows : kHeldPairs / tile;
  for (std::int64_t start = 0; start < layer.rows; start += most_rows) {
    const int rows = static_cast<int>(std::min<std::int64_t>(most_rows, layer.rows - start));
#pragma unroll 1
    for (int pair = thread; pair < rows * inputs; pair += kThreads) {
      const std::int64_t row = start + pair / inputs, column = first_input + pair % inputs;
      const float x = widen(layer.x[row * layer.inputs + column]);
      const auto local = bases_at<kMost>(layer, x, column);
      held.first[pair] = local.first;
      held.other[pair] = other_bases(layer, x);
      held.smooth[pair] = x * sigmoid(x);
#pragma unroll
      for (int b = 0; b <= kMost; ++b) {
        held.values[pair][b] = local.values[b];
      }
    }
#pragma unroll 1
    for (int i = thread; i < rows * kOutputTile; i += kThreads) {
      const int row = i / kOutputTile, o = i % kOutputTile;
      grads[row][o] = o < outputs ? widen(params.grad[(start + row) * layer.outputs + first_output + o]) : 0.0f;
    }
    __syncthreads();
    if (works) {
      for (int row = 0; row < rows; ++row) {
        const int pair = row * inputs + thread / channels;
        const float value = smooth ? held.smooth[pair] : held.of_channel(pair, channel);
#pragma unroll
        for (int o = 0; o < kOutputTile; ++o) {
          sums[o] += value * grads[row][o];
        }
      }
    }
    __syncthreads();
  }
  if (works) {
#pragma unroll
    for (int o = 0; o < kOutputTile; ++o) {
      if (o < outputs) {
        const std::int64_t weight = (first_output + o) * layer.inputs + input;
        const std::int64_t knot = weight * layer.bases + channel;
        if (smooth) {
          write<T>(params.gradients.base, weight, sums[o]);
        } else {
          shares[o][thread] = sums[o] * layer.spline.at(0, knot);
          write<T>(params.gradients.spline, knot, sums[o] * layer.scaler.at(0, weight));
        }
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < outputs * inputs; i += kThreads) {
    const int o = i / inputs, column = i % inputs;
    float sum = 0.0f;
    for (int b = 0; b < layer.bases; ++b) {
      sum += shares[o][column * channels + b];
    }
    write<T>(params.gradients.scaler, (first_output + o) * layer.inputs + first_input + column, sum);
  }
}

template <auto kKernel, typename T>
void launch_if_any(const KanParams<T>& params, std::int64_t blocks, const Target& target) {
  if (blocks > 0) {
    launch_blocks<kKernel>(params, blocks, target);
  }
}

template <typename T, int kMost>
void launch_backward(const KanParams<T>& params, const Target& target) {
  const KanLayer<T>& layer = params.layer;
  launch_if_any<kan_inputs_kernel<T, kMost>>(params, layer.rows * divide_up(layer.inputs, kInputTile), target);
  const std::int64_t blocks =
      divide_up(layer.inputs, kThreads / (layer.bases + 1)) * divide_up(layer.outputs, kOutputTile);
  launch_if_any<kan_weights_kernel<T, kMost>>(params, blocks, target);
}

template <typename T>
void KanKernels<T>::forward(const KanLayer<T>& layer, T* out, const Target& target) {
  const KanParams<T> params{layer, nullptr, out, {}};
  const std::int64_t blocks = divide_up(layer.rows, kRowTile) * divide_up(layer.outputs, kWarps);
  layer.order <= 3 ? launch_if_any<kan_forward_kernel<T, 3>>(params, blocks, target)
                   : launch_if_any<kan_forward_kernel<T, kMostOrder>>(params, blocks, target);
}

template <typename T>
void KanKernels<T>::backward(const KanLayer<T>& layer, const T* grad, const KanGradients& gradients,
                             const Target& target) {
  const KanParams<T> params{layer, grad, static_cast<T*>(gradients.x), gradients};
  layer.order <= 3 ? launch_backward<T, 3>(params, target) : launch_backward<T, kMostOrder>(params, target);
}

}  // namespace lesa::cuda
