// combine for float16 features; one file per dtype, so that they compile side by side.
#include "cuda/combine.cuh"

namespace lesa::cuda {

template void combine<float16>(const Combination<float16>&, const Target&);

}  // namespace lesa::cuda
