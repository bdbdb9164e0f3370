// KAN layers on the CPU: all bases of all inputs, then products of small matrices. A row of such a matrix holds, for
// some consecutive inputs, what belongs to their bases, then what belongs to silu of them, then zeros.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/cpu_common.h"

namespace lesa::cpu {
namespace {

// Multiplications that a thread should have at least: some 20 us of work.
constexpr std::int64_t kGrainProducts = 1 << 20;

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

// A tensor's values in the arithmetic type, row-major: the tensor's own memory where it is that already.
template <typename T>
class Values {
 public:
  using A = accumulate_t<T>;

  explicit Values(const Tensor& tensor) : tensor_(torch::stable::contiguous(tensor)) {
    if (tensor_.scalar_type() == dtype_of<A>) {
      data_ = static_cast<const A*>(tensor_.data_ptr());
      return;
    }
    const Parameter<T> from{tensor_.data_ptr(), 0, 1, tensor_.scalar_type() == ScalarType::Float};
    converted_.resize(tensor_.numel());
    for (std::int64_t i = 0; i < tensor_.numel(); ++i) {
      converted_[i] = from.at(0, i);
    }
    data_ = converted_.data();
  }
  Values(const Values&) = delete;

  const A* at(std::int64_t index) const { return data_ + index; }

 private:
  Tensor tensor_;
  std::vector<A> converted_;
  const A* data_;
};

template <typename Body>
void parallel_tiles(std::int64_t tiles, std::int64_t products, const Body& body) {
  const std::int64_t grain = std::max<std::int64_t>(kGrainProducts / std::max<std::int64_t>(products, 1), 1);
  if (tiles <= grain) {
    body(0, tiles);
  } else {
    torch::stable::parallel_for(0, tiles, grain, body);
  }
}

// A layer of I inputs, O outputs and B bases on N rows, and what its inputs make of its bases.
template <typename T>
class Layer {
 public:
  using A = accumulate_t<T>;

  Layer(const Tensor& x_tensor, const Tensor& grid_tensor, const Tensor& base_weight, const Tensor& spline_weight,
        const Tensor& spline_scaler)
      : outputs(base_weight.size(0)),
        inputs(base_weight.size(1)),
        bases(spline_weight.size(2)),
        rows(x_tensor.numel() / inputs),
        x(x_tensor),
        base(base_weight),
        spline(spline_weight),
        scaler(spline_scaler),
        order_(static_cast<int>(grid_tensor.size(1) - bases - 1)) {
    read_grid(grid_tensor);
  }

  const KanKernels<A>& loops() const { return chosen_isa().kan_of<A>(); }

  std::int64_t length(std::int64_t count) const { return round_up(count * (bases + 1), kRowUnit); }

  // Evaluates bases (and slopes) [N, I, B] and silu (and its slopes) [N, I] at x.
  void evaluate(bool with_slopes) {
    const std::int64_t knots = bases + order_ + 1;
    values_.resize(rows * inputs * bases);
    silu_.resize(rows * inputs);
    if (with_slopes) {
      slopes_.resize(rows * inputs * bases);
      silu_slopes_.resize(rows * inputs);
    }
    const Splines<A> splines{grid_.data(), inverses_.data(), inputs, static_cast<int>(knots), order_};
    parallel_tiles(rows, 64 * inputs * bases, [&](std::int64_t first, std::int64_t last) {
      std::vector<A> level(knots * inputs), slope(with_slopes ? knots * inputs : 0), points(inputs);
      for (std::int64_t n = first; n < last; ++n) {
        place(n, points);
        loops().spline_bases(splines, points.data(), level.data(), with_slopes ? slope.data() : nullptr);
        transpose(level, values_.data() + n * inputs * bases);
        if (with_slopes) {
          transpose(slope, slopes_.data() + n * inputs * bases);
        }
        smooth(n, with_slopes);
      }
    });
  }

  // Writes row n of the bases and silu of `count` inputs, padded.
  void pack(std::int64_t n, std::int64_t first, std::int64_t count, A* to) const {
    const A* from = values_.data() + (n * inputs + first) * bases;
    A* end = std::copy(from, from + count * bases, to);
    const A* smooth = silu_.data() + n * inputs + first;
    end = std::copy(smooth, smooth + count, end);
    std::fill(end, to + length(count), A{0});
  }

  // Writes the weights of output o for `count` inputs, scaled and padded like `pack`.
  void pack_weights(std::int64_t o, std::int64_t first, std::int64_t count, A* to) const {
    const std::int64_t at = o * inputs + first;
    loops().scale_groups(spline.at(at * bases), scaler.at(at), count, static_cast<int>(bases), to);
    A* end = std::copy(base.at(at), base.at(at + count), to + count * bases);
    std::fill(end, to + length(count), A{0});
  }

  // The gradient of input i of row n from those of its packed bases and silu.
  A slope(std::int64_t n, std::int64_t i, const A* through_bases, A through_silu) const {
    const A* slopes = slopes_.data() + (n * inputs + i) * bases;
    A sum = through_silu * silu_slopes_[n * inputs + i];
    for (std::int64_t b = 0; b < bases; ++b) {
      sum += through_bases[b] * slopes[b];
    }
    return sum;
  }

  const std::int64_t outputs, inputs, bases, rows;
  const Values<T> x, base, spline, scaler;

 private:
  void read_grid(const Tensor& tensor) {
    const Values<T> grid(tensor);
    const std::int64_t knots = bases + order_ + 1;
    grid_.resize(knots * inputs);
    inverses_.resize(order_ * knots * inputs);
    for (std::int64_t i = 0; i < inputs; ++i) {
      const A* t = grid.at(i * knots);
      for (std::int64_t g = 0; g < knots; ++g) {
        grid_[g * inputs + i] = t[g];
        for (std::int64_t d = 1; d <= order_ && g + d < knots; ++d) {
          inverses_[((d - 1) * knots + g) * inputs + i] = 1 / (t[g + d] - t[g]);
        }
      }
    }
  }

  // Row n as the splines take it: all bases are zero beyond the knots as they are at the last one, where the recursion
  // makes no products of infinity and zero. NaN stays.
  void place(std::int64_t n, std::vector<A>& points) const {
    const A* last = grid_.data() + (bases + order_) * inputs;
    for (std::int64_t i = 0; i < inputs; ++i) {
      const A value = *x.at(n * inputs + i);
      points[i] = value < grid_[i] || value > last[i] ? last[i] : value;
    }
  }

  // [B, I] to [I, B].
  void transpose(const std::vector<A>& from, A* to) const {
    for (std::int64_t i = 0; i < inputs; ++i) {
      for (std::int64_t b = 0; b < bases; ++b) {
        to[i * bases + b] = from[b * inputs + i];
      }
    }
  }

  void smooth(std::int64_t n, bool with_slopes) {
    for (std::int64_t i = n * inputs; i < (n + 1) * inputs; ++i) {
      const A value = *x.at(i), sigmoid = 1 / (1 + std::exp(-value));
      silu_[i] = value * sigmoid;
      if (with_slopes) {
        silu_slopes_[i] = sigmoid * (1 + value * (1 - sigmoid));
      }
    }
  }

  const int order_;
  std::vector<A> grid_, inverses_, values_, slopes_, silu_, silu_slopes_;
};

template <typename T>
void forward(Layer<T>& layer, const Result<T>& out) {
  using A = accumulate_t<T>;
  const std::int64_t length = layer.length(layer.inputs), tiles = (layer.outputs + kDotColumns - 1) / kDotColumns;
  layer.evaluate(false);
  std::vector<A> packed(layer.rows * length);
  for (std::int64_t n = 0; n < layer.rows; ++n) {
    layer.pack(n, 0, layer.inputs, packed.data() + n * length);
  }
  parallel_tiles(tiles, kDotColumns * (layer.rows + 4) * length, [&](std::int64_t first, std::int64_t last) {
    std::vector<A> weights(kDotColumns * length), sums(layer.rows * kDotColumns);
    for (std::int64_t tile = first; tile < last; ++tile) {
      const std::int64_t start = tile * kDotColumns, count = std::min<std::int64_t>(kDotColumns, layer.outputs - start);
      for (std::int64_t o = 0; o < count; ++o) {
        layer.pack_weights(start + o, 0, layer.inputs, weights.data() + o * length);
      }
      layer.loops().matmul_transposed(packed.data(), layer.rows, weights.data(), length, sums.data(), kDotColumns);
      for (std::int64_t n = 0; n < layer.rows; ++n) {
        out.put(n * layer.outputs + start, count, sums.data() + n * kDotColumns);
      }
    }
  });
}

template <typename T>
struct LayerGradients {
  Result<T> x, base, spline, scaler;
};

// The gradients of the weights of `count` inputs, from those of the packed weights [O, length].
template <typename T>
void put_weight_gradients(const Layer<T>& layer, std::int64_t first, std::int64_t count,
                          const accumulate_t<T>* gradients, const LayerGradients<T>& into) {
  const int bases = static_cast<int>(layer.bases);
  std::vector<accumulate_t<T>> scaled(count * bases), of_scaler(count);
  for (std::int64_t o = 0; o < layer.outputs; ++o) {
    const std::int64_t at = o * layer.inputs + first;
    const auto* gradient = gradients + o * layer.length(count);
    layer.loops().scale_groups(gradient, layer.scaler.at(at), count, bases, scaled.data());
    layer.loops().dot_groups(gradient, layer.spline.at(at * bases), count, bases, of_scaler.data());
    into.spline.put(at * bases, count * bases, scaled.data());
    into.scaler.put(at, count, of_scaler.data());
    into.base.put(at, count, gradient + count * bases);
  }
}

// Takes as many inputs at a time as fill a row of kRowUnit elements: their weights are read once.
template <typename T>
void backward(Layer<T>& layer, const Tensor& grad_tensor, const LayerGradients<T>& into) {
  using A = accumulate_t<T>;
  const Values<T> grad(grad_tensor);
  const std::int64_t group = std::max<std::int64_t>(kRowUnit / (layer.bases + 1), 1), most = layer.length(group);
  const std::int64_t rows = layer.rows, outputs = layer.outputs, tiles = (layer.inputs + group - 1) / group;
  layer.evaluate(true);
  parallel_tiles(tiles, 2 * outputs * (rows + 4) * most, [&](std::int64_t begin, std::int64_t end) {
    std::vector<A> weights(outputs * most), of_weights(outputs * most), packed(rows * most), through(rows * most);
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t first = tile * group, count = std::min(group, layer.inputs - first);
      const std::int64_t length = layer.length(count);
      for (std::int64_t o = 0; o < outputs; ++o) {
        layer.pack_weights(o, first, count, weights.data() + o * length);
      }
      for (std::int64_t n = 0; n < rows; ++n) {
        layer.pack(n, first, count, packed.data() + n * length);
      }
      layer.loops().matmul({grad.at(0), outputs, 1, outputs, weights.data(), length}, rows, through.data());
      layer.loops().matmul({grad.at(0), 1, outputs, rows, packed.data(), length}, outputs, of_weights.data());
      for (std::int64_t n = 0; n < rows; ++n) {
        const A* row = through.data() + n * length;
        for (std::int64_t i = 0; i < count; ++i) {
          const A slope = layer.slope(n, first + i, row + i * layer.bases, row[count * layer.bases + i]);
          into.x.put(n * layer.inputs + first + i, 1, &slope);
        }
      }
      put_weight_gradients(layer, first, count, of_weights.data(), into);
    }
  });
}

std::vector<std::int64_t> output_sizes(const Tensor& x, const Tensor& base_weight) {
  std::vector<std::int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = base_weight.size(0);
  return sizes;
}

Tensor kan_linear(const Tensor& x, const Tensor& grid, const Tensor& base_weight, const Tensor& spline_weight,
                  const Tensor& spline_scaler) {
  check_kan_linear("kan_linear", x, grid, base_weight, spline_weight, spline_scaler);
  if (x.numel() == 0) {  // no inputs: however many rows there are, none needs a look
    return torch::stable::new_zeros(x, output_sizes(x, base_weight));
  }
  Tensor out = torch::stable::new_empty(x, output_sizes(x, base_weight));
  if (out.numel() == 0) {
    return out;
  }
  for_feature(x.scalar_type(), [&]<typename T>() {
    Layer<T> layer(x, grid, base_weight, spline_weight, spline_scaler);
    forward<T>(layer, Result<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kan_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& grid,
                                                               const Tensor& base_weight, const Tensor& spline_weight,
                                                               const Tensor& spline_scaler) {
  const char* op = "kan_linear_backward";
  check_kan_linear(op, x, grid, base_weight, spline_weight, spline_scaler);
  const std::vector<std::int64_t> sizes = output_sizes(x, base_weight);
  check_gradient(op, grad, {sizes.data(), sizes.size()}, {"x"}, x);
  if (x.numel() == 0 || grad.numel() == 0) {
    const auto zeros = [](const Tensor& like) { return torch::stable::new_zeros(like, like.sizes()); };
    return {zeros(x), zeros(base_weight), zeros(spline_weight), zeros(spline_scaler)};
  }
  Tensor of_x = fresh_like(x), of_base = fresh_like(base_weight), of_spline = fresh_like(spline_weight),
         of_scaler = fresh_like(spline_scaler);
  for_feature(x.scalar_type(), [&]<typename T>() {
    Layer<T> layer(x, grid, base_weight, spline_weight, spline_scaler);
    backward<T>(layer, grad, {Result<T>(of_x), Result<T>(of_base), Result<T>(of_spline), Result<T>(of_scaler)});
  });
  return {of_x, of_base, of_spline, of_scaler};
}

}  // namespace
}  // namespace lesa::cpu

STABLE_TORCH_LIBRARY_IMPL(lesa, CPU, m) {
  m.impl("kan_linear", TORCH_BOX(&lesa::cpu::kan_linear));
  m.impl("kan_linear_backward", TORCH_BOX(&lesa::cpu::kan_linear_backward));
}
