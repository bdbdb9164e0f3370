// The ops on the CPU that sum over elements. Sums do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/pass.h"

namespace lesa::cpu {
namespace {

// Elements that one partial sum covers: fixed, so that sums do not depend on the number of threads.
constexpr std::int64_t kSummed = 8192;

// Products of all pairs are many: fewer, larger parts.
constexpr std::int64_t kMultiplied = 65536;

// Returns `width` sums over all elements: loop(pointers, count, into) adds those of a run, parts of so many elements
// have sums of their own, and those are added in order.
template <typename Loop>
std::vector<double> add_parts(const Pass& pass, std::size_t outputs, std::int64_t elements, std::size_t width,
                              const Loop& loop) {
  const std::int64_t numel = pass.geometry().numel, parts = (numel + elements - 1) / elements;
  std::vector<double> partial(parts * width, 0.0), sums(width, 0.0);
  parallel_blocks(pass.streams(), parts, elements, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t part = first; part < last; ++part) {
      double* into = partial.data() + part * width;
      walk(pass.geometry(), pass.streams(), outputs, part * elements, std::min((part + 1) * elements, numel),
           [&](void* const* pointers, std::int64_t count) { loop(pointers, count, into); });
    }
  });
  for (std::size_t i = 0; i < partial.size(); ++i) {
    sums[i % width] += partial[i];
  }
  return sums;
}

// Returns S_k = sum(grad * history[k]) for k < K, then S_b = sum(grad).
template <typename T>
std::vector<double> sums_with(const Pass& pass) {
  const std::size_t inputs = pass.streams().size() - 1;
  const Kernels<T>& loops = chosen().of<T>();
  return add_parts(pass, 0, kSummed, inputs + 1, [&](void* const* pointers, std::int64_t count, double* into) {
    const auto* grad = static_cast<const T*>(pointers[inputs]);
    for (std::size_t k = 0; k < inputs; ++k) {
      into[k] += loops.dot(grad, static_cast<const T*>(pointers[k]), count);
    }
    into[inputs] += loops.sum(grad, count);
  });
}

// Writes values into a fresh tensor of a parameter's shape and dtype (float32 or T).
template <typename T>
Tensor parameter_gradient(const Tensor& parameter, std::span<const double> values) {
  Tensor gradient = fresh_like(parameter);
  for (std::size_t k = 0; k < values.size(); ++k) {
    if (gradient.scalar_type() == ScalarType::Float) {
      static_cast<float*>(gradient.data_ptr())[k] = static_cast<float>(values[k]);
    } else {
      static_cast<T*>(gradient.data_ptr())[k] = narrow<T>(static_cast<accumulate_t<T>>(values[k]));
    }
  }
  return gradient;
}

// history[k] enters the forecast with gain * weight[k], the newest with 1 more: its gradient is a forecast from grad.
template <typename T>
std::vector<Tensor> history_gradients(const Tensor& grad, std::span<const accumulate_t<T>> weight,
                                      accumulate_t<T> gain) {
  std::vector<accumulate_t<T>> factors, zeros(weight.size(), 0);
  std::vector<Tensor> gradients;
  Pass pass;
  for (std::size_t k = 0; k < weight.size(); ++k) {
    factors.push_back(gain * weight[k] + (k + 1 == weight.size() ? 1 : 0));
    gradients.push_back(fresh_pages_like(grad));
    pass.add(gradients.back());
  }
  pass.add(grad);
  pass.lay_out("predict_backward", shape_of(grad));
  const int rows = static_cast<int>(weight.size());
  run_forecast<T>(pass, {factors.data(), zeros.data(), 1, rows, pass.past_cache()});
  return gradients;
}

// The parameters of predict as the loops take them.
template <typename T>
struct Mixing {
  std::vector<accumulate_t<T>> weight;
  accumulate_t<T> bias, gain;

  Mixing(const Tensor& weight_tensor, const Tensor& bias_tensor, const Tensor& gain_tensor)
      : weight(read_parameter<T>(weight_tensor, 1, weight_tensor.size(0))),
        bias(read_scalar<T>(bias_tensor)),
        gain(read_scalar<T>(gain_tensor)) {}

  // Turns S_k, S_b into the gradients of weight and bias, in place, and returns the gain's.
  double finish(std::span<double> sums) const {
    double for_gain = bias * sums[weight.size()];
    for (std::size_t k = 0; k < weight.size(); ++k) {
      for_gain += weight[k] * sums[k];
    }
    for (double& sum : sums) {
      sum *= gain;
    }
    return for_gain;
  }
};

using Gradients = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor>;

Gradients predict_backward(const Tensor& grad, const std::vector<Tensor>& history, const Tensor& weight,
                           const Tensor& bias, const Tensor& gain, bool history_needs_grad) {
  check_predict("predict_backward", history, weight, bias, gain);
  check_like("predict_backward", {"grad"}, grad, {"history", 0}, history[0]);
  Pass pass;
  for (const Tensor& feature : history) {
    pass.add(feature);
  }
  pass.add(grad);
  pass.lay_out("predict_backward", shape_of(grad));
  std::optional<Gradients> result;
  for_feature(grad.scalar_type(), [&]<typename T>() {
    const Mixing<T> mixing(weight, bias, gain);
    std::vector<double> sums = sums_with<T>(pass);
    const double for_gain = mixing.finish(sums);
    const std::span<const double> scaled(sums);
    result.emplace(history_needs_grad ? history_gradients<T>(grad, mixing.weight, mixing.gain) : std::vector<Tensor>{},
                   parameter_gradient<T>(weight, scaled.first(history.size())),
                   parameter_gradient<T>(bias, scaled.last(1)), parameter_gradient<T>(gain, {&for_gain, 1}));
  });
  return *std::move(result);
}

using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The pass holds `out` where it is given, the history and the target.
template <typename T>
Loss loss_and_gradients(const Pass& pass, const Tensor& feature, const Tensor& weight, const Tensor& bias,
                        const Tensor& gain, bool has_out) {
  const Mixing<T> mixing(weight, bias, gain);
  const std::size_t inputs = mixing.weight.size(), outputs = has_out ? 1 : 0;
  const Rows<T> map{mixing.weight.data(), &mixing.bias, static_cast<int>(inputs), 1, false};
  const auto loop = chosen().of<T>().l1;
  std::vector<double> sums =
      add_parts(pass, outputs, kSummed, inputs + 2, [&](void* const* pointers, std::int64_t count, double* into) {
        void* const* history = pointers + outputs;
        loop(map, mixing.gain, history, static_cast<const T*>(history[inputs]),
             has_out ? static_cast<T*>(pointers[0]) : nullptr, count, into);
      });
  for (double& sum : sums) {
    sum /= static_cast<double>(std::max<std::int64_t>(pass.geometry().numel, 1));
  }
  const double for_gain = mixing.finish(std::span(sums).first(inputs + 1));
  Tensor loss = torch::stable::new_empty(feature, {}, dtype_of<accumulate_t<T>>);
  *static_cast<accumulate_t<T>*>(loss.data_ptr()) = static_cast<accumulate_t<T>>(sums[inputs + 1]);
  const std::span<const double> means(sums);
  return {loss, parameter_gradient<T>(weight, means.first(inputs)),
          parameter_gradient<T>(bias, means.subspan(inputs, 1)), parameter_gradient<T>(gain, {&for_gain, 1})};
}

Loss predict_l1(const std::vector<Tensor>& history, const Tensor& target, const Tensor& weight, const Tensor& bias,
                const Tensor& gain, const std::optional<Tensor>& out) {
  check_predict_l1(history, target, weight, bias, gain, out);
  Pass pass;
  if (out) {
    pass.add(*out);
  }
  for (const Tensor& feature : history) {
    pass.add(feature);
  }
  pass.add(target);
  pass.lay_out("predict_l1", shape_of(target));
  std::optional<Loss> result;
  for_feature(target.scalar_type(),
              [&]<typename T>() { result = loss_and_gradients<T>(pass, target, weight, bias, gain, out.has_value()); });
  return *std::move(result);
}

Tensor gram(const std::vector<Tensor>& features) {
  check_features("gram", "features", features);
  Pass pass;
  for (const Tensor& feature : features) {
    pass.add(feature);
  }
  pass.lay_out("gram", shape_of(features[0]));
  const std::size_t width = features.size() + 1;
  const std::int64_t shape[] = {static_cast<std::int64_t>(width), static_cast<std::int64_t>(width)};
  Tensor result = torch::stable::new_empty(features[0], {shape, 2}, ScalarType::Double);
  auto* entries = static_cast<double*>(result.data_ptr());
  for_feature(features[0].scalar_type(), [&]<typename T>() {
    const auto loop = chosen().of<T>().gram;
    const auto sums =
        add_parts(pass, 0, kMultiplied, width * width, [&](void* const* pointers, std::int64_t count, double* into) {
          loop(pointers, static_cast<int>(width - 1), count, into);
        });
    for (std::size_t i = 0; i < width; ++i) {
      for (std::size_t j = 0; j <= i; ++j) {
        entries[i * width + j] = entries[j * width + i] = sums[i * width + j];
      }
    }
  });
  entries[width * width - 1] = static_cast<double>(pass.geometry().numel);
  return result;
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) {
  m.impl("predict_backward", TORCH_BOX(&lesa::cpu::predict_backward));
  m.impl("predict_l1", TORCH_BOX(&lesa::cpu::predict_l1));
  m.impl("gram", TORCH_BOX(&lesa::cpu::gram));
}
