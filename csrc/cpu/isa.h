// The inner loops of the CPU ops as function pointers, one set per instruction set, and which set runs: the widest that
// both the compiler and the processor know, unless a test forces another. Loops run over plain pointers to consecutive
// elements; iterate.h deals with strides and threads.
#pragma once

#include <cstdint>
#include <span>
#include <tuple>

#include "arithmetic.h"

namespace lesa::cpu {

// The most inputs and rows of one call (the contract's limits).
inline constexpr int kMaxInputs = 64;
inline constexpr int kMaxRows = 64;

// M rows of coefficients over K inputs: output m is sum_k coefficients[m * K + k] * input[k] + offsets[m].
template <typename T>
struct LinearMap {
  const accumulate_t<T>* coefficients;
  const accumulate_t<T>* offsets;
  int inputs;
  int rows;
  bool streaming;  // store past the cache where the outputs' addresses allow it
};

template <typename T>
struct Kernels {
  // outputs[m][i] from inputs[k][i], i < count, all of type T. Every element is read from all inputs before it is
  // written, so outputs may be inputs.
  void (*forecast)(const LinearMap<T>& map, const void* const* inputs, void* const* outputs, std::int64_t count);
  // outputs[0][i] = inputs[K - 1][i] + gain * (the single row of map).
  void (*predict)(const LinearMap<T>& map, accumulate_t<T> gain, const void* const* inputs, void* const* outputs,
                  std::int64_t count);
  // Sum of a[i] * b[i], and of a[i]; the order of the additions depends on count alone.
  double (*dot)(const T* a, const T* b, std::int64_t count);
  double (*sum)(const T* a, std::int64_t count);
  // Adds the sums of inputs[i] * inputs[j], j <= i, to sums[i * (K + 1) + j], and those of inputs[j] to its row K.
  void (*gram)(const void* const* inputs, int num_inputs, std::int64_t count, double* sums);
  // Of the forecasts of predict, unrounded: adds sum(sign(error) * inputs[k]) to sums[k], sum(sign(error)) to sums[K]
  // and sum(|error|) to sums[K + 1]; writes the forecasts to `out` unless it is null.
  void (*l1)(const LinearMap<T>& map, accumulate_t<T> gain, const void* const* inputs, const T* target, T* out,
             std::int64_t count, double* sums);
  // 16-bit and float32 elements to and from float32.
  void (*to_float)(const T* from, float* to, std::int64_t count);
  void (*from_float)(const float* from, T* to, std::int64_t count);
};

// Rows of kan's matrices are multiples of so many elements, padded with zeros.
inline constexpr std::int64_t kRowUnit = 64;

// Columns of a product by `matmul_transposed`.
inline constexpr int kDotColumns = 4;

// A product of matrices: c[r, i] = sum_t a[r * row_step + t * term_step] * b[t, i], b [terms, length].
template <typename A>
struct Product {
  const A* a;
  std::int64_t row_step, term_step, terms;
  const A* b;
  std::int64_t length;
};

// B-splines of an order for I inputs: grid [knots, I], inverses [order, knots, I] with 1 / (t[g + d] - t[g]) for d = 1
// and on.
template <typename A>
struct Splines {
  const A* grid;
  const A* inverses;
  std::int64_t inputs;
  int knots, order;
};

template <typename A>
struct KanKernels {
  // c [rows, length].
  void (*matmul)(const Product<A>& product, std::int64_t rows, A* c);
  // out[r * out_step + c] = sum_i a[r, i] * b[c, i], a [rows, length], b [kDotColumns, length].
  void (*matmul_transposed)(const A* a, std::int64_t rows, const A* b, std::int64_t length, A* out,
                            std::int64_t out_step);
  // Bases at x [I], and their derivatives unless `slopes` is null: [bases, I], but room for [knots - 1, I].
  void (*spline_bases)(const Splines<A>& splines, const A* x, A* bases, A* slopes);
  // out[i, b] = weights[i, b] * factors[i], and out[i] = sum_b a[i, b] * b[i, b].
  void (*scale_groups)(const A* weights, const A* factors, std::int64_t groups, int bases, A* out);
  void (*dot_groups)(const A* a, const A* b, std::int64_t groups, int bases, A* out);
};

struct Isa {
  const char* name;
  int vector_bits;
  std::tuple<Kernels<float>, Kernels<float16>, Kernels<bfloat16>, Kernels<double>> kernels;
  std::tuple<KanKernels<float>, KanKernels<double>> kan_kernels;

  template <typename T>
  const Kernels<T>& of() const {
    return std::get<Kernels<T>>(kernels);
  }

  template <typename A>
  const KanKernels<A>& kan_of() const {
    return std::get<KanKernels<A>>(kan_kernels);
  }
};

// Those that were compiled, widest first.
#if defined(__x86_64__)
extern const Isa kAvx512;
extern const Isa kAvx2;
#endif
extern const Isa kBaseline;

// The one in use.
const Isa& chosen_isa();

}  // namespace lesa::cpu
