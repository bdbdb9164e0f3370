// gram on CUDA: check, allocate, launch. What the op means stands in lesa_kernels/ops/gram.py.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "cuda/cuda_common.h"

namespace lesa::cuda {
namespace {

Tensor gram(const std::vector<Tensor>& features) {
  check_features("gram", "features", features);
  const Tensor& like = features[0];
  const DeviceGuard guard(like.get_device_index());
  const Target target = target_of("gram", like);
  const Tensors tensors = merge_tensors("gram", shape_of(like), views_of(features), features.size());
  const auto size = static_cast<std::int64_t>(features.size()) + 1;
  Tensor result = fresh(like, {size, size}, ScalarType::Double);
  for_feature(like.scalar_type(), [&]<typename T>() {
    const Tensor workspace = fresh(like, {GramKernels<T>::workspace(target)}, ScalarType::Double);
    GramKernels<T>::sum_products(tensors, static_cast<double*>(workspace.data_ptr()),
                                 static_cast<double*>(result.data_ptr()), target);
  });
  return result;
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) { m.impl("gram", TORCH_BOX(&lesa::cuda::gram)); }
