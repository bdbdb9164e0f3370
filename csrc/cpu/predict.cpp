// predict, predict_backward and predict_l1 on the CPU: check, allocate, iterate. What each op means stands in
// lesa_kernels/ops/predict.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cpu_common.h"

namespace lesa::cpu {
namespace {

// Elements that one partial sum covers: fixed, so that sums do not depend on the number of threads.
constexpr std::int64_t kPart = 8192;

// The parameters of predict as the loops take them.
template <typename T>
struct Parameters {
  std::vector<accumulate_t<T>> weight;
  accumulate_t<T> bias, gain;

  Parameters(const Tensor& weight_tensor, const Tensor& bias_tensor, const Tensor& gain_tensor)
      : weight(read_parameter<T>(weight_tensor, 1, weight_tensor.size(0))),
        bias(read_scalar<T>(bias_tensor)),
        gain(read_scalar<T>(gain_tensor)) {}

  LinearMap<T> map(bool streaming) const {
    return {weight.data(), &bias, static_cast<int>(weight.size()), 1, streaming};
  }
};

Tensor predict(const std::vector<Tensor>& history, const Tensor& weight, const Tensor& bias, const Tensor& gain) {
  check_predict("predict", history, weight, bias, gain);
  Tensor out = fresh_pages_like(history[0]);
  TensorIterator iterator;
  iterator.add_output(out);
  iterator.add_inputs(history);
  iterator.build("predict", shape_of(out));
  for_feature(out.scalar_type(), [&]<typename T>() {
    const Parameters<T> parameters(weight, bias, gain);
    const LinearMap<T> map = parameters.map(iterator.streaming());
    const auto loop = chosen_isa().of<T>().predict;
    iterator.for_each(
        [&](void* const* pointers, std::int64_t count) { loop(map, parameters.gain, pointers + 1, pointers, count); });
  });
  return out;
}

template <typename T>
Tensor parameter_gradient(const Tensor& parameter, std::span<const double> values) {
  Tensor gradient = fresh_like(parameter);
  Result<T>(gradient).put(0, static_cast<std::int64_t>(values.size()), values.data());
  return gradient;
}

using ParameterGradients = std::tuple<Tensor, Tensor, Tensor>;

// From S_k = sum(g * history[k]), k < K, and S_K = sum(g) for a gradient g of the forecast:
// d weight[k] = gain * S_k, d bias = gain * S_K, d gain = sum_k weight[k] * S_k + bias * S_K.
template <typename T>
ParameterGradients parameter_gradients(const Parameters<T>& parameters, std::span<double> sums, const Tensor& weight,
                                       const Tensor& bias, const Tensor& gain) {
  const std::size_t inputs = parameters.weight.size();
  double for_gain = parameters.bias * sums[inputs];
  for (std::size_t k = 0; k < inputs; ++k) {
    for_gain += parameters.weight[k] * sums[k];
  }
  for (double& sum : sums) {
    sum *= parameters.gain;
  }
  return {parameter_gradient<T>(weight, sums.first(inputs)), parameter_gradient<T>(bias, sums.subspan(inputs, 1)),
          parameter_gradient<T>(gain, {&for_gain, 1})};
}

// d history[k] = (gain * weight[k] + [k = K - 1]) * grad: a forecast from grad alone.
template <typename T>
std::vector<Tensor> history_gradients(const Tensor& grad, const Parameters<T>& parameters) {
  const std::size_t inputs = parameters.weight.size();
  std::vector<accumulate_t<T>> factors, zeros(inputs, 0);
  std::vector<Tensor> gradients;
  TensorIterator iterator;
  for (std::size_t k = 0; k < inputs; ++k) {
    factors.push_back(parameters.gain * parameters.weight[k] + (k + 1 == inputs ? 1 : 0));
    gradients.push_back(fresh_pages_like(grad));
    iterator.add_output(gradients.back());
  }
  iterator.add_input(grad);
  iterator.build("predict_backward", shape_of(grad));
  run_forecast<T>(iterator, {factors.data(), zeros.data(), 1, static_cast<int>(inputs), iterator.streaming()});
  return gradients;
}

using Gradients = std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor>;

Gradients predict_backward(const Tensor& grad, const std::vector<Tensor>& history, const Tensor& weight,
                           const Tensor& bias, const Tensor& gain, bool history_needs_grad) {
  check_predict("predict_backward", history, weight, bias, gain);
  check_like("predict_backward", {"grad"}, grad, {"history", 0}, history[0]);
  TensorIterator iterator;
  iterator.add_inputs(history);
  iterator.add_input(grad);
  iterator.build("predict_backward", shape_of(grad));
  std::optional<Gradients> result;
  for_feature(grad.scalar_type(), [&]<typename T>() {
    const Parameters<T> parameters(weight, bias, gain);
    const Kernels<T>& loops = chosen_isa().of<T>();
    const std::size_t inputs = history.size();
    std::vector<double> sums =
        sum_in_parts(iterator, kPart, inputs + 1, [&](void* const* pointers, std::int64_t count, double* into) {
          const auto* slopes = static_cast<const T*>(pointers[inputs]);
          for (std::size_t k = 0; k < inputs; ++k) {
            into[k] += loops.dot(slopes, static_cast<const T*>(pointers[k]), count);
          }
          into[inputs] += loops.sum(slopes, count);
        });
    result =
        std::tuple_cat(std::tuple(history_needs_grad ? history_gradients<T>(grad, parameters) : std::vector<Tensor>{}),
                       parameter_gradients<T>(parameters, sums, weight, bias, gain));
  });
  return *std::move(result);
}

using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Loss predict_l1(const std::vector<Tensor>& history, const Tensor& target, const Tensor& weight, const Tensor& bias,
                const Tensor& gain, const std::optional<Tensor>& out) {
  check_predict_l1(history, target, weight, bias, gain, out);
  TensorIterator iterator;
  if (out) {
    iterator.add_output(*out);
  }
  iterator.add_inputs(history);
  iterator.add_input(target);
  iterator.build("predict_l1", shape_of(target));
  std::optional<Loss> result;
  for_feature(target.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Parameters<T> parameters(weight, bias, gain);
    const LinearMap<T> map = parameters.map(false);
    const std::size_t inputs = history.size(), outputs = iterator.outputs();
    const auto loop = chosen_isa().of<T>().l1;
    std::vector<double> sums =
        sum_in_parts(iterator, kPart, inputs + 2, [&](void* const* pointers, std::int64_t count, double* into) {
          loop(map, parameters.gain, pointers + outputs, static_cast<const T*>(pointers[outputs + inputs]),
               outputs ? static_cast<T*>(pointers[0]) : nullptr, count, into);
        });
    for (double& sum : sums) {
      sum /= static_cast<double>(std::max<std::int64_t>(iterator.merged().numel, 1));
    }
    Tensor loss = torch::stable::new_empty(target, {}, dtype_of<A>);
    *static_cast<A*>(loss.data_ptr()) = static_cast<A>(sums[inputs + 1]);
    result = std::tuple_cat(std::tuple(loss),
                            parameter_gradients<T>(parameters, std::span(sums).first(inputs + 1), weight, bias, gain));
  });
  return *std::move(result);
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) {
  m.impl("predict", TORCH_BOX(&lesa::cpu::predict));
  m.impl("predict_backward", TORCH_BOX(&lesa::cpu::predict_backward));
  m.impl("predict_l1", TORCH_BOX(&lesa::cpu::predict_l1));
}
