// reduce for float32 features; one file per dtype, so that they compile side by side.
#include "cuda/reduce.cuh"

namespace lesa::cuda {

template void reduce<float>(const Reduction<float>&, double*, const Gradients&, const Target&);

std::int64_t reduction_workspace(int num_inputs, const Target& target) {
  return most_partials(target) * (num_inputs + 2);
}

}  // namespace lesa::cuda
