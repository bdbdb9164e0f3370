// The kernel of forecast_norm: a forecast of K slots and its layer norm, one row of channels after the other.
//
// A team holds the forecast of its row in registers, up to 4096 channels, so that each input is read from memory once;
// of longer rows it computes the forecast three times, from what the caches still hold. Mean, then centred variance, in
// float32. Only the last pass writes, and each member only where it alone has read: the forecast may be kept in the
// place of an input.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/rows.cuh"

namespace lesa::cuda {
namespace {

template <typename T>
struct NormTask {
  const T* inputs[kMostInputs];
  T* kept;
  T* out;
  Parameter<T> coefficients;
  Parameter<T> offsets;
  Parameter<T> scale;
  Parameter<T> shift;
  Rows rows;
  std::int64_t rows_per_entry;
  int num_inputs;
  float eps;
};

// Neighbours in a row of a parameter; for more than one, takes_vectors must hold.
template <int kWidth, typename T>
__device__ Vector<float, kWidth> read_parameter(const Parameter<T>& parameter, std::int64_t row, std::int64_t column) {
  if constexpr (kWidth == 1) {
    return {parameter.at(row, column)};
  } else {
    const std::int64_t index = row * parameter.row_stride + column;
    if (parameter.is_float) {
      return load_vector<float, kWidth>(static_cast<const float*>(parameter.data) + index);
    }
    const auto narrow = load<T, kWidth>(static_cast<const T*>(parameter.data) + index);
    Vector<float, kWidth> result;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      result[e] = widen(narrow[e]);
    }
    return result;
  }
}

template <typename T>
bool takes_vectors(const Parameter<T>& parameter) {
  const std::int64_t row_bytes = parameter.row_stride * (parameter.is_float ? sizeof(float) : sizeof(T));
  return parameter.column_stride == 1 && is_aligned(parameter.data) && row_bytes % kVectorBytes == 0;
}

// The forecast of a member's vectors from `start` on, in a row whose first element stands at `place`.
template <typename T, int kWidth, int kMembers>
__device__ void forecast_part(const NormTask<T>& task, const float* coefficients, float offset, std::int64_t place,
                              std::int64_t start, Vector<float, kWidth> (&values)[Share<kWidth, kMembers>::kTurns]) {
  using Row = Share<kWidth, kMembers>;
  constexpr int kGroup = std::max(kRowLoads / Row::kTurns, 1);
#pragma unroll
  for (int turn = 0; turn < Row::kTurns; ++turn) {
    values[turn] = {};
  }
#pragma unroll 1
  for (int first = 0; first < task.num_inputs; first += kGroup) {
    Vector<T, kWidth> group[kGroup][Row::kTurns];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
      for (int turn = 0; turn < Row::kTurns; ++turn) {
        const std::int64_t column = Row::column(start, turn);
        group[j][turn] = {};
        if (first + j < task.num_inputs && column < task.rows.channels) {
          group[j][turn] = load<T, kWidth>(task.inputs[first + j] + place + column);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (first + j < task.num_inputs) {
#pragma unroll
        for (int turn = 0; turn < Row::kTurns; ++turn) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            values[turn][e] = add_term(values[turn][e], coefficients[first + j], widen(group[j][turn][e]));
          }
        }
      }
    }
  }
#pragma unroll
  for (int turn = 0; turn < Row::kTurns; ++turn) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      values[turn][e] += offset;
    }
  }
}

template <typename T, int kWidth, int kMembers>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) norm_kernel(const __grid_constant__ NormTask<T> task) {
  using Row = Share<kWidth, kMembers>;
  __shared__ float coefficients[kMostInputs];

  for (int k = threadIdx.x; k < task.num_inputs; k += kThreads) {
    coefficients[k] = task.coefficients.at(0, k);
  }
  const float offset = task.offsets.at(0, 0);
  __syncthreads();

  const std::int64_t channels = task.rows.channels;
  const auto sum_of_row = [](float sum) { return Team<kMembers>::reduce(sum, [](float a, float b) { return a + b; }); };
  for (std::int64_t row = Team<kMembers>::first_row(); row < task.rows.count; row += Team<kMembers>::row_step()) {
    const std::int64_t place = row * channels, entry = row / task.rows_per_entry;
    const auto forecast = [&](std::int64_t start, Vector<float, kWidth>(&values)[Row::kTurns]) {
      forecast_part<T, kWidth, kMembers>(task, coefficients, offset, place, start, values);
    };
    Row share;
    share.channels = channels;
    float sum = 0.0f;
    share.template pass<true>(forecast, [&](std::int64_t, const Vector<float, kWidth>& values) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        sum += values[e];
      }
    });
    const float mean = sum_of_row(sum) / static_cast<float>(channels);
    float squares = 0.0f;
    share.template pass<false>(forecast, [&](std::int64_t, const Vector<float, kWidth>& values) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        squares = add_term(squares, values[e] - mean, values[e] - mean);
      }
    });
    const float factor = 1.0f / std::sqrt(sum_of_row(squares) / static_cast<float>(channels) + task.eps);
    share.template pass<false>(forecast, [&](std::int64_t column, const Vector<float, kWidth>& values) {
      const auto scale = read_parameter<kWidth>(task.scale, entry, column);
      const auto shift = read_parameter<kWidth>(task.shift, entry, column);
      Vector<float, kWidth> normed;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        normed[e] = (values[e] - mean) * factor * (1.0f + scale[e]) + shift[e];
      }
      if (task.kept != nullptr) {
        store_vector<T, kWidth>(task.kept + place + column, values);
      }
      store_vector<T, kWidth>(task.out + place + column, normed);
    });
  }
}

}  // namespace

template <typename T>
void normalize(const NormedForecast<T>& forecast, const Target& target) {
  const auto& [rows, rows_per_entry, inputs, kept, out, coefficients, offsets, scale, shift, eps] = forecast;
  NormTask<T> task{
      {}, kept, out, coefficients, offsets, scale, shift, rows, rows_per_entry, static_cast<int>(inputs.size()), eps};
  std::copy(inputs.begin(), inputs.end(), task.inputs);
  const bool aligned = std::all_of(inputs.begin(), inputs.end(), is_aligned) && is_aligned(kept) && is_aligned(out) &&
                       takes_vectors(scale) && takes_vectors(shift);
  for_rows<vector_width(1, sizeof(T))>(rows, aligned, [&]<int kWidth, int kMembers>() {
    launch_rows<norm_kernel<T, kWidth, kMembers>, kMembers>(task, target);
  });
}

template void normalize<float>(const NormedForecast<float>&, const Target&);
template void normalize<float16>(const NormedForecast<float16>&, const Target&);
template void normalize<bfloat16>(const NormedForecast<bfloat16>&, const Target&);

}  // namespace lesa::cuda
