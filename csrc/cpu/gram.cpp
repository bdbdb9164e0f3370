// gram on the CPU: check, allocate, iterate. What the op means stands in lesa_kernels/ops/gram.py.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/cpu_common.h"

namespace lesa::cpu {
namespace {

// Elements of one partial sum: products of all pairs are many, so there are fewer and larger parts than in predict.cpp.
constexpr std::int64_t kPart = 65536;

Tensor gram(const std::vector<Tensor>& features) {
  check_features("gram", "features", features);
  TensorIterator iterator;
  iterator.add_inputs(features);
  iterator.build("gram", shape_of(features[0]));
  const std::size_t width = features.size() + 1;
  const std::int64_t shape[] = {static_cast<std::int64_t>(width), static_cast<std::int64_t>(width)};
  Tensor result = torch::stable::new_empty(features[0], {shape, 2}, ScalarType::Double);
  auto* entries = static_cast<double*>(result.data_ptr());
  for_feature(features[0].scalar_type(), [&]<typename T>() {
    const auto loop = chosen_isa().of<T>().gram;
    const auto sums =
        sum_in_parts(iterator, kPart, width * width, [&](void* const* pointers, std::int64_t count, double* into) {
          loop(pointers, static_cast<int>(width - 1), count, into);
        });
    for (std::size_t i = 0; i < width; ++i) {
      for (std::size_t j = 0; j <= i; ++j) {
        entries[i * width + j] = entries[j * width + i] = sums[i * width + j];
      }
    }
  });
  entries[width * width - 1] = static_cast<double>(iterator.merged().numel);
  return result;
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) { m.impl("gram", TORCH_BOX(&lesa::cpu::gram)); }
