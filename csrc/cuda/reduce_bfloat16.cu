// reduce for bfloat16 features; one file per dtype, so that they compile side by side.
#include "cuda/reduce.cuh"

namespace lesa::cuda {

template void reduce<bfloat16>(const Reduction<bfloat16>&, double*, const Gradients&, const Target&);

}  // namespace lesa::cuda
