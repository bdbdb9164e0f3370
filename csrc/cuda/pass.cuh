// How a pass over K inputs and further tensors is launched: which kernel takes it, and in how many parts.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"

namespace lesa::cuda {

// The kernels of combine and reduce, for run_pass.
template <int... kCounts>
struct FeatureKernels {
  static constexpr int kRowInputs = kExactInputs;
  static constexpr int kElementInputs = kMostInputs;
};

// Contiguous, aligned tensors: vectors, then one by one the few elements that are left.
template <typename T, int kInputs, typename Pass, typename Launch, typename LaunchElements>
void launch_vectors(const Pass& pass, const Launch& launch, const LaunchElements& launch_elements) {
  constexpr int kWidth = vector_width(kInputs, sizeof(T));
  const std::int64_t whole = pass.geometry.numel / kWidth * kWidth;
  if (whole > 0) {
    launch.template operator()<kInputs, kWidth, false>(pass);
  }
  if (whole < pass.geometry.numel) {
    Pass rest = pass;
    rest.geometry = from_element(rest.geometry, whole);
    for (Operand& operand : rest.operands) {
      operand = from_element(operand, whole, sizeof(T));
    }
    launch_elements(rest);
  }
}

// Calls launch.operator()<kInputs, kWidth, kStrided>(part) for the parts of a pass (it has a geometry, operands and
// num_inputs). Contiguous, aligned tensors go to the kernel of the first of kCounts that holds the inputs, in vectors;
// other aligned rows to the strided kernel of kRowInputs, in vectors; the rest one element at a time.
template <typename T, template <int...> typename Family, int... kCounts, typename Pass, typename Launch>
void run_pass(Family<kCounts...> kernels, const Pass& pass, const Launch& launch) {
  using Kernels = Family<kCounts...>;
  const Geometry& geometry = pass.geometry;
  if (geometry.numel == 0) {
    return;
  }
  if (geometry.dims > kWalkedDims) {
    Pass part = pass;
    part.geometry = without_first(geometry);
    for (std::int64_t i = 0; i < geometry.sizes[0]; ++i) {
      std::transform(pass.operands.begin(), pass.operands.end(), part.operands.begin(),
                     [i](const Operand& operand) { return at_first(operand, i, sizeof(T)); });
      run_pass<T>(kernels, part, launch);
    }
    return;
  }
  const auto fits = [&](int width) {
    return std::all_of(pass.operands.begin(), pass.operands.end(),
                       [&](const Operand& operand) { return takes_vectors(geometry, operand, width, sizeof(T)); });
  };
  const auto launch_elements = [&](const Pass& part) {
    part.num_inputs <= Kernels::kRowInputs ? launch.template operator()<Kernels::kRowInputs, 1, true>(part)
                                           : launch.template operator()<Kernels::kElementInputs, 1, true>(part);
  };
  constexpr int kRowWidth = vector_width(Kernels::kRowInputs, sizeof(T));
  int count = 0;
  ((count = count == 0 && pass.num_inputs <= kCounts ? kCounts : count), ...);
  if (count > 0 && geometry.dims == 1 && fits(vector_width(count, sizeof(T)))) {
    ((count == kCounts ? launch_vectors<T, kCounts>(pass, launch, launch_elements) : void()), ...);
  } else if (pass.num_inputs <= Kernels::kRowInputs && fits(kRowWidth)) {
    launch.template operator()<Kernels::kRowInputs, kRowWidth, true>(pass);
  } else {
    launch_elements(pass);
  }
}

}  // namespace lesa::cuda
