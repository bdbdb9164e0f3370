// What the ops on the CPU share: the tensors of a pass, parameters as the loops take them, and linear forecasts.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "contract.h"
#include "cpu/isa.h"
#include "cpu/walk.h"

namespace lesa::cpu {

static_assert(kMaxHistory == kMaxInputs && kMaxForecasts == kMaxRows && kMaxHistory + kMaxForecasts == kMaxStreams);

// Outputs from this size on are worth a system call; the C library keeps smaller memory for the next call.
inline constexpr std::uintptr_t kHugeBytes = 8 * 1024 * 1024;

// The tensors of one elementwise pass in the order in which the loops take them: outputs first.
class Pass {
 public:
  void add(Source source, std::size_t bytes) {
    sources_[count_] = source;
    streams_[count_++].bytes = static_cast<std::int64_t>(bytes);
  }

  void add(const Tensor& tensor) { add(source_of(tensor), tensor.element_size()); }

  // Merges dimensions; to be called once all tensors are in.
  void lay_out(const char* op, Shape shape) {
    geometry_ = lesa::lay_out(op, shape, {sources_.data(), count_}, operands_);
    for (std::size_t i = 0; i < count_; ++i) {
      streams_[i].data = static_cast<char*>(operands_[i].data);
      streams_[i].strides = operands_[i].strides;
    }
  }

  const Operand& operand(std::size_t index) const { return operands_[index]; }
  const Geometry& geometry() const { return geometry_; }
  std::span<const Stream> streams() const { return {streams_.data(), count_}; }

  // Whether the outputs are to be stored past the cache.
  bool past_cache() const { return geometry_.numel * bytes_per_element(streams()) >= kPastCacheBytes; }

 private:
  std::size_t count_ = 0;
  Geometry geometry_;
  std::array<Source, kMaxStreams> sources_;
  std::array<Operand, kMaxStreams> operands_;
  std::array<Stream, kMaxStreams> streams_;
};

// As fresh_like, and asks for huge pages: an allocator hands out large memory as fresh pages each time, and faulting
// them in 4 KiB at a time takes longer than a forecast (docs/performance.md). Where there are none, this changes
// nothing.
inline Tensor fresh_pages_like(const Tensor& like) {
  Tensor out = fresh_like(like);
#if defined(__linux__)
  constexpr std::uintptr_t kHuge = 2 * 1024 * 1024;
  const auto begin = reinterpret_cast<std::uintptr_t>(out.data_ptr());
  const std::uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const std::uintptr_t last = (begin + out.numel() * out.element_size()) / kHuge * kHuge;
  if (last >= first + kHugeBytes) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

// Calls body.operator()<T>() for the features' type; the checks have admitted no other.
template <typename Body>
void for_feature(ScalarType dtype, Body&& body) {
  for_dtype<float, float16, bfloat16, double>(dtype, body);
}

// Every NaN is the same: a float32 one may have bits that rounding to bfloat16 would carry into its sign.
template <typename A>
A canonical(A value) {
  return std::isnan(value) ? std::numeric_limits<A>::quiet_NaN() : value;
}

template <typename T>
std::vector<accumulate_t<T>> read_parameter(const Tensor& tensor, std::int64_t rows, std::int64_t columns) {
  const auto parameter = parameter_of<T>(tensor);
  std::vector<accumulate_t<T>> values;
  values.reserve(rows * columns);
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t k = 0; k < columns; ++k) {
      values.push_back(canonical(parameter.at(m, k)));
    }
  }
  return values;
}

template <typename T>
accumulate_t<T> read_scalar(const Tensor& tensor) {
  return canonical(parameter_of<T>(tensor).at(0, 0));
}

// Runs M rows over a pass of M outputs and K inputs.
template <typename T>
void run_forecast(const Pass& pass, const Rows<T>& map) {
  const auto forecast = chosen().of<T>().forecast;
  parallel_walk(pass.geometry(), pass.streams(), map.rows, [&](void* const* pointers, std::int64_t count) {
    forecast(map, pointers + map.rows, pointers, count);
  });
}

template <typename T>
void run_forecast(const Pass& pass, const Tensor& coefficients, const Tensor& offsets) {
  const std::int64_t rows = coefficients.size(0), inputs = coefficients.size(1);
  const auto c = read_parameter<T>(coefficients, rows, inputs);
  const auto d = read_parameter<T>(offsets, 1, rows);
  run_forecast<T>(pass, {c.data(), d.data(), static_cast<int>(inputs), static_cast<int>(rows), pass.past_cache()});
}

}  // namespace lesa::cpu
