// combine for bfloat16 features; one file per dtype, so that they compile side by side.
#include "cuda/combine.cuh"

namespace lesa::cuda {

template void combine<bfloat16>(const Combination<bfloat16>&, const Target&);

}  // namespace lesa::cuda
