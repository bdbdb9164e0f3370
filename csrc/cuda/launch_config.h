// How the kernels are launched: numbers that launches, lesa.status() and tests share. No torch.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace lesa::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarpThreads = 32;
inline constexpr int kWarps = kThreads / kWarpThreads;
// Asked of the compiler as well: at most 128 registers a thread, so that two blocks always fit.
inline constexpr int kResidentBlocks = 2;

inline constexpr int kMostInputs = 64;
inline constexpr int kMostOutputs = 64;

inline constexpr int kVectorBytes = 16;
// Features of one item that a thread holds as floats: every input stays in registers, so that it is read from memory
// once for all M outputs, and before any of them is written.
inline constexpr int kHeldFloats = 64;
// Loads that a thread issues before it uses the first; narrow ones are more, of at most this many items.
inline constexpr int kLoadsInFlight = 4;
inline constexpr int kMostItems = 8;

// Up to here the number of inputs is a compile-time constant; beyond, it is rounded up to the next of 16, 32, 64.
inline constexpr int kExactInputs = 8;
// Dimensions that a kernel iterates over; launches are repeated over those before them.
inline constexpr int kKernelDims = 4;
// Elements that one launch takes of tensors that are not contiguous: below 2^31, a place needs no 64-bit division.
inline constexpr std::int64_t kMostStrided = (std::int64_t{1} << 31) - 1;

// Threads of a block of `combine`: half as many leave fewer registers of a multiprocessor over, 20 warps instead of 16
// share it at K = 8.
inline constexpr int kCombineThreads = 128;
// How many blocks are to share a multiprocessor: so many that a thread has 32 registers and one for every float that it
// holds; none takes less than 56.
constexpr int combine_blocks(int held) { return std::min(65536 / kCombineThreads / (32 + held), 9); }

// Elements of one load for a kernel of this many inputs, element_size bytes each.
constexpr int vector_width(int inputs, int element_size) {
  const auto held = std::bit_floor(static_cast<unsigned>(kHeldFloats / inputs));
  return std::min(kVectorBytes / element_size, static_cast<int>(held));
}

// Inputs whose products with each other one kernel of `gram` keeps in registers. More are taken two groups at a time.
inline constexpr int kGramInputs = 16;
inline constexpr int kGramGroup = kGramInputs / 2;
// A history of 8 and a target: up to here two blocks of a kernel of `gram` run side by side.
inline constexpr int kGramSharing = 9;
// Terms that a thread of `gram` adds up in float32 before it goes on from zero.
inline constexpr int kGramTerms = 64;

// Items that a thread takes at a time, so that as many bytes are in flight as in kLoadsInFlight vectors of 16.
constexpr int items_in_flight(int inputs, int item_bytes) {
  const int items = kLoadsInFlight * kVectorBytes / (inputs * item_bytes);
  return static_cast<int>(std::bit_floor(static_cast<unsigned>(std::clamp(items, 1, kMostItems))));
}

}  // namespace lesa::cuda
