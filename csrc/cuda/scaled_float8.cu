// Scaled rings of float8; one file per dtype, so that they compile side by side.
#include "cuda/scaled.cuh"

namespace lesa::cuda {

template void copy_scaled(const Rows&, const float*, const ScaledSlot<float8>&, const Target&);
template void copy_scaled(const Rows&, const float16*, const ScaledSlot<float8>&, const Target&);
template void copy_scaled(const Rows&, const bfloat16*, const ScaledSlot<float8>&, const Target&);

template void forecast_scaled(const ScaledForecasts<float8, float>&, const Target&);
template void forecast_scaled(const ScaledForecasts<float8, float16>&, const Target&);
template void forecast_scaled(const ScaledForecasts<float8, bfloat16>&, const Target&);

}  // namespace lesa::cuda
