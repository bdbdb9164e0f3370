// gram for bfloat16 features; one file per dtype, so that they compile side by side.
#include "cuda/gram.cuh"

namespace lesa::cuda {

template void sum_products<bfloat16>(const Products<bfloat16>&, double*, double*, const Target&);

}  // namespace lesa::cuda
