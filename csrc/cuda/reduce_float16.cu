// reduce for float16 features; one file per dtype, so that they compile side by side.
#include "cuda/reduce.cuh"

namespace lesa::cuda {

template void reduce<float16>(const Reduction<float16>&, double*, const Gradients&, const Target&);

}  // namespace lesa::cuda
