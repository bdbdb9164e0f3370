// How a pass over K inputs and further tensors is launched: which kernel takes it, and in how many parts.
//
// A pass has a geometry, operands, num_inputs, and element_size(i) of operand i.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"

namespace lesa::cuda {

// The kernels of combine, reduce and copy, for run_pass: those of kCounts inputs take contiguous tensors in their
// widest vectors, that of kRowInputs narrower vectors, rows and up to as many inputs one by one, that of kElementInputs
// the rest.
template <int... kCounts>
struct FeatureKernels {
  static constexpr int kRowInputs = kExactInputs;
  static constexpr int kElementInputs = kMostInputs;
};

// The part of a pass that has `count` indices along the first dimension, from `start` on.
template <typename Pass>
Pass slice(Pass pass, std::int64_t start, std::int64_t count) {
  pass.geometry.numel = pass.geometry.numel / pass.geometry.sizes[0] * count;
  pass.geometry.sizes[0] = count;
  for (std::size_t i = 0; i < pass.operands.size(); ++i) {
    Operand& operand = pass.operands[i];
    operand.data = advance(operand.data, start * operand.strides[0] * pass.element_size(i));
  }
  return pass;
}

// The part of a pass at one index along the first dimension, without that dimension.
template <typename Pass>
Pass at_first(const Pass& pass, std::int64_t index) {
  Pass part = slice(pass, index, 1);
  std::shift_left(std::begin(part.geometry.sizes), std::end(part.geometry.sizes), 1);
  part.geometry.contiguous = --part.geometry.dims == 1;
  for (Operand& operand : part.operands) {
    std::shift_left(std::begin(operand.strides), std::end(operand.strides), 1);
    part.geometry.contiguous = part.geometry.contiguous && operand.strides[0] == 1;
  }
  return part;
}

// Whether all tensors can be walked in vectors of `width` elements.
template <typename Pass>
bool takes_vectors(const Pass& pass, int width) {
  const int last = pass.geometry.dims - 1;
  bool fits = pass.geometry.sizes[last] % width == 0;
  for (std::size_t i = 0; i < pass.operands.size(); ++i) {
    const Operand& operand = pass.operands[i];
    fits = fits && reinterpret_cast<std::uintptr_t>(operand.data) % (width * pass.element_size(i)) == 0 &&
           operand.strides[last] == 1 &&
           std::all_of(operand.strides, operand.strides + last, [&](std::int64_t s) { return s % width == 0; });
  }
  return fits;
}

// Vectors that contiguous tensors have at the same places: of `width` elements, the first one after `head` elements.
struct Alignment {
  int width;
  int head;
};

// The widest ones, of at most `most` elements.
template <typename Pass>
Alignment alignment_of(const Pass& pass, int most) {
  const auto place = [&](std::size_t i) {  // of the first element among vectors
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(pass.operands[i].data) / pass.element_size(i) % most);
  };
  int width = most;
  for (std::size_t i = 1; i < pass.operands.size(); ++i) {
    while ((place(i) - place(0)) % width != 0) {
      width /= 2;
    }
  }
  return {width, (width - place(0) % width) % width};
}

// Launches the kernel of kInputs for contiguous tensors in vectors of `width`, at most kWidest.
template <int kInputs, int kWidest, typename Pass, typename Launch>
void launch_width(const Pass& pass, int width, const Launch& launch) {
  if constexpr (kWidest > 1) {
    if (width < kWidest) {
      return launch_width<kInputs, kWidest / 2>(pass, width, launch);
    }
  }
  launch.template operator()<kInputs, kWidest, false>(pass);
}

// Contiguous tensors: in the widest vectors that they have at the same places, and the elements before and behind these
// one by one.
template <int kBytes, template <int...> typename Family, int... kCounts, typename Pass, typename Launch>
void run_contiguous(Family<kCounts...>, const Pass& pass, const Launch& launch) {
  constexpr int kRowInputs = Family<kCounts...>::kRowInputs, kElementInputs = Family<kCounts...>::kElementInputs;
  int count = 0, widest = 1;
  ((count = count == 0 && pass.num_inputs <= kCounts ? kCounts : count), ...);
  if (count > 0) {
    widest = vector_width(count, kBytes);
  }
  auto [width, head] = alignment_of(pass, widest);
  const bool narrow = width < widest;
  if (narrow && pass.num_inputs > kRowInputs) {
    width = 1;
  }
  const auto launch_elements = [&](std::int64_t start, std::int64_t elements) {
    if (elements > 0) {
      const Pass part = slice(pass, start, elements);
      part.num_inputs <= kRowInputs ? launch.template operator()<kRowInputs, 1, false>(part)
                                    : launch.template operator()<kElementInputs, 1, false>(part);
    }
  };
  const std::int64_t numel = pass.geometry.numel, whole = (numel - head) / width * width;
  if (width == 1 || whole <= 0) {
    return launch_elements(0, numel);
  }
  launch_elements(0, head);
  const Pass body = slice(pass, head, whole);
  if (narrow) {
    launch_width<kRowInputs, vector_width(kRowInputs, kBytes)>(body, width, launch);
  } else {
    ((count == kCounts ? launch.template operator()<kCounts, vector_width(kCounts, kBytes), false>(body) : void()),
     ...);
  }
  launch_elements(head + whole, numel - head - whole);
}

// Calls launch.operator()<kInputs, kWidth, kStrided>(part) for the parts of a pass. kBytes: of its largest element.
template <int kBytes, template <int...> typename Family, int... kCounts, typename Pass, typename Launch>
void run_pass(Family<kCounts...> kernels, const Pass& pass, const Launch& launch) {
  constexpr int kRowInputs = Family<kCounts...>::kRowInputs, kElementInputs = Family<kCounts...>::kElementInputs;
  const Geometry& geometry = pass.geometry;
  if (geometry.numel == 0) {
    return;
  }
  if (geometry.contiguous) {
    return run_contiguous<kBytes>(kernels, pass, launch);
  }
  if (geometry.dims > kWalkedDims || (geometry.dims > 1 && geometry.numel / geometry.sizes[0] > kMostStrided)) {
    for (std::int64_t i = 0; i < geometry.sizes[0]; ++i) {
      run_pass<kBytes>(kernels, at_first(pass, i), launch);
    }
    return;
  }
  if (geometry.numel > kMostStrided) {
    const std::int64_t half = geometry.sizes[0] / 2;
    run_pass<kBytes>(kernels, slice(pass, 0, half), launch);
    run_pass<kBytes>(kernels, slice(pass, half, geometry.sizes[0] - half), launch);
    return;
  }
  constexpr int kRowWidth = vector_width(kRowInputs, kBytes);
  if (pass.num_inputs > kRowInputs) {
    launch.template operator()<kElementInputs, 1, true>(pass);
  } else if (takes_vectors(pass, kRowWidth)) {
    launch.template operator()<kRowInputs, kRowWidth, true>(pass);
  } else {
    launch.template operator()<kRowInputs, 1, true>(pass);
  }
}

}  // namespace lesa::cuda
