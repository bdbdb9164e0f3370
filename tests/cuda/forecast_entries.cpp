// combine as a C function, and how tensors are divided among launches.
#include "cuda/launch.cuh"
#include "entries.h"

using namespace lesa::cuda::entries;

namespace {

// One launch over a tensor of bytes.
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
std::int64_t parts_of(int dims, const std::int64_t* sizes, const std::int64_t* strides, Part* parts,
                      std::int64_t room) {
  char* const data = reinterpret_cast<char*>(std::uintptr_t{1} << 40);
  const lesa::TensorView view{data, strides, 1};
  std::int64_t count = 0;
  lesa::cuda::launch_parts<1>(lesa::cuda::KernelSizes<8, 64, 1>{}, tensors_of(dims, sizes, 1, &view, 1),
                              [&]<int, int, bool kStrided>(const lesa::cuda::Tensors& part) {
                                if (count < room) {
                                  const char* first = static_cast<char*>(part.operands[0].data);
                                  parts[count] = {first - data, part.merged.numel, kStrided};
                                }
                                ++count;
                              });
  return count;
}

const char* run_combine(const char* dtype, int dims, const std::int64_t* sizes, int inputs, int count,
                        const lesa::TensorView* views, const Values* values) {
  return guarded([&] {
    for_type(dtype, [&]<typename T>() {
      lesa::cuda::ForecastKernels<T>::combine(tensors_of(dims, sizes, count, views, inputs), map_of<T>(values),
                                              kTarget);
    });
  });
}

}  // extern "C"
