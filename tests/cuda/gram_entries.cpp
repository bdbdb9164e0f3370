// gram as C functions.
#include <span>
#include <vector>

#include "entries.h"

using namespace lesa::cuda::entries;

extern "C" {

std::int64_t workspace_of_gram() { return lesa::cuda::gram_workspace(kTarget); }

const char* run_gram(const char* dtype, int dims, const std::int64_t* sizes, int inputs, const lesa::Source* sources,
                     double* workspace, double* result) {
  return guarded([&] {
    std::vector<lesa::Operand> operands(inputs);
    const lesa::Geometry geometry = lesa::merge_dimensions({sizes, static_cast<std::size_t>(dims)},
                                                           {sources, static_cast<std::size_t>(inputs)}, operands);
    for_type(dtype, [&]<typename T>() {
      lesa::cuda::sum_products<T>({geometry, operands, inputs}, workspace, result, kTarget);
    });
  });
}

}  // extern "C"
