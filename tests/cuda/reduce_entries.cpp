// reduce as C functions.
#include <span>
#include <vector>

#include "entries.h"

using namespace lesa::cuda::entries;

namespace {

template <typename T>
void reduce(std::span<const std::int64_t> sizes, std::span<const lesa::Source> sources, int inputs, bool is_loss,
            const Values* values, double* workspace, const lesa::cuda::Gradients& gradients) {
  std::vector<lesa::Operand> operands(sources.size());
  const lesa::Geometry geometry = lesa::merge_dimensions(sizes, sources, operands);
  lesa::cuda::reduce<T>({geometry, operands, inputs, values[0].as<T>(), values[1].as<T>(), values[2].as<T>(), is_loss},
                        workspace, gradients, kTarget);
}

}  // namespace

extern "C" {

std::int64_t workspace_of_reduce(int inputs) { return lesa::cuda::reduction_workspace(inputs, kTarget); }

const char* run_reduce(const char* dtype, int dims, const std::int64_t* sizes, int inputs, int count,
                       const lesa::Source* sources, bool is_loss, const Values* values, double* workspace,
                       const lesa::cuda::Gradients* gradients) {
  return guarded([&] {
    for_type(dtype, [&]<typename T>() {
      reduce<T>({sizes, static_cast<std::size_t>(dims)}, {sources, static_cast<std::size_t>(count)}, inputs, is_loss,
                values, workspace, *gradients);
    });
  });
}

}  // extern "C"
