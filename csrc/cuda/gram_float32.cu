// gram for float32 features; one file per dtype, so that they compile side by side.
#include "cuda/gram.cuh"

namespace lesa::cuda {

template void sum_products<float>(const Products<float>&, double*, double*, const Target&);

}  // namespace lesa::cuda
