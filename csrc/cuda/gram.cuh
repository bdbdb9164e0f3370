// The kernels of gram: all products of up to 16 inputs with each other and with 1, summed; then the matrix.
//
// A thread keeps one vector of every input and all sums in registers: each input is read from memory once. Sums:
// float32 over 64 elements of a thread and over a warp, double from there on, in a fixed order without atomics; a block
// whose products leave float32's range sums them again in double. More than 16 inputs are taken two groups of 8 at a
// time: 24 are read twice each, 64 seven times.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"

namespace lesa::cuda {

// Where the sum of two inputs' products stands, row <= column: an upper triangle, column by column, so that it does not
// depend on the number of inputs. Row and column 0 are the constant 1, input k is k + 1; place 0, N, is never summed.
__host__ __device__ constexpr int place_of(int row, int column) { return column * (column + 1) / 2 + row; }
__host__ __device__ constexpr int places_of(int inputs) { return place_of(0, inputs + 1); }

// The last `kInputs - used` inputs do not exist.
template <typename T, int kInputs, int kWidth, bool kStrided>
struct GramParams : FeatureParams<T, kInputs, kWidth, kStrided> {
  double* partials;  // [places, pitch], a column for each block
  std::int64_t pitch;
  int used;
  int begun;  // columns of partials that earlier launches have written: blocks add to theirs
};

// Adds up each of kCount values over the lanes of a warp: lane l is left with kCount / 32 sums, from number
// l * kCount / 32 on. At each step a lane gives away half of what it has, so that 32 values take 31 shuffles.
template <int kMask = kWarpThreads / 2, int kCount>
__device__ void reduce_scatter(float (&values)[kCount], int lane) {
  static_assert(kCount % kWarpThreads == 0);
  constexpr int kHalf = kCount / kWarpThreads * kMask;
  const bool upper = (lane & kMask) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? values[i] : values[i + kHalf];
    const float kept = upper ? values[i + kHalf] : values[i];
    values[i] = kept + __shfl_xor_sync(0xffffffffu, given, kMask);
  }
  if constexpr (kMask > 1) {
    reduce_scatter<kMask / 2>(values, lane);
  }
}

// Sums again, in double, what left float32's range in this block: the products of every input whose squares do not fit
// (fits_float), pair by pair and each from memory. `sums` are the block's, by place; `of_warps` has room for one a
// warp.
template <typename T, int kInputs, int kWidth, bool kStrided>
__device__ void sum_in_double(const GramParams<T, kInputs, kWidth, kStrided>& params, double* sums, double* of_warps) {
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
#pragma unroll 1
  for (int column = 1; column <= params.used; ++column) {
#pragma unroll 1
    for (int row = 0; row <= column; ++row) {
      if (fits_float(sums[place_of(column, column)]) && (row == 0 || fits_float(sums[place_of(row, row)]))) {
        continue;  // all threads of the block alike
      }
      double sum = 0.0;
#pragma unroll 1
      for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + thread; item < params.items; item += threads) {
        const auto position = params.iterator.position(item);
        const auto load = [&](int k) { return std::bit_cast<Vector<T, kWidth>>(params.load_input(k, position)); };
        const Vector<T, kWidth> right = load(column - 1), left = load(row == 0 ? column - 1 : row - 1);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          sum = add_term<double>(sum, row == 0 ? 1.0 : widen(left[e]), widen(right[e]));
        }
      }
      sum = sum_of_warp(sum);
      if (thread % kWarpThreads == 0) {
        of_warps[thread / kWarpThreads] = sum;
      }
      __syncthreads();
      if (thread == 0) {
        sum = 0.0;
        for (int warp = 0; warp < kWarps; ++warp) {
          sum += of_warps[warp];
        }
        sums[place_of(row, column)] = sum;
      }
      __syncthreads();
    }
  }
}

// From 10 inputs on, sums and features do not fit into half of a multiprocessor's registers.
template <int kInputs>
inline constexpr int kGramBlocks = kInputs <= kGramSharing ? kResidentBlocks : 1;

template <typename T, int kInputs, int kWidth, bool kStrided>
__global__ void __launch_bounds__(kThreads, kGramBlocks<kInputs>)
    gram_kernel(const __grid_constant__ GramParams<T, kInputs, kWidth, kStrided> params) {
  constexpr int kItems = kStrided ? 1 : items_in_flight(kInputs, kWidth * sizeof(T));
  constexpr int kRounds = kGramTerms / (kItems * kWidth);
  constexpr int kPlaces = places_of(kInputs);
  constexpr int kEach = (kPlaces + kWarpThreads - 1) / kWarpThreads;
  __shared__ double of_warps[kWarps][kEach * kWarpThreads];

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  double totals[kEach] = {};
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  std::int64_t first = std::int64_t{blockIdx.x} * kThreads;  // of the block: all its threads take as many rounds
#pragma unroll 1
  while (first < params.items) {
    float sums[kEach * kWarpThreads] = {};
#pragma unroll 1
    for (int round = 0; round < kRounds && first < params.items; ++round, first += kItems * threads) {
      Packed<T, kWidth> inputs[kItems][kInputs];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const std::int64_t item = first + i * threads + thread;
        const auto position = params.iterator.position(item);
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          inputs[i][k] = {};
          if (k < params.used && item < params.items) {
            inputs[i][k] = params.load_input(k, position);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          float features[kInputs];
#pragma unroll
          for (int column = 0; column < kInputs; ++column) {
            features[column] = inputs[i][column].widened(e);
            sums[place_of(0, column + 1)] += features[column];
#pragma unroll
            for (int row = 0; row <= column; ++row) {
              float& sum = sums[place_of(row + 1, column + 1)];
              sum = add_term(sum, features[row], features[column]);
            }
          }
        }
      }
    }
    reduce_scatter(sums, lane);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      totals[i] += sums[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    of_warps[thread / kWarpThreads][lane * kEach + i] = totals[i];
  }
  __syncthreads();
  double* sums_of_block = of_warps[0];
  for (int place = thread; place < places_of(params.used); place += kThreads) {
    for (int warp = 1; warp < kWarps; ++warp) {
      sums_of_block[place] += of_warps[warp][place];
    }
  }
  __syncthreads();
  if constexpr (!std::is_same_v<T, float16>) {  // whose products always fit
    sum_in_double(params, sums_of_block, of_warps[1]);
  }
  for (int place = thread; place < places_of(params.used); place += kThreads) {
    double* into = params.partials + place * params.pitch + blockIdx.x;
    *into = (static_cast<int>(blockIdx.x) < params.begun ? *into : 0.0) + sums_of_block[place];
  }
}

// The inputs that are multiplied together: `count` of them, a group from `first` on and, where there are more, another
// from `second` on.
struct Groups {
  int first;
  int second;
  int count;

  __host__ __device__ int input(int k) const { return k < kGramGroup ? first + k : second + k - kGramGroup; }
};

struct GramMatrixParams {
  const double* partials;
  std::int64_t pitch;
  int blocks;  // that have written partials
  Groups groups;
  int num_inputs;
  double numel;
  double* result;  // [num_inputs + 1, num_inputs + 1]
};

// Writes the entries of the matrix for the inputs of two groups, one a warp; those on both sides of the diagonal add up
// the same numbers.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    gram_matrix_kernel(const __grid_constant__ GramMatrixParams params) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  const int entry = static_cast<int>(blockIdx.x) * kWarps + thread / kWarpThreads, size = params.groups.count + 1;
  if (entry >= size * size) {
    return;
  }
  const int row = entry / size, column = entry % size;
  const double* partials = params.partials + place_of(std::min(row, column), std::max(row, column)) * params.pitch;
  double sum = 0.0;
  for (int block = lane; block < params.blocks; block += kWarpThreads) {
    sum += partials[block];
  }
  sum = sum_of_warp(sum);
  if (lane == 0) {
    const auto index = [&](int which) { return which == 0 ? params.num_inputs : params.groups.input(which - 1); };
    params.result[index(row) * (params.num_inputs + 1) + index(column)] = entry == 0 ? params.numel : sum;
  }
}

template <typename T>
std::int64_t GramKernels<T>::workspace(const Target& target) {
  return places_of(kGramInputs) * most_partials(target);
}

// Returns how many columns of partials there are now.
template <typename T, int kInputs, int kWidth, bool kStrided>
int launch_gram(const Tensors& tensors, double* partials, int begun, const Target& target) {
  GramParams<T, kInputs, kWidth, kStrided> params{};
  params.partials = partials;
  params.pitch = most_partials(target);
  params.used = tensors.num_inputs;
  params.begun = begun;
  params.set_tensors(tensors, tensors.num_inputs, 0);
  return launch_partials<gram_kernel<T, kInputs, kWidth, kStrided>>(params, target);
}

// Sums and writes the entries of the matrix for the inputs of two groups.
template <typename T>
void gram_of_groups(const Tensors& tensors, const Groups& groups, double* workspace, double* result,
                    const Target& target) {
  Tensors chosen{tensors.merged, {}, groups.count};
  for (int k = 0; k < groups.count; ++k) {
    chosen.operands.push_back(tensors.operands[groups.input(k)]);
  }
  int blocks = 0;
  launch_parts<sizeof(T)>(KernelSizes<kGramSharing, kGramInputs, 2, 5, 9, 12, kGramInputs>{}, chosen,
                          [&]<int kInputs, int kWidth, bool kStrided>(const Tensors& part) {
                            blocks = launch_gram<T, kInputs, kWidth, kStrided>(part, workspace, blocks, target);
                          });
  const GramMatrixParams params{workspace, most_partials(target), blocks,
                                groups,    tensors.num_inputs,    static_cast<double>(tensors.merged.numel),
                                result};
  const int size = groups.count + 1;
  launch_blocks<gram_matrix_kernel<T>>(params, divide_up(size * size, kWarps), target);
}

template <typename T>
void GramKernels<T>::sum_products(const Tensors& tensors, double* workspace, double* result, const Target& target) {
  const int inputs = tensors.num_inputs;
  for (int second = kGramGroup; second == kGramGroup || second < inputs; second += kGramGroup) {
    for (int first = 0; first < second; first += kGramGroup) {
      const int count = std::min(inputs, kGramGroup) + std::clamp(inputs - second, 0, kGramGroup);
      gram_of_groups<T>(tensors, {first, second, count}, workspace, result, target);
    }
  }
}

}  // namespace lesa::cuda
