// gram for float16 features; one file per dtype, so that they compile side by side.
#include "cuda/gram.cuh"

namespace lesa::cuda {

template void sum_products<float16>(const Products<float16>&, double*, double*, const Target&);

}  // namespace lesa::cuda
