// combine and copy as C functions, and how passes are divided.
#include <span>
#include <vector>

#include "cuda/pass.cuh"
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

// A pass over one tensor of bytes, and one launch of it.
struct Bytes {
  lesa::Geometry geometry;
  std::vector<lesa::Operand> operands;
  int num_inputs = 1;

  static constexpr std::int64_t element_size(std::size_t) { return 1; }
};

struct Part {
  std::int64_t first;  // from the tensor's beginning
  std::int64_t numel;
  bool strided;
};

}  // namespace

extern "C" {

std::int64_t quotient(std::int64_t number, std::int64_t size) {
  return lesa::Divisor(size).quotient(static_cast<std::uint32_t>(number));
}

// Writes at most `room` launches and returns how many there are. The tensor is never read.
std::int64_t parts_of_pass(int dims, const std::int64_t* sizes, const std::int64_t* strides, Part* parts,
                           std::int64_t room) {
  char* const data = reinterpret_cast<char*>(std::uintptr_t{1} << 40);
  const lesa::Source source{data, strides};
  Bytes pass{{}, std::vector<lesa::Operand>(1)};
  pass.geometry = lesa::merge_dimensions({sizes, static_cast<std::size_t>(dims)}, {&source, 1}, pass.operands);
  std::int64_t count = 0;
  lesa::cuda::run_pass<1>(lesa::cuda::FeatureKernels<1>{}, pass, [&]<int, int, bool kStrided>(const Bytes& part) {
    if (count < room) {
      parts[count] = {static_cast<char*>(part.operands[0].data) - data, part.geometry.numel, kStrided};
    }
    ++count;
  });
  return count;
}

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
