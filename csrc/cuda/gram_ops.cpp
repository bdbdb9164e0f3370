// gram: check, lay out, launch. What the op means stands in lesa_kernels/reference.py.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "cuda/entry.h"

namespace lesa::cuda {
namespace {

Tensor gram(const std::vector<Tensor>& features) {
  const char* op = "gram";
  check_features(op, "features", features);
  const Tensor& like = features[0];
  const DeviceGuard guard(like.get_device_index());
  const Target target = target_of(op, like);
  const std::vector<Source> sources = sources_of(features);
  const auto size = static_cast<std::int64_t>(features.size()) + 1;
  Tensor result = fresh(like, {size, size}, ScalarType::Double);
  const Tensor workspace = fresh(like, {gram_workspace(target)}, ScalarType::Double);
  for_feature(like.scalar_type(), [&]<typename T>() {
    Products<T> products{};
    products.operands.resize(features.size());
    products.geometry = lay_out(op, shape_of(like), sources, products.operands);
    products.num_inputs = static_cast<int>(features.size());
    sum_products(products, static_cast<double*>(workspace.data_ptr()), static_cast<double*>(result.data_ptr()), target);
  });
  return result;
}

}  // namespace
}  // namespace lesa::cuda

STABLE_TORCH_LIBRARY_IMPL(lesa, CUDA, m) { m.impl("gram", TORCH_BOX(&lesa::cuda::gram)); }
