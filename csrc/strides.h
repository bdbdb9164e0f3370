// Merges the dimensions of several tensors of one shape as far as all their strides allow. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <span>

namespace lesa {

// Dimensions that are left after merging; contiguous tensors need 1, padded rows 2.
inline constexpr int kMaxDims = 16;

// A tensor before merging: its first element, its strides in elements, one per dimension of the shape, and the bytes of
// an element.
struct TensorView {
  void* data;
  const std::int64_t* strides;
  std::int64_t bytes;
};

// A tensor after merging: the same, with its strides along the merged dimensions.
struct Operand {
  void* data;
  std::int64_t strides[kMaxDims];
  std::int64_t bytes;
};

// Merged dimensions, the last one innermost. There is always at least one.
struct MergedShape {
  std::int64_t numel;
  std::int64_t sizes[kMaxDims];
  int dims;
  bool contiguous;  // one dimension, and every operand's stride is 1
};

// Divides by a size without a division, which a GPU has no instruction for: multiply by magic = ceil(2^(31 + shift) /
// size), where 2^shift is the next power of two from size on. Exact for numbers and sizes below 2^31.
struct Divisor {
  std::uint32_t size;
  std::uint32_t magic;
  int shift;

  constexpr Divisor() : Divisor(1) {}
  constexpr explicit Divisor(std::int64_t size_)
      : size(static_cast<std::uint32_t>(size_)),
        magic(0),
        shift(static_cast<int>(std::bit_width(static_cast<std::uint32_t>(size_ - 1)))) {
    magic = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + shift)) + size - 1) / size);
  }

  constexpr std::uint32_t quotient(std::uint32_t number) const {
    return static_cast<std::uint32_t>((std::uint64_t{number} * magic) >> 31) >> shift;
  }
};

// Merges the dimensions of a shape for several tensors of that shape. Dimensions are sorted by their strides, added up
// over the tensors: tensors that are permuted alike become contiguous, and where layouts differ the order is the one of
// most tensors. Returns dims = 0 when more than kMaxDims are left.
inline MergedShape merge_dimensions(std::span<const std::int64_t> sizes, std::span<const TensorView> views,
                                    std::span<Operand> operands) {
  MergedShape merged{1, {}, 0, false};
  std::array<int, 64> order;
  std::array<std::int64_t, 64> reach;
  int count = 0;
  for (int d = 0; d < static_cast<int>(sizes.size()); ++d) {
    merged.numel *= sizes[d];
    if (sizes[d] != 1 && count < static_cast<int>(order.size())) {
      std::int64_t sum = 0;
      for (const TensorView& view : views) {
        sum += view.strides[d];
      }
      int place = count++;
      for (; place > 0 && reach[place - 1] < sum; --place) {
        order[place] = order[place - 1];
        reach[place] = reach[place - 1];
      }
      order[place] = d;
      reach[place] = sum;
    }
  }
  for (std::size_t i = 0; i < views.size(); ++i) {
    operands[i].data = views[i].data;
    operands[i].bytes = views[i].bytes;
    operands[i].strides[0] = 1;
  }
  if (merged.numel <= 1) {
    merged.dims = 1;
    merged.sizes[0] = merged.numel;
    merged.contiguous = true;
    return merged;
  }
  for (int position = 0; position < count; ++position) {
    const int d = order[position];
    const bool merges = merged.dims > 0 && std::all_of(views.begin(), views.end(), [&](const TensorView& view) {
                          return view.strides[order[position - 1]] == view.strides[d] * sizes[d];
                        });
    if (!merges && merged.dims == kMaxDims) {
      merged.dims = 0;
      return merged;
    }
    const int last = merges ? merged.dims - 1 : merged.dims++;
    merged.sizes[last] = merges ? merged.sizes[last] * sizes[d] : sizes[d];
    for (std::size_t i = 0; i < views.size(); ++i) {
      operands[i].strides[last] = views[i].strides[d];
    }
  }
  merged.contiguous = merged.dims == 1 && std::all_of(operands.begin(), operands.begin() + views.size(),
                                                      [](const Operand& o) { return o.strides[0] == 1; });
  return merged;
}

}  // namespace lesa
