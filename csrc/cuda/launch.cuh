// How kernels are launched, and how tensors are divided among launches.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

namespace lesa::cuda {

constexpr std::int64_t divide_up(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

inline void check(cudaError_t error, const Target& target) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("lesa::") + target.op + ": CUDA error: " + cudaGetErrorString(error));
  }
}

// Permits this thread to load kernels and to query attributes while it captures a graph, which CUDA refuses by default:
// neither is work for a stream. A kernel is loaded onto a device when it is first used.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Target& target) { check(cudaThreadExchangeStreamCaptureMode(&mode_), target); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A number that belongs to a device, queried once; it is never 0.
template <typename Query>
int cached(std::array<std::atomic<int>, 128>& known, const Target& target, const Query& query) {
  auto& entry = known.at(target.device);
  int value = entry.load(std::memory_order_relaxed);
  if (value == 0) {
    const RelaxedCapture relaxed(target);
    value = query();
    entry.store(value, std::memory_order_relaxed);
  }
  return value;
}

inline int multiprocessors(const Target& target) {
  static std::array<std::atomic<int>, 128> known{};
  return cached(known, target, [&] {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, target.device), target);
    return count;
  });
}

// How many blocks of kBlock threads of a kernel the device holds at a time.
template <auto kKernel, int kBlock>
int resident_blocks(const Target& target) {
  static std::array<std::atomic<int>, 128> known{};
  return cached(known, target, [&] {
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, kBlock, 0), target);
    return multiprocessors(target) * each;
  });
}

// Loads a kernel, unless the device has it: the launch may be captured, and would load it then.
template <auto kKernel>
void load_kernel(const Target& target) {
  static std::array<std::atomic<int>, 128> known{};
  cached(known, target, [&] {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kKernel), target);
    return 1;
  });
}

template <auto kKernel, int kBlock = kThreads, typename Params>
void launch_blocks(const Params& params, std::int64_t blocks, const Target& target) {
  static_assert(sizeof(Params) <= 4096, "every driver passes this much, only newer ones more");
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::runtime_error(std::string("lesa::") + target.op + ": needs " + std::to_string(blocks) +
                             " blocks, a grid has at most 2147483647");
  }
  load_kernel<kKernel>(target);
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(kKernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlock), arguments, 0, target.stream),
        target);
}

// Threads loop over the items, so that any grid is right; this one fills the device once.
template <auto kKernel, int kBlock = kThreads, typename Params>
void launch(const Params& params, int items_per_thread, const Target& target) {
  const std::int64_t wanted = divide_up(params.items, std::int64_t{kBlock} * items_per_thread);
  launch_blocks<kKernel, kBlock>(params, std::min<std::int64_t>(wanted, resident_blocks<kKernel, kBlock>(target)),
                                 target);
}

// How many blocks write partial sums at most: a number that does not depend on the kernel, so that the workspace can be
// allocated.
inline std::int64_t most_partials(const Target& target) {
  return std::int64_t{multiprocessors(target)} * kResidentBlocks;
}

// Launches a kernel whose blocks each write partial sums, and add to theirs if it is among the first params.begun.
// Returns how many blocks have written partial sums now.
template <auto kKernel, typename Params>
int launch_partials(const Params& params, const Target& target) {
  const std::int64_t blocks = std::min(divide_up(params.items, kThreads), most_partials(target));
  launch_blocks<kKernel>(params, blocks, target);
  return std::max(params.begun, static_cast<int>(blocks));
}

// The sizes that a kernel exists in: those of kCounts inputs take contiguous tensors in their widest vectors, that of
// kRowInputs narrower vectors, rows and up to as many inputs one by one, that of kElementInputs the rest.
template <int kRowInputs, int kElementInputs, int... kCounts>
struct KernelSizes {};

// `count` indices along the first dimension, from `start` on.
inline Tensors slice(Tensors tensors, std::int64_t start, std::int64_t count) {
  tensors.merged.numel = tensors.merged.numel / tensors.merged.sizes[0] * count;
  tensors.merged.sizes[0] = count;
  for (Operand& operand : tensors.operands) {
    operand.data = advance(operand.data, start * operand.strides[0] * operand.bytes);
  }
  return tensors;
}

// One index along the first dimension, without that dimension.
inline Tensors select(const Tensors& tensors, std::int64_t index) {
  Tensors part = slice(tensors, index, 1);
  std::shift_left(std::begin(part.merged.sizes), std::end(part.merged.sizes), 1);
  part.merged.contiguous = --part.merged.dims == 1;
  for (Operand& operand : part.operands) {
    std::shift_left(std::begin(operand.strides), std::end(operand.strides), 1);
    part.merged.contiguous = part.merged.contiguous && operand.strides[0] == 1;
  }
  return part;
}

// Whether the rows of all tensors consist of aligned vectors of `width` elements.
inline bool has_vectors(const Tensors& tensors, int width) {
  const int last = tensors.merged.dims - 1;
  return tensors.merged.sizes[last] % width == 0 &&
         std::all_of(tensors.operands.begin(), tensors.operands.end(), [&](const Operand& operand) {
           return reinterpret_cast<std::uintptr_t>(operand.data) % (width * operand.bytes) == 0 &&
                  operand.strides[last] == 1 &&
                  std::all_of(operand.strides, operand.strides + last, [&](std::int64_t s) { return s % width == 0; });
         });
}

// Vectors that contiguous tensors have at the same places: of `width` elements, the first one after `head` elements.
struct Alignment {
  int width;
  int head;
};

// The widest ones, of at most `most` elements.
inline Alignment alignment_of(const Tensors& tensors, int most) {
  const auto place = [&](const Operand& operand) {  // of the first element among vectors
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(operand.data) / operand.bytes % most);
  };
  const int first = place(tensors.operands[0]);
  int width = most;
  for (const Operand& operand : tensors.operands) {
    while ((place(operand) - first) % width != 0) {
      width /= 2;
    }
  }
  return {width, (width - first % width) % width};
}

// Launches the kernel of kInputs for contiguous tensors in vectors of `width`, at most kWidest.
template <int kInputs, int kWidest, typename Launch>
void launch_width(const Tensors& tensors, int width, const Launch& launch) {
  if constexpr (kWidest > 1) {
    if (width < kWidest) {
      return launch_width<kInputs, kWidest / 2>(tensors, width, launch);
    }
  }
  launch.template operator()<kInputs, kWidest, false>(tensors);
}

// Contiguous tensors: in the widest vectors that they have at the same places, and the elements before and behind these
// one by one.
template <int kBytes, int kRowInputs, int kElementInputs, int... kCounts, typename Launch>
void launch_contiguous(KernelSizes<kRowInputs, kElementInputs, kCounts...>, const Tensors& tensors,
                       const Launch& launch) {
  int count = 0, widest = 1;
  ((count = count == 0 && tensors.num_inputs <= kCounts ? kCounts : count), ...);
  if (count > 0) {
    widest = vector_width(count, kBytes);
  }
  auto [width, head] = alignment_of(tensors, widest);
  const bool narrow = width < widest;
  if (narrow && tensors.num_inputs > kRowInputs) {
    width = 1;
  }
  const auto launch_elements = [&](std::int64_t start, std::int64_t elements) {
    if (elements > 0) {
      const Tensors part = slice(tensors, start, elements);
      part.num_inputs <= kRowInputs ? launch.template operator()<kRowInputs, 1, false>(part)
                                    : launch.template operator()<kElementInputs, 1, false>(part);
    }
  };
  const std::int64_t numel = tensors.merged.numel, whole = (numel - head) / width * width;
  if (width == 1 || whole <= 0) {
    return launch_elements(0, numel);
  }
  launch_elements(0, head);
  const Tensors body = slice(tensors, head, whole);
  if (narrow) {
    launch_width<kRowInputs, vector_width(kRowInputs, kBytes)>(body, width, launch);
  } else {
    ((count == kCounts ? launch.template operator()<kCounts, vector_width(kCounts, kBytes), false>(body) : void()),
     ...);
  }
  launch_elements(head + whole, numel - head - whole);
}

// Calls launch.operator()<kInputs, kWidth, kStrided>(part) for parts that make up the tensors. kBytes: of the largest
// element.
template <int kBytes, int kRowInputs, int kElementInputs, int... kCounts, typename Launch>
void launch_parts(KernelSizes<kRowInputs, kElementInputs, kCounts...> kernels, const Tensors& tensors,
                  const Launch& launch) {
  const MergedShape& merged = tensors.merged;
  if (merged.numel == 0) {
    return;
  }
  if (merged.contiguous) {
    return launch_contiguous<kBytes>(kernels, tensors, launch);
  }
  if (merged.dims > kKernelDims || (merged.dims > 1 && merged.numel / merged.sizes[0] > kMostStrided)) {
    for (std::int64_t i = 0; i < merged.sizes[0]; ++i) {
      launch_parts<kBytes>(kernels, select(tensors, i), launch);
    }
    return;
  }
  if (merged.numel > kMostStrided) {
    const std::int64_t half = merged.sizes[0] / 2;
    launch_parts<kBytes>(kernels, slice(tensors, 0, half), launch);
    launch_parts<kBytes>(kernels, slice(tensors, half, merged.sizes[0] - half), launch);
    return;
  }
  constexpr int kRowWidth = vector_width(kRowInputs, kBytes);
  if (tensors.num_inputs > kRowInputs) {
    launch.template operator()<kElementInputs, 1, true>(tensors);
  } else if (has_vectors(tensors, kRowWidth)) {
    launch.template operator()<kRowInputs, kRowWidth, true>(tensors);
  } else {
    launch.template operator()<kRowInputs, 1, true>(tensors);
  }
}

}  // namespace lesa::cuda
