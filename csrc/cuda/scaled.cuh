// The kernels of push_scaled and forecast_scaled_into, for rings of one byte an element and a scale for each row.
//
// A row's scale follows from its largest magnitude, which is known only after a pass over all of the row. push_scaled
// holds the row in registers meanwhile, up to 4096 channels, and reads longer ones again. M forecasts do not fit, so
// forecast_scaled_into takes two passes: the first writes `out` and finds the largest magnitudes; the second reads the
// ring again, which the caches serve, and writes the forecasts that are kept.
//
// Reads precede writes: a member reads its vector of all inputs before it writes it to any slot, and scales, which all
// members read, are written when the whole team is through with the row. So all inputs are held, at most 64 floats:
// vectors of 8 channels for up to 8 inputs; more inputs go channel by channel.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/rows.cuh"

namespace lesa::cuda {

// The bits of a magnitude, in whose order NaN comes last: their maximum loses none.
__device__ inline std::uint32_t magnitude_bits(float value) {
  return std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
}

struct Larger {
  constexpr std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const { return std::max(a, b); }
};

template <int kWidth>
__device__ std::uint32_t largest_of(std::uint32_t largest, const Vector<float, kWidth>& vector) {
#pragma unroll
  for (const float value : vector) {
    largest = std::max(largest, magnitude_bits(value));
  }
  return largest;
}

template <typename Q, int kWidth>
__device__ void store_scaled(Q* address, const Vector<float, kWidth>& vector, float inverse) {
  Vector<Q, kWidth> elements;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    elements[e] = inverse == 0.0f ? Q{} : narrow<Q>(vector[e] * inverse);
  }
  store<Q, kWidth>(address, elements);
}

template <typename Q, typename T>
struct CopyScaledTask {
  const T* feature;
  ScaledSlot<Q> slot;
  Rows rows;
};

template <typename Q, typename T, int kWidth, int kMembers>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    copy_scaled_kernel(const __grid_constant__ CopyScaledTask<Q, T> task) {
  using Row = Share<kWidth, kMembers>;
  const std::int64_t channels = task.rows.channels;
  for (std::int64_t row = Team<kMembers>::first_row(); row < task.rows.count; row += Team<kMembers>::row_step()) {
    const std::int64_t place = row * channels;
    const auto read = [&](std::int64_t start, Vector<float, kWidth>(&values)[Row::kTurns]) {
      Vector<T, kWidth> vectors[Row::kTurns];
#pragma unroll
      for (int turn = 0; turn < Row::kTurns; ++turn) {
        const std::int64_t column = Row::column(start, turn);
        vectors[turn] = {};
        if (column < channels) {
          vectors[turn] = load_vector<T, kWidth>(task.feature + place + column);
        }
      }
#pragma unroll
      for (int turn = 0; turn < Row::kTurns; ++turn) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          values[turn][e] = widen(vectors[turn][e]);
        }
      }
    };
    Row share;
    share.channels = channels;
    std::uint32_t largest = 0;
    share.template pass<true>(read, [&](std::int64_t, const Vector<float, kWidth>& values) {
      largest = largest_of<kWidth>(largest, values);
    });
    largest = Team<kMembers>::reduce(largest, Larger{});
    const auto [scale, inverse] = row_scale<Q>(std::bit_cast<float>(largest));
    share.template pass<false>(read, [&](std::int64_t column, const Vector<float, kWidth>& values) {
      store_scaled<Q, kWidth>(task.slot.elements + place + column, values, inverse);
    });
    if (Team<kMembers>::member() == 0) {
      task.slot.scales[row] = scale;
    }
  }
}

template <typename Q, typename T>
struct ScaledTask {
  ScaledSlot<Q> inputs[kMostInputs];
  ScaledSlot<Q> kept[kMostOutputs];
  T* out;
  Parameter<T> coefficients;
  Parameter<T> offsets;
  Rows rows;
  int num_inputs;
  int num_outputs;
  bool keeps;  // any forecast
};

// One vector of every input, in registers; inputs that do not exist are zeros, or left out eight at a time.
template <typename Q, int kWidth>
struct History {
  static constexpr int kInputs = kHeldFloats / kWidth;

  int used;
  float features[kInputs][kWidth];

  __device__ void read(const ScaledSlot<Q>* slots, std::int64_t row, std::int64_t place) {
#pragma unroll
    for (int first = 0; first < kInputs; first += kExactInputs) {
      if (first < used) {
        Vector<Q, kWidth> elements[kExactInputs];
        float scales[kExactInputs];
#pragma unroll
        for (int j = 0; j < kExactInputs; ++j) {
          elements[j] = {};
          scales[j] = 0.0f;
          if (first + j < used) {
            elements[j] = load<Q, kWidth>(slots[first + j].elements + place);
            scales[j] = slots[first + j].scales[row];
          }
        }
#pragma unroll
        for (int j = 0; j < kExactInputs; ++j) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            features[first + j][e] = widen(elements[j][e]) * scales[j];
          }
        }
      }
    }
  }

  __device__ Vector<float, kWidth> forecast(const float* coefficients, float offset) const {
    Vector<float, kWidth> sums{};
#pragma unroll
    for (int first = 0; first < kInputs; first += kExactInputs) {
      if (first < used) {
#pragma unroll
        for (int k = first; k < first + kExactInputs; ++k) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            sums[e] = add_term(sums[e], coefficients[k], features[k][e]);
          }
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      sums[e] += offset;
    }
    return sums;
  }
};

template <typename Q, typename T, int kWidth, int kMembers>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    forecast_scaled_kernel(const __grid_constant__ ScaledTask<Q, T> task) {
  constexpr int kInputs = History<Q, kWidth>::kInputs;
  constexpr int kSpan = kMembers * kWidth;
  constexpr int kEach = kMostOutputs / kWarpThreads;  // forecasts whose scales a lane looks after
  alignas(16) __shared__ float coefficients[kMostOutputs * kInputs];
  __shared__ float offsets[kMostOutputs];

  for (int i = threadIdx.x; i < task.num_outputs * kInputs; i += kThreads) {
    const int k = i % kInputs;
    coefficients[i] = k < task.num_inputs ? task.coefficients.at(i / kInputs, k) : 0.0f;
  }
  for (int m = threadIdx.x; m < task.num_outputs; m += kThreads) {
    offsets[m] = task.offsets.at(0, m);
  }
  __syncthreads();

  const int member = Team<kMembers>::member(), lane = member % kWarpThreads;
  const std::int64_t channels = task.rows.channels;
  for (std::int64_t row = Team<kMembers>::first_row(); row < task.rows.count; row += Team<kMembers>::row_step()) {
    History<Q, kWidth> history;
    history.used = task.num_inputs;
    const auto forecast = [&](int m) { return history.forecast(coefficients + m * kInputs, offsets[m]); };

    // The loops over a row are those of whole warps: lanes without a channel take part in shuffles.
    std::uint32_t largest[kEach] = {};
    for (std::int64_t start = 0; start < channels; start += kSpan) {
      const std::int64_t column = start + member * kWidth;
      if (column < channels) {
        history.read(task.inputs, row, row * channels + column);
      }
#pragma unroll 1
      for (int m = 0; m < task.num_outputs; ++m) {
        std::uint32_t here = 0;
        if (column < channels) {
          const auto values = forecast(m);
          store_vector<T, kWidth>(task.out + (m * task.rows.count + row) * channels + column, values);
          here = largest_of<kWidth>(0, values);
        }
        if (task.kept[m].scales != nullptr) {
          here = reduce_warp(here, Larger{});
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            largest[i] = std::max(largest[i], m == i * kWarpThreads + lane ? here : 0);
          }
        }
      }
    }
    if (!task.keeps) {
      continue;
    }
    Team<kMembers>::combine_warps(largest, Larger{});
    RowScale scales[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      scales[i] = row_scale<Q>(std::bit_cast<float>(largest[i]));
    }
    for (std::int64_t start = 0; start < channels; start += kSpan) {
      const std::int64_t column = start + member * kWidth;
      if (column < channels) {
        history.read(task.inputs, row, row * channels + column);
      }
#pragma unroll 1
      for (int m = 0; m < task.num_outputs; ++m) {
        if (task.kept[m].scales != nullptr) {
          float inverse = 0.0f;
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const float of_lane = __shfl_sync(0xffffffffu, scales[i].inverse, m % kWarpThreads);
            inverse = m / kWarpThreads == i ? of_lane : inverse;
          }
          if (column < channels) {
            store_scaled<Q, kWidth>(task.kept[m].elements + row * channels + column, forecast(m), inverse);
          }
        }
      }
    }
    Team<kMembers>::wait();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int m = i * kWarpThreads + lane;
      if (member < kWarpThreads && m < task.num_outputs && task.kept[m].scales != nullptr) {
        task.kept[m].scales[row] = scales[i].scale;
      }
    }
  }
}

template <typename Q, typename T>
void copy_scaled(const Rows& rows, const T* feature, const ScaledSlot<Q>& slot, const Target& target) {
  const CopyScaledTask<Q, T> task{feature, slot, rows};
  for_rows<kScaledWidth>(rows, is_aligned(feature) && is_aligned(slot.elements), [&]<int kWidth, int kMembers>() {
    launch_rows<copy_scaled_kernel<Q, T, kWidth, kMembers>, kMembers>(task, target);
  });
}

template <typename Q, typename T>
void forecast_scaled(const ScaledForecasts<Q, T>& forecasts, const Target& target) {
  const auto& [rows, inputs, kept, out, coefficients, offsets] = forecasts;
  const auto is_kept = [](const ScaledSlot<Q>& slot) { return slot.scales != nullptr; };
  ScaledTask<Q, T> task{};
  std::copy(inputs.begin(), inputs.end(), task.inputs);
  std::copy(kept.begin(), kept.end(), task.kept);
  task.out = out;
  task.coefficients = coefficients;
  task.offsets = offsets;
  task.rows = rows;
  task.num_inputs = static_cast<int>(inputs.size());
  task.num_outputs = static_cast<int>(kept.size());
  task.keeps = std::any_of(kept.begin(), kept.end(), is_kept);
  const auto fits = [](const ScaledSlot<Q>& slot) { return is_aligned(slot.elements); };
  const bool vectors = inputs.size() <= kHeldFloats / kScaledWidth && is_aligned(out) &&
                       std::all_of(inputs.begin(), inputs.end(), fits) && std::all_of(kept.begin(), kept.end(), fits);
  for_rows<kScaledWidth>(rows, vectors, [&]<int kWidth, int kMembers>() {
    launch_rows<forecast_scaled_kernel<Q, T, kWidth, kMembers>, kMembers>(task, target);
  });
}

}  // namespace lesa::cuda
