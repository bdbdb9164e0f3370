// What reduce shares among dtypes: the workspace.
#include "cuda/reduce.cuh"

namespace lesa::cuda {

std::int64_t reduction_workspace(int num_inputs, const Target& target) {
  return most_partials(target) * (num_inputs + 2);
}

}  // namespace lesa::cuda
