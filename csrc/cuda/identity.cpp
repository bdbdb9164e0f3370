// identity on CUDA, the smallest op: check, allocate, launch, register. What it means stands in
// lesa_kernels/ops/identity.py.
#include <torch/csrc/stable/library.h>

#include "cuda/cuda_common.h"

namespace lesa::cuda {
namespace {

Tensor identity(const Tensor& feature) {
  check_feature("identity", {"feature"}, feature);
  Tensor out = fresh_like(feature);
  const Tensors tensors = merge_tensors("identity", shape_of(out), {view_of(feature), view_of(out)}, 1);
  const DeviceGuard guard(feature.get_device_index());
  const Target target = target_of("identity", feature);
  for_feature(feature.scalar_type(), [&]<typename T>() { IdentityKernels<T>::copy(T{}, tensors, target); });
  return out;
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) { m.impl("identity", TORCH_BOX(&lesa::cuda::identity)); }
