// Scaled rings of int8; one file per dtype, so that they compile side by side.
#include "cuda/scaled.cuh"

namespace lesa::cuda {

template void copy_scaled(const Rows&, const float*, const ScaledSlot<std::int8_t>&, const Target&);
template void copy_scaled(const Rows&, const float16*, const ScaledSlot<std::int8_t>&, const Target&);
template void copy_scaled(const Rows&, const bfloat16*, const ScaledSlot<std::int8_t>&, const Target&);

template void forecast_scaled(const ScaledForecasts<std::int8_t, float>&, const Target&);
template void forecast_scaled(const ScaledForecasts<std::int8_t, float16>&, const Target&);
template void forecast_scaled(const ScaledForecasts<std::int8_t, bfloat16>&, const Target&);

}  // namespace lesa::cuda
