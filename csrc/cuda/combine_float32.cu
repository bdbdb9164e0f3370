// combine for float32 features; one file per dtype, so that they compile side by side.
#include "cuda/combine.cuh"

namespace lesa::cuda {

template void combine<float>(const Combination<float>&, const Target&);

}  // namespace lesa::cuda
