// What gram shares among dtypes: the workspace, and the kernel that adds up partial sums into the matrix.
#include <algorithm>

#include "cuda/gram.cuh"

namespace lesa::cuda {
namespace {

// Each warp writes one entry of the matrix; those on both sides of the diagonal add up the same numbers.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    gram_matrix_kernel(const __grid_constant__ GramMatrixTask task) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  const int entry = static_cast<int>(blockIdx.x) * kWarps + thread / kWarpThreads, size = task.groups.count + 1;
  if (entry >= size * size) {
    return;
  }
  const int row = entry / size, column = entry % size;
  const double* partials = task.partials + place_of(std::min(row, column), std::max(row, column)) * task.pitch;
  double sum = 0.0;
  for (int block = lane; block < task.blocks; block += kWarpThreads) {
    sum += partials[block];
  }
  sum = sum_of_warp(sum);
  if (lane == 0) {
    const auto index = [&](int which) { return which == 0 ? task.num_inputs : task.groups.input(which - 1); };
    task.result[index(row) * (task.num_inputs + 1) + index(column)] = entry == 0 ? task.numel : sum;
  }
}

}  // namespace

void write_gram_matrix(const GramMatrixTask& task, const Target& target) {
  const int size = task.groups.count + 1;
  launch_blocks<gram_matrix_kernel>(task, (size * size + kWarps - 1) / kWarps, target);
}

std::int64_t gram_workspace(const Target& target) { return places_of(kGramInputs) * gram_pitch(target); }

}  // namespace lesa::cuda
