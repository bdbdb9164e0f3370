// What the kernels share that take a row of channels at a time: norm.cu. A row belongs to a team of
// threads, a block or one of its warps, whose members take vectors in turn.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"

namespace lesa::cuda {

// The threads that work on one row.
template <int kMembers>
struct Team {
  static constexpr int kTeams = kThreads / kMembers;  // of a block

  __device__ static int index() { return static_cast<int>(threadIdx.x) / kMembers; }
  __device__ static int member() { return static_cast<int>(threadIdx.x) % kMembers; }
  __device__ static std::int64_t first_row() { return std::int64_t{blockIdx.x} * kTeams + index(); }
  __device__ static std::int64_t row_step() { return std::int64_t{gridDim.x} * kTeams; }

  // From here on, each member sees what all of them have written before.
  __device__ static void wait() {
    if constexpr (kMembers == kWarpThreads) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Combines what the same lane of every warp holds, in a fixed order; each warp gets the results.
  template <typename A, int kCount, typename Combine>
  __device__ static void combine_warps(A (&values)[kCount], const Combine& combine) {
    if constexpr (kMembers > kWarpThreads) {
      __shared__ A of_warps[kCount][kWarps][kWarpThreads];
      const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
      __syncthreads();  // all have read what was left here before
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        of_warps[i][warp][lane] = values[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i] = of_warps[i][0][lane];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) {
          values[i] = combine(values[i], of_warps[i][w][lane]);
        }
      }
    }
  }

  // Combines one value of every member, in a fixed order; all of them get the result.
  template <typename A, typename Combine>
  __device__ static A reduce(A value, const Combine& combine) {
    A values[] = {reduce_warp(value, combine)};
    combine_warps(values, combine);
    return values[0];
  }
};

// A member's share of a row. Rows of up to kSpan channels stay in registers from pass to pass; of longer ones, each
// pass reads its part again.
template <int kWidth, int kMembers>
struct Share {
  static constexpr int kTurns = kRowFloats / kWidth;
  static constexpr int kSpan = kRowFloats * kMembers;

  std::int64_t channels;
  Vector<float, kWidth> values[kTurns];

  __device__ static std::int64_t column(std::int64_t start, int turn) {
    return start + (turn * kMembers + Team<kMembers>::member()) * kWidth;
  }

  // Calls use(column, vector) for the vectors of the row, after read(start, values) for kSpan channels of it unless
  // they are held from the first pass.
  template <bool kFirst, typename Read, typename Use>
  __device__ void pass(const Read& read, const Use& use) {
    for (std::int64_t start = 0; start < channels; start += kSpan) {
      if (kFirst || channels > kSpan) {
        read(start, values);
      }
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        if (column(start, turn) < channels) {
          use(column(start, turn), values[turn]);
        }
      }
    }
  }
};

// As load, of more than 16 bytes too.
template <typename T, int kWidth>
__device__ Vector<T, kWidth> load_vector(const T* address) {
  constexpr int kPart = vector_width(1, sizeof(T));
  Vector<T, kWidth> result;
  if constexpr (kWidth <= kPart) {
    result = load<T, kWidth>(address);
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; e += kPart) {
      const auto part = load<T, kPart>(address + e);
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        result[e + i] = part[i];
      }
    }
  }
  return result;
}

// As store, of more than 16 bytes too; rounds to T.
template <typename T, int kWidth>
__device__ void store_vector(T* address, const Vector<float, kWidth>& vector) {
  constexpr int kPart = std::min(kWidth, vector_width(1, sizeof(T)));
#pragma unroll
  for (int e = 0; e < kWidth; e += kPart) {
    Vector<T, kPart> part;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      part[i] = narrow<T>(vector[e + i]);
    }
    store<T, kPart>(address + e, part);
  }
}

inline bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0; }

// Calls launch.operator()<kWidth, kMembers>() for the kernel that takes such rows: in vectors of kVector channels where
// all tensors are aligned and rows hold whole vectors, else channel by channel, a warp a row whatever its length.
template <int kVector, typename Launch>
void for_rows(const Rows& rows, bool aligned, const Launch& launch) {
  if (rows.count == 0) {
    return;
  }
  if (!aligned || rows.channels % kVector != 0) {
    launch.template operator()<1, kWarpThreads>();
  } else if (rows.channels <= kWarpRow) {
    launch.template operator()<kVector, kWarpThreads>();
  } else {
    launch.template operator()<kVector, kThreads>();
  }
}

// Teams loop over the rows, so that any grid is right; this one fills the device once.
template <auto kKernel, int kMembers, typename Task>
void launch_rows(const Task& task, const Target& target) {
  constexpr int kTeams = Team<kMembers>::kTeams;
  const std::int64_t wanted = (task.rows.count + kTeams - 1) / kTeams;
  launch_blocks<kKernel>(task, std::min<std::int64_t>(wanted, resident_blocks<kKernel>(target)), target);
}

}  // namespace lesa::cuda
