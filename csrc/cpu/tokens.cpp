// The ops on the CPU that take tokens whole, that is rows of channels: a forecast with its norm, and rings with a scale
// for each token. Tokens are independent of each other, so no result depends on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>
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

// Calls body.operator()<Q, F>() for the types of a scaled ring and of the features beside it; the checks have admitted
// no others.
template <typename Body>
void for_scaled(const Tensor& ring, const Tensor& features, Body&& body) {
  for_dtype<std::int8_t, float8>(ring.scalar_type(), [&]<typename Q>() {
    for_dtype<float, float16, bfloat16>(features.scalar_type(),
                                        [&]<typename F>() { body.template operator()<Q, F>(); });
  });
}

// Rounds a token to the elements of a scaled ring and returns its scale.
template <typename Q, typename F>
float keep_token(const F* values, std::int64_t channels, Q* elements) {
  const auto& loops = chosen().scaled_of<Q, F>();
  const RowScale scale = row_scale<Q>(loops.largest(values, channels));
  loops.round(values, scale.inverse, elements, channels);
  return scale.scale;
}

void push_scaled(const Tensor& ring, const Tensor& scales, const Tensor& feature, std::int64_t slot) {
  check_push_scaled(ring, scales, feature, slot);
  for_scaled(ring, feature, [&]<typename Q, typename F>() {
    const Slots<Q> slots(ring);
    const std::int64_t channels = slots.channels;
    const auto* from = static_cast<const F*>(feature.data_ptr());
    auto* scale = static_cast<float*>(scales.data_ptr()) + slot * slots.tokens;
    parallel_tokens(slots.tokens, channels * (sizeof(Q) + sizeof(F)), [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t token = first; token < last; ++token) {
        scale[token] = keep_token(from + token * channels, channels, slots.at(slot, token));
      }
    });
  });
}

// The tensors of forecast_scaled_into; scales [slots, tokens].
template <typename Q, typename F>
struct ScaledPass {
  Slots<Q> ring;
  float* scales;
  Slots<F> out;
  const std::vector<std::int64_t>&read, &write;

  float& scale(std::int64_t slot, std::int64_t token) const { return scales[slot * ring.tokens + token]; }
};

// Forecasts tokens [first, last). All reads of a token, those of its scales too, come before its writes.
template <typename Q, typename F>
void forecast_tokens(const ScaledPass<Q, F>& pass, const Rows<F>& map, std::int64_t first, std::int64_t last) {
  const auto loop = chosen().scaled_of<Q, F>().forecast;
  const std::int64_t channels = pass.ring.channels;
  const auto is_kept = [](std::int64_t slot) { return slot >= 0; };
  std::vector<float> memory(channels * std::count_if(pass.write.begin(), pass.write.end(), is_kept));
  std::vector<float> scaled(map.rows * map.inputs);
  const Q* inputs[kMaxInputs];
  F* rounded[kMaxRows];
  float* unrounded[kMaxRows];
  float* next = memory.data();
  for (int m = 0; m < map.rows; ++m) {
    unrounded[m] = is_kept(pass.write[m]) ? std::exchange(next, next + channels) : nullptr;
  }
  for (std::int64_t token = first; token < last; ++token) {
    for (int k = 0; k < map.inputs; ++k) {
      inputs[k] = pass.ring.at(pass.read[k], token);
      const float scale = pass.scale(pass.read[k], token);
      for (int i = k; i < map.rows * map.inputs; i += map.inputs) {
        scaled[i] = map.coefficients[i] * scale;
      }
    }
    for (int m = 0; m < map.rows; ++m) {
      rounded[m] = pass.out.at(m, token);
    }
    loop({scaled.data(), map.offsets, map.inputs, map.rows, map.past_cache}, inputs, rounded, unrounded, channels);
    for (int m = 0; m < map.rows; ++m) {
      if (unrounded[m]) {
        pass.scale(pass.write[m], token) = keep_token(unrounded[m], channels, pass.ring.at(pass.write[m], token));
      }
    }
  }
}

void forecast_scaled_into(const Tensor& ring, const Tensor& scales, const Tensor& out, const Tensor& coefficients,
                          const Tensor& offsets, const std::vector<std::int64_t>& read,
                          const std::vector<std::int64_t>& write) {
  check_forecast_scaled_into(ring, scales, out, coefficients, offsets, read, write);
  for_scaled(ring, out, [&]<typename Q, typename F>() {
    const ScaledPass<Q, F> pass{Slots<Q>(ring), static_cast<float*>(scales.data_ptr()), Slots<F>(out), read, write};
    const std::int64_t rows = out.size(0), inputs = static_cast<std::int64_t>(read.size());
    const auto c = read_parameter<F>(coefficients, rows, inputs), d = read_parameter<F>(offsets, 1, rows);
    const bool past_cache = out.numel() * static_cast<std::int64_t>(sizeof(F)) >= kPastCacheBytes;
    const Rows<F> map{c.data(), d.data(), static_cast<int>(inputs), static_cast<int>(rows), past_cache};
    const std::int64_t bytes = pass.ring.channels * (inputs * sizeof(Q) + rows * (sizeof(Q) + sizeof(F)));
    parallel_tokens(pass.ring.tokens, bytes,
                    [&](std::int64_t first, std::int64_t last) { forecast_tokens(pass, map, first, last); });
  });
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) {
  m.impl("forecast_norm", TORCH_BOX(&lesa::cpu::forecast_norm));
  m.impl("push_scaled", TORCH_BOX(&lesa::cpu::push_scaled));
  m.impl("forecast_scaled_into", TORCH_BOX(&lesa::cpu::forecast_scaled_into));
}
