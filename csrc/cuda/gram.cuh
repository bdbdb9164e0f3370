// The kernels of gram: all products of up to 16 inputs with each other and with 1, summed in one pass; then the matrix.
//
// A thread keeps one vector of every input and all sums in registers: each input is read from memory once. Sums:
// float32 over 64 elements of a thread and over a warp, double from there on, in a fixed order without atomics; a block
// whose products leave float32's range sums them again in double. More than 16 inputs are taken two groups of 8 at a
// time: 24 are read twice each, 64 seven times.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/pass.cuh"

namespace lesa::cuda {

// For run_pass.
template <int... kCounts>
struct GramKernels {
  static constexpr int kRowInputs = kGramSharing;
  static constexpr int kElementInputs = kGramInputs;
};

// Where the sum of two inputs' products stands, row <= column: an upper triangle, column by column, so that it does not
// depend on the number of inputs. Row and column 0 are the constant 1, input k is k + 1; place 0, N, is never summed.
__host__ __device__ constexpr int place_of(int row, int column) { return column * (column + 1) / 2 + row; }
__host__ __device__ constexpr int places_of(int inputs) { return place_of(0, inputs + 1); }

// What one launch is told; the last `kInputs - used` inputs do not exist.
template <typename T, int kInputs, int kWidth, bool kStrided>
struct GramTask {
  static constexpr int kBytes = kWidth * sizeof(T);

  void* inputs[kInputs];
  double* partials;  // [places, pitch], a column for each block
  std::int64_t pitch;
  std::int64_t items;
  int used;
  int begun;  // columns of partials that earlier launches have written: blocks add to theirs
  Walk<kStrided, kInputs, kBytes, kBytes> walk;
};

// Adds up each of kCount values over the lanes of a warp: lane l is left with kCount / 32 sums, from number
// l * kCount / 32 on. At each step a lane gives away half of what it has, so that 32 values take 31 shuffles.
template <int kMask = kWarpThreads / 2, int kCount>
__device__ void share_out(float (&values)[kCount], int lane) {
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
    share_out<kMask / 2>(values, lane);
  }
}

// Sums again, in double, what left float32's range in this block: the products of every input whose squares do not fit
// (fits_float), pair by pair and each from memory. `sums` are the block's, by place; `of_warps` has room for one a
// warp.
template <typename T, int kInputs, int kWidth, bool kStrided>
__device__ void sum_in_double(const GramTask<T, kInputs, kWidth, kStrided>& task, double* sums, double* of_warps) {
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
#pragma unroll 1
  for (int column = 1; column <= task.used; ++column) {
#pragma unroll 1
    for (int row = 0; row <= column; ++row) {
      if (fits_float(sums[place_of(column, column)]) && (row == 0 || fits_float(sums[place_of(row, row)]))) {
        continue;  // all threads of the block alike
      }
      double sum = 0.0;
#pragma unroll 1
      for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + thread; item < task.items; item += threads) {
        const auto place = task.walk.place(item);
        const auto load_input = [&](int k) {
          return load<T, kWidth>(advance(task.inputs[k], task.walk.input(k, place)));
        };
        const Vector<T, kWidth> right = load_input(column - 1), left = load_input(row == 0 ? column - 1 : row - 1);
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
    gram_kernel(const __grid_constant__ GramTask<T, kInputs, kWidth, kStrided> task) {
  constexpr int kItems = kStrided ? 1 : items_in_flight(kInputs, kWidth * sizeof(T));
  constexpr int kTurns = kGramTerms / (kItems * kWidth);
  constexpr int kPlaces = places_of(kInputs);
  constexpr int kEach = (kPlaces + kWarpThreads - 1) / kWarpThreads;
  __shared__ double of_warps[kWarps][kEach * kWarpThreads];

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  double totals[kEach] = {};
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  std::int64_t first = std::int64_t{blockIdx.x} * kThreads;  // of the block: all its threads take as many turns
#pragma unroll 1
  while (first < task.items) {
    float sums[kEach * kWarpThreads] = {};
#pragma unroll 1
    for (int turn = 0; turn < kTurns && first < task.items; ++turn, first += kItems * threads) {
      Packed<T, kWidth> inputs[kItems][kInputs];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const std::int64_t item = first + i * threads + thread;
        const auto place = task.walk.place(item);
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          inputs[i][k] = {};
          if (k < task.used && item < task.items) {
            inputs[i][k] = load_packed<T, kWidth>(advance(task.inputs[k], task.walk.input(k, place)));
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
    share_out(sums, lane);
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
  for (int place = thread; place < places_of(task.used); place += kThreads) {
    for (int warp = 1; warp < kWarps; ++warp) {
      sums_of_block[place] += of_warps[warp][place];
    }
  }
  __syncthreads();
  if constexpr (!std::is_same_v<T, float16>) {  // whose products always fit
    sum_in_double(task, sums_of_block, of_warps[1]);
  }
  for (int place = thread; place < places_of(task.used); place += kThreads) {
    double* into = task.partials + place * task.pitch + blockIdx.x;
    *into = (static_cast<int>(blockIdx.x) < task.begun ? *into : 0.0) + sums_of_block[place];
  }
}

// The inputs of one pass: `count` of them, a group from `first` on and, where there are more, another from `second` on.
struct Groups {
  int first;
  int second;
  int count;

  __host__ __device__ int input(int k) const { return k < kGramGroup ? first + k : second + k - kGramGroup; }
};

// What the last kernel is told.
struct GramMatrixTask {
  const double* partials;
  std::int64_t pitch;
  int blocks;  // that have written partials
  Groups groups;
  int num_inputs;
  double numel;
  double* result;  // [num_inputs + 1, num_inputs + 1]
};

// Writes the entries of the matrix for the inputs of two groups.
void write_gram_matrix(const GramMatrixTask& task, const Target& target);

// Columns of partials, one a block: no matter which kernel runs, so that the workspace can be allocated.
inline std::int64_t gram_pitch(const Target& target) { return std::int64_t{multiprocessors(target)} * kResidentBlocks; }

// Returns how many columns of partials there are now.
template <typename T, int kInputs, int kWidth, bool kStrided>
int launch_gram(const Products<T>& products, double* partials, int begun, const Target& target) {
  const auto& [geometry, operands, num_inputs] = products;
  GramTask<T, kInputs, kWidth, kStrided> task{};
  task.partials = partials;
  task.pitch = gram_pitch(target);
  task.items = geometry.numel / kWidth;
  task.used = num_inputs;
  task.begun = begun;
  for (int k = 0; k < num_inputs; ++k) {
    task.inputs[k] = operands[k].data;
  }
  if constexpr (kStrided) {
    task.walk.extent = extent_of(geometry, kWidth);
    for (int k = 0; k < num_inputs; ++k) {
      task.walk.inputs[k] = steps_of(geometry, operands[k], kWidth, sizeof(T));
    }
  }
  const std::int64_t blocks = std::min((task.items + kThreads - 1) / kThreads, task.pitch);
  launch_blocks<gram_kernel<T, kInputs, kWidth, kStrided>>(task, blocks, target);
  return std::max(begun, static_cast<int>(blocks));
}

// The entries of the matrix for the inputs of two groups.
template <typename T>
void gram_of_groups(const Products<T>& products, const Groups& groups, double* workspace, double* result,
                    const Target& target) {
  Products<T> part{products.geometry, {}, groups.count};
  for (int k = 0; k < groups.count; ++k) {
    part.operands.push_back(products.operands[groups.input(k)]);
  }
  int blocks = 0;
  run_pass<sizeof(T)>(GramKernels<2, 5, 9, 12, kGramInputs>{}, part,
                      [&]<int kInputs, int kWidth, bool kStrided>(const Products<T>& launched) {
                        blocks = launch_gram<T, kInputs, kWidth, kStrided>(launched, workspace, blocks, target);
                      });
  const GramMatrixTask task{workspace, gram_pitch(target),  blocks,
                            groups,    products.num_inputs, static_cast<double>(products.geometry.numel),
                            result};
  write_gram_matrix(task, target);
}

template <typename T>
void sum_products(const Products<T>& products, double* workspace, double* result, const Target& target) {
  const int inputs = products.num_inputs;
  for (int second = kGramGroup; second == kGramGroup || second < inputs; second += kGramGroup) {
    for (int first = 0; first < second; first += kGramGroup) {
      const int count = std::min(inputs, kGramGroup) + std::clamp(inputs - second, 0, kGramGroup);
      gram_of_groups(products, Groups{first, second, count}, workspace, result, target);
    }
  }
}

}  // namespace lesa::cuda
