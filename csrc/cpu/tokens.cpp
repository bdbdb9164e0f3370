// The op on the CPU that takes tokens whole, that is rows of channels: a forecast with its norm. Tokens are independent
// of each other, so no result depends on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu/pass.h"

namespace lesa::cpu {
namespace {

// Calls part(first, last) for ranges that make up all tokens, with several threads where there is enough to move.
template <typename Part>
void parallel_tokens(std::int64_t tokens, std::int64_t token_bytes, const Part& part) {
  const std::int64_t grain = std::max<std::int64_t>(kGrainBytes / std::max<std::int64_t>(token_bytes, 1), 1);
  if (tokens <= grain) {
    part(0, tokens);
  } else {
    torch::stable::parallel_for(0, tokens, grain, part);
  }
}

// A contiguous tensor [slots, ..., channels] of T as [slots, tokens, channels].
template <typename T>
struct Slots {
  T* data;
  std::int64_t tokens = 1, channels;

  explicit Slots(const Tensor& tensor)
      : data(static_cast<T*>(tensor.data_ptr())), channels(tensor.size(tensor.dim() - 1)) {
    for (std::int64_t d = 1; d + 1 < tensor.dim(); ++d) {
      tokens *= tensor.size(d);
    }
  }

  T* at(std::int64_t slot, std::int64_t token) const { return data + (slot * tokens + token) * channels; }
};

template <typename T>
void run_norm(const Slots<T>& ring, const Rows<T>& map, const std::vector<std::int64_t>& read,
              const std::vector<std::int64_t>& write, const Norm<accumulate_t<T>>& norm, std::int64_t batch, T* out) {
  const auto loop = chosen().of<T>().norm;
  const std::int64_t channels = ring.channels, bytes = channels * static_cast<std::int64_t>(sizeof(T));
  parallel_tokens(ring.tokens, (map.inputs + write.size() + 1) * bytes, [&](std::int64_t first, std::int64_t last) {
    std::vector<accumulate_t<T>> unrounded(channels);
    const T* inputs[kMaxInputs];
    for (std::int64_t token = first; token < last; ++token) {
      for (int k = 0; k < map.inputs; ++k) {
        inputs[k] = ring.at(read[k], token);
      }
      const std::int64_t modulation = token / (ring.tokens / batch) * channels;
      loop(map, {norm.gain + modulation, norm.shift + modulation, norm.eps}, inputs,
           write.empty() ? nullptr : ring.at(write[0], token), unrounded.data(), out + token * channels, channels);
    }
  });
}

Tensor forecast_norm(const Tensor& ring, const Tensor& coefficients, const Tensor& offsets,
                     const std::vector<std::int64_t>& read, const std::vector<std::int64_t>& write, const Tensor& scale,
                     const Tensor& shift, double eps) {
  check_forecast_norm(ring, coefficients, offsets, read, write, scale, shift);
  const Shape shape = slot_shape(ring);
  Tensor out = torch::stable::new_empty(ring, {shape.sizes, shape.dims});
  for_feature(ring.scalar_type(), [&]<typename T>() {
    const Slots<T> slots(ring);
    const std::int64_t batch = ring.size(1), inputs = static_cast<std::int64_t>(read.size());
    const auto c = read_parameter<T>(coefficients, 1, inputs);
    const auto d = read_scalar<T>(offsets);
    auto gain = read_parameter<T>(scale, batch, slots.channels);
    for (auto& value : gain) {
      value += 1;
    }
    const auto offset = read_parameter<T>(shift, batch, slots.channels);
    run_norm<T>(slots, {c.data(), &d, static_cast<int>(inputs), 1, false}, read, write,
                {gain.data(), offset.data(), eps}, batch, static_cast<T*>(out.data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) { m.impl("forecast_norm", TORCH_BOX(&lesa::cpu::forecast_norm)); }
