// combine and copy as C functions.
#include <span>
#include <vector>

#include "entries.h"

using namespace lesa::cuda::entries;

namespace {

template <typename T>
void combine(std::span<const std::int64_t> sizes, std::span<const lesa::Source> sources, int inputs,
             const Values* values) {
  std::vector<lesa::Operand> operands(sources.size());
  const lesa::Geometry geometry = lesa::merge_dimensions(sizes, sources, operands);
  lesa::cuda::combine<T>({geometry, operands, inputs, values[0].as<T>(), values[1].as<T>(), values[2].as<T>()},
                         kTarget);
}

template <typename To, typename From>
void copy(std::span<const std::int64_t> sizes, const lesa::Source* sources) {
  lesa::Operand operands[2]{};
  const lesa::Geometry geometry = lesa::merge_dimensions(sizes, {sources, 2}, operands);
  lesa::cuda::copy<To, From>(geometry, operands[0], operands[1], kTarget);
}

}  // namespace

extern "C" {

const char* run_combine(const char* dtype, int dims, const std::int64_t* sizes, int inputs, int count,
                        const lesa::Source* sources, const Values* values) {
  return guarded([&] {
    for_type(dtype, [&]<typename T>() {
      combine<T>({sizes, static_cast<std::size_t>(dims)}, {sources, static_cast<std::size_t>(count)}, inputs, values);
    });
  });
}

const char* run_copy(const char* to, const char* from, int dims, const std::int64_t* sizes,
                     const lesa::Source* sources) {
  return guarded([&] {
    for_type(to, [&]<typename To>() {
      for_type(from, [&]<typename From>() { copy<To, From>({sizes, static_cast<std::size_t>(dims)}, sources); });
    });
  });
}

}  // extern "C"
