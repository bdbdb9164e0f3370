// The walk that an elementwise pass takes: dimensions merged as far as every tensor's strides allow. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <span>

namespace lesa {

// Dimensions that are left after merging; contiguous tensors need 1, padded rows 2.
inline constexpr int kMaxDims = 16;

// A tensor before merging: its first element and its strides in elements, one per dimension of the shape.
struct Source {
  void* data;
  const std::int64_t* strides;
};

// A tensor after merging: its first element and its strides in elements along the merged dimensions.
struct Operand {
  void* data;
  std::int64_t strides[kMaxDims];
};

// Merged dimensions, the last one innermost. There is always at least one.
struct Geometry {
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

// Merges the dimensions of a shape for several tensors of that shape. They are walked in the order of their strides,
// added up over the tensors: tensors that are permuted alike become contiguous, and where layouts differ most tensors
// have it their way. Returns dims = 0 when more than kMaxDims are left.
inline Geometry merge_dimensions(std::span<const std::int64_t> sizes, std::span<const Source> sources,
                                 std::span<Operand> operands) {
  Geometry geometry{1, {}, 0, false};
  std::array<int, 64> order;
  std::array<std::int64_t, 64> reach;
  int count = 0;
  for (int d = 0; d < static_cast<int>(sizes.size()); ++d) {
    geometry.numel *= sizes[d];
    if (sizes[d] != 1 && count < static_cast<int>(order.size())) {
      std::int64_t sum = 0;
      for (const Source& source : sources) {
        sum += source.strides[d];
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
  for (std::size_t i = 0; i < sources.size(); ++i) {
    operands[i].data = sources[i].data;
    operands[i].strides[0] = 1;
  }
  if (geometry.numel <= 1) {
    geometry.dims = 1;
    geometry.sizes[0] = geometry.numel;
    geometry.contiguous = true;
    return geometry;
  }
  for (int position = 0; position < count; ++position) {
    const int d = order[position];
    const bool merges = geometry.dims > 0 && std::all_of(sources.begin(), sources.end(), [&](const Source& source) {
                          return source.strides[order[position - 1]] == source.strides[d] * sizes[d];
                        });
    if (!merges && geometry.dims == kMaxDims) {
      geometry.dims = 0;
      return geometry;
    }
    const int last = merges ? geometry.dims - 1 : geometry.dims++;
    geometry.sizes[last] = merges ? geometry.sizes[last] * sizes[d] : sizes[d];
    for (std::size_t i = 0; i < sources.size(); ++i) {
      operands[i].strides[last] = sources[i].strides[d];
    }
  }
  geometry.contiguous = geometry.dims == 1 && std::all_of(operands.begin(), operands.begin() + sources.size(),
                                                          [](const Operand& o) { return o.strides[0] == 1; });
  return geometry;
}

}  // namespace lesa
