// identity on the CPU, the smallest op: check, allocate, iterate, register. What it means stands in
// lesa_kernels/ops/identity.py.
#include <torch/csrc/stable/library.h>

#include "cpu/cpu_common.h"

namespace lesa::cpu {
namespace {

Tensor identity(const Tensor& feature) {
  check_feature("identity", {"feature"}, feature);
  Tensor out = fresh_pages_like(feature);
  TensorIterator iterator;
  iterator.add_output(out);
  iterator.add_input(feature);
  iterator.build("identity", shape_of(out));
  for_feature(feature.scalar_type(), [&]<typename T>() { run_copy<T, T>(iterator); });
  return out;
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) { m.impl("identity", TORCH_BOX(&lesa::cpu::identity)); }
