// Whether two tensors have memory in common. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "strides.h"

namespace lesa {

// Whether each element of a tensor lies where another one of its shape has the same element.
inline bool is_same_view(std::span<const std::int64_t> sizes, const TensorView& a, const TensorView& b) {
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && a.strides[d] != b.strides[d]) {
      return false;
    }
  }
  return a.data == b.data && a.bytes == b.bytes;
}

// Bytes from the first element of a tensor to behind its last one; 0 where it has none.
inline std::int64_t extent_of(std::span<const std::int64_t> sizes, const TensorView& view) {
  std::int64_t elements = 1;
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) {
      return 0;
    }
    elements += (sizes[d] - 1) * view.strides[d];
  }
  return elements * view.bytes;
}

// Slices and permutations of one tensor leave a few places at a time; only as_strided makes layouts that leave more.
inline constexpr std::int64_t kMostPlaces = 1000;

// Whether two tensors have a byte in common. Elements of both may interleave, as columns do: the places of a byte are
// sums of multiples of strides, and what is looked for are two equal ones. Where that takes long, the answer is yes.
inline bool share_memory(std::span<const std::int64_t> a_sizes, const TensorView& a,
                         std::span<const std::int64_t> b_sizes, const TensorView& b) {
  const std::int64_t distance = static_cast<const char*>(b.data) - static_cast<const char*>(a.data);
  const std::int64_t a_extent = extent_of(a_sizes, a), b_extent = extent_of(b_sizes, b);
  if (a_extent == 0 || b_extent == 0 || distance >= a_extent || -distance >= b_extent) {
    return false;
  }
  // Stride in bytes -> how often it may be added, from least to most; 1 is that of the bytes of an element.
  std::map<std::int64_t, std::pair<std::int64_t, std::int64_t>, std::greater<>> terms{{1, {1 - b.bytes, a.bytes - 1}}};
  for (std::size_t d = 0; d < a_sizes.size(); ++d) {
    terms[a.strides[d] * a.bytes].second += a_sizes[d] - 1;
  }
  for (std::size_t d = 0; d < b_sizes.size(); ++d) {
    terms[b.strides[d] * b.bytes].first -= b_sizes[d] - 1;
  }
  terms.erase(0);
  std::int64_t low = 0, high = 0;  // what the strides that are left reach
  for (const auto& [stride, counts] : terms) {
    low += stride * counts.first;
    high += stride * counts.second;
  }
  std::vector<std::int64_t> places{distance};
  for (const auto& [stride, counts] : terms) {
    low -= stride * counts.first;
    high -= stride * counts.second;
    std::vector<std::int64_t> reached;
    for (const std::int64_t place : places) {
      const auto floor = [step = stride](std::int64_t value) { return value / step - (value % step < 0); };
      const std::int64_t least = std::max(counts.first, -floor(high - place));
      const std::int64_t most = std::min(counts.second, floor(place - low));
      if (static_cast<std::int64_t>(reached.size()) + most - least >= kMostPlaces) {
        return true;
      }
      for (std::int64_t count = least; count <= most; ++count) {
        reached.push_back(place - stride * count);
      }
    }
    std::sort(reached.begin(), reached.end());
    reached.erase(std::unique(reached.begin(), reached.end()), reached.end());
    places = std::move(reached);
  }
  return !places.empty();  // what is left is 0
}

}  // namespace lesa
