// Iterates over strided tensors in step: gives a loop runs of consecutive elements, in parallel where that pays.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "contract.h"

namespace lesa::cpu {

inline constexpr std::size_t kMaxTensors = kMaxHistory + kMaxForecasts;

// Bytes that a thread should move at least, over all tensors: some 40 us of work, several times the cost of a second
// thread, and not so little that a busy machine loses much by waiting for that thread.
inline constexpr std::int64_t kGrainBytes = 1024 * 1024;

// An op that moves this many bytes stores its outputs past the cache, which saves reading them first and leaves the
// cache alone; nothing of such an op would still be there when it ends (docs/performance.md).
inline constexpr std::int64_t kStreamingBytes = 64 * 1024 * 1024;

// Threads take multiples of so many elements, which keeps their vectors whole and their cache lines apart.
inline constexpr std::int64_t kUnit = 64;

// Rows from this length on are read and written in place; shorter or strided ones are gathered into runs of kGathered
// elements.
inline constexpr std::int64_t kLongRow = 128;
inline constexpr std::int64_t kGathered = 128;

// The tensors of one op in the order in which its loop takes them, outputs first.
class TensorIterator {
 public:
  void add_output(TensorView view) {
    add_input(view);
    ++outputs_;
  }
  void add_output(const Tensor& tensor) { add_output(view_of(tensor)); }
  void add_input(TensorView view) {
    views_[tensors_++] = view;
    bytes_per_element_ += view.bytes;
  }
  void add_input(const Tensor& tensor) { add_input(view_of(tensor)); }
  void add_inputs(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
      add_input(tensor);
    }
  }

  // Merges dimensions; to be called once all tensors are in.
  void build(const char* op, Shape shape) { merged_ = lay_out(op, shape, {views_.data(), tensors_}, operands_); }

  const MergedShape& merged() const { return merged_; }
  std::size_t outputs() const { return outputs_; }

  // Whether the outputs are to be stored past the cache.
  bool streaming() const { return merged_.numel * bytes_per_element_ >= kStreamingBytes; }

  // Calls body(pointers, count) for runs that make up elements [begin, end); pointers[i] is where tensor i has the run.
  template <typename Body>
  void for_range(std::int64_t begin, std::int64_t end, const Body& body) const {
    const int innermost = merged_.dims - 1;
    const bool in_rows = std::all_of(operands_.begin(), operands_.begin() + tensors_,
                                     [&](const Operand& operand) { return operand.strides[innermost] == 1; });
    if (in_rows && (merged_.dims == 1 || merged_.sizes[innermost] >= kLongRow)) {
      for_rows(begin, end, body);
    } else {
      for_gathered(begin, end, body);
    }
  }

  // As for_range, over all elements and with several threads.
  template <typename Body>
  void for_each(const Body& body) const {
    const std::int64_t units = (merged_.numel + kUnit - 1) / kUnit;
    parallel_blocks(units, kUnit, [&](std::int64_t first, std::int64_t last) {
      for_range(first * kUnit, std::min(last * kUnit, merged_.numel), body);
    });
  }

  // Calls part(first, last) for ranges that make up `blocks` blocks of so many elements, with several threads where
  // there is enough to move.
  template <typename Part>
  void parallel_blocks(std::int64_t blocks, std::int64_t elements, const Part& part) const {
    const std::int64_t grain = std::max<std::int64_t>(kGrainBytes / (bytes_per_element_ * elements), 1);
    if (blocks <= grain) {
      part(0, blocks);
    } else {
      torch::stable::parallel_for(0, blocks, grain, part);
    }
  }

 private:
  // Coordinates of a row, that is along all merged dimensions but the innermost.
  using Coordinates = std::array<std::int64_t, kMaxDims>;

  Coordinates coordinates_of(std::int64_t row) const {
    Coordinates index;
    for (int d = merged_.dims - 2; d >= 0; --d) {
      index[d] = row % merged_.sizes[d];
      row /= merged_.sizes[d];
    }
    return index;
  }

  // The address of a column of a row.
  char* address(std::size_t tensor, const Coordinates& row, std::int64_t column) const {
    const Operand& operand = operands_[tensor];
    std::int64_t offset = column * operand.strides[merged_.dims - 1];
    for (int d = 0; d < merged_.dims - 1; ++d) {
      offset += row[d] * operand.strides[d];
    }
    return static_cast<char*>(operand.data) + offset * operands_[tensor].bytes;
  }

  // Whether a tensor's elements lie one after the other in the order of the iteration.
  bool is_dense(std::size_t tensor) const {
    std::int64_t expected = 1;
    for (int d = merged_.dims - 1; d >= 0; --d) {
      if (operands_[tensor].strides[d] != expected) {
        return false;
      }
      expected *= merged_.sizes[d];
    }
    return true;
  }

  // Moves elements one by one: from a strided row into a buffer, or back.
  template <typename Word, bool kGather>
  static void move_strided(char* row, std::int64_t stride, char* buffer, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      char *element = row + i * stride * static_cast<std::int64_t>(sizeof(Word)), *place = buffer + i * sizeof(Word);
      std::memcpy(kGather ? place : element, kGather ? element : place, sizeof(Word));
    }
  }

  // Copies elements [begin, begin + count) of a tensor into a buffer, or back.
  template <bool kGather>
  void move(std::size_t tensor, std::int64_t begin, std::int64_t count, char* buffer) const {
    const int innermost = merged_.dims - 1;
    const std::int64_t length = merged_.sizes[innermost], stride = operands_[tensor].strides[innermost];
    const std::int64_t bytes = operands_[tensor].bytes;
    while (count > 0) {
      const std::int64_t column = begin % length, run = std::min(count, length - column);
      char* start = address(tensor, coordinates_of(begin / length), column);
      if (stride == 1) {
        std::memcpy(kGather ? buffer : start, kGather ? start : buffer, run * bytes);
      } else if (bytes == 2) {
        move_strided<std::uint16_t, kGather>(start, stride, buffer, run);
      } else if (bytes == 4) {
        move_strided<std::uint32_t, kGather>(start, stride, buffer, run);
      } else {
        move_strided<std::uint64_t, kGather>(start, stride, buffer, run);
      }
      begin += run;
      count -= run;
      buffer += run * bytes;
    }
  }

  template <typename Body>
  void for_rows(std::int64_t begin, std::int64_t end, const Body& body) const {
    const std::int64_t length = merged_.sizes[merged_.dims - 1];
    void* pointers[kMaxTensors];
    while (begin < end) {
      const std::int64_t column = begin % length, run = std::min(end - begin, length - column);
      const Coordinates row = coordinates_of(begin / length);
      for (std::size_t i = 0; i < tensors_; ++i) {
        pointers[i] = address(i, row, column);
      }
      body(pointers, run);
      begin += run;
    }
  }

  // All inputs of a run are gathered before any output of it is scattered, so outputs may be inputs.
  template <typename Body>
  [[gnu::noinline]] void for_gathered(std::int64_t begin, std::int64_t end, const Body& body) const {
    alignas(64) char buffers[kMaxTensors][kGathered * 8];
    void* pointers[kMaxTensors];
    bool dense[kMaxTensors];
    for (std::size_t i = 0; i < tensors_; ++i) {
      dense[i] = is_dense(i);
    }
    for (; begin < end; begin += kGathered) {
      const std::int64_t run = std::min(end - begin, kGathered);
      for (std::size_t i = 0; i < tensors_; ++i) {
        pointers[i] = dense[i] ? static_cast<char*>(operands_[i].data) + begin * operands_[i].bytes : buffers[i];
        if (i >= outputs_ && !dense[i]) {
          move<true>(i, begin, run, buffers[i]);
        }
      }
      body(pointers, run);
      for (std::size_t i = 0; i < outputs_; ++i) {
        if (!dense[i]) {
          move<false>(i, begin, run, buffers[i]);
        }
      }
    }
  }

  std::size_t tensors_ = 0, outputs_ = 0;
  std::int64_t bytes_per_element_ = 0;
  MergedShape merged_;
  std::array<TensorView, kMaxTensors> views_;
  std::array<Operand, kMaxTensors> operands_;
};

}  // namespace lesa::cpu
