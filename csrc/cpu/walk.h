// Walks strided tensors in step and hands out runs of consecutive elements, in parallel where that pays.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>

#include "geometry.h"

namespace lesa::cpu {

inline constexpr int kMaxStreams = 128;

// Bytes that a thread should move at least, over all streams: some 40 us of work, several times the cost of a second
// thread, and not so little that a busy machine loses much by waiting for that thread.
inline constexpr std::int64_t kGrainBytes = 1024 * 1024;

// A pass that moves this many bytes stores its outputs past the cache, which saves reading them first and leaves the
// cache alone; nothing of such a pass would still be there when it ends (docs/performance.md).
inline constexpr std::int64_t kPastCacheBytes = 64 * 1024 * 1024;

// Threads take multiples of so many elements, which keeps their vectors whole and their cache lines apart.
inline constexpr std::int64_t kUnit = 64;

// Rows from this length on are walked in place; shorter or strided ones are gathered into runs of kGathered elements.
inline constexpr std::int64_t kLongRow = 128;
inline constexpr std::int64_t kGathered = 128;

// A tensor as the walk sees it: any element type of 2, 4 or 8 bytes, strides in elements.
struct Stream {
  char* data;
  const std::int64_t* strides;
  std::int64_t bytes;
};

// Coordinates of a row, that is of all merged dimensions but the innermost.
struct Row {
  std::int64_t index[kMaxDims];

  Row(const Geometry& geometry, std::int64_t row) {
    for (int d = geometry.dims - 2; d >= 0; --d) {
      index[d] = row % geometry.sizes[d];
      row /= geometry.sizes[d];
    }
  }

  char* start(const Geometry& geometry, const Stream& stream) const {
    std::int64_t offset = 0;
    for (int d = 0; d < geometry.dims - 1; ++d) {
      offset += index[d] * stream.strides[d];
    }
    return stream.data + offset * stream.bytes;
  }
};

inline std::int64_t bytes_per_element(std::span<const Stream> streams) {
  return std::accumulate(streams.begin(), streams.end(), std::int64_t{0},
                         [](std::int64_t sum, const Stream& stream) { return sum + stream.bytes; });
}

// Moves elements one by one: from a strided row into a buffer, or back.
template <typename Word, bool kGather>
void move_strided(char* row, std::int64_t stride, char* buffer, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    char *element = row + i * stride * static_cast<std::int64_t>(sizeof(Word)), *place = buffer + i * sizeof(Word);
    std::memcpy(kGather ? place : element, kGather ? element : place, sizeof(Word));
  }
}

// Copies elements [begin, begin + count) of a stream, in the order of the walk, into a buffer or back.
template <bool kGather>
void move(const Geometry& geometry, const Stream& stream, std::int64_t begin, std::int64_t count, char* buffer) {
  const std::int64_t length = geometry.sizes[geometry.dims - 1], stride = stream.strides[geometry.dims - 1];
  while (count > 0) {
    const std::int64_t column = begin % length, run = std::min(count, length - column);
    char* start = Row(geometry, begin / length).start(geometry, stream) + column * stride * stream.bytes;
    if (stride == 1) {
      std::memcpy(kGather ? buffer : start, kGather ? start : buffer, run * stream.bytes);
    } else if (stream.bytes == 2) {
      move_strided<std::uint16_t, kGather>(start, stride, buffer, run);
    } else if (stream.bytes == 4) {
      move_strided<std::uint32_t, kGather>(start, stride, buffer, run);
    } else {
      move_strided<std::uint64_t, kGather>(start, stride, buffer, run);
    }
    begin += run;
    count -= run;
    buffer += run * stream.bytes;
  }
}

// Whether a stream's elements lie one after the other in the order of the walk.
inline bool is_dense(const Geometry& geometry, const Stream& stream) {
  std::int64_t expected = 1;
  for (int d = geometry.dims - 1; d >= 0; --d) {
    if (stream.strides[d] != expected) {
      return false;
    }
    expected *= geometry.sizes[d];
  }
  return true;
}

template <typename Body>
void walk_rows(const Geometry& geometry, std::span<const Stream> streams, std::int64_t begin, std::int64_t end,
               const Body& body) {
  const std::int64_t length = geometry.sizes[geometry.dims - 1];
  void* pointers[kMaxStreams];
  while (begin < end) {
    const std::int64_t column = begin % length, run = std::min(end - begin, length - column);
    const Row row(geometry, begin / length);
    for (std::size_t i = 0; i < streams.size(); ++i) {
      pointers[i] = row.start(geometry, streams[i]) + column * streams[i].bytes;
    }
    body(pointers, run);
    begin += run;
  }
}

// All inputs of a run are gathered before any output of it is scattered, so outputs may be inputs.
template <typename Body>
[[gnu::noinline]] void walk_gathered(const Geometry& geometry, std::span<const Stream> streams, std::size_t outputs,
                                     std::int64_t begin, std::int64_t end, const Body& body) {
  alignas(64) char buffers[kMaxStreams][kGathered * 8];
  void* pointers[kMaxStreams];
  bool dense[kMaxStreams];
  for (std::size_t i = 0; i < streams.size(); ++i) {
    dense[i] = is_dense(geometry, streams[i]);
  }
  for (; begin < end; begin += kGathered) {
    const std::int64_t run = std::min(end - begin, kGathered);
    for (std::size_t i = 0; i < streams.size(); ++i) {
      pointers[i] = dense[i] ? streams[i].data + begin * streams[i].bytes : buffers[i];
      if (i >= outputs && !dense[i]) {
        move<true>(geometry, streams[i], begin, run, buffers[i]);
      }
    }
    body(pointers, run);
    for (std::size_t i = 0; i < outputs; ++i) {
      if (!dense[i]) {
        move<false>(geometry, streams[i], begin, run, buffers[i]);
      }
    }
  }
}

// Calls body(pointers, count) for runs that make up elements [begin, end); pointers[i] is where stream i has the run.
// The first `outputs` streams are written, the others only read.
template <typename Body>
void walk(const Geometry& geometry, std::span<const Stream> streams, std::size_t outputs, std::int64_t begin,
          std::int64_t end, const Body& body) {
  const int innermost = geometry.dims - 1;
  const bool in_rows =
      std::all_of(streams.begin(), streams.end(), [&](const Stream& stream) { return stream.strides[innermost] == 1; });
  if (in_rows && (geometry.dims == 1 || geometry.sizes[innermost] >= kLongRow)) {
    walk_rows(geometry, streams, begin, end, body);
  } else {
    walk_gathered(geometry, streams, outputs, begin, end, body);
  }
}

// Calls part(first, last) for ranges that make up `blocks` blocks of so many elements, with several threads where there
// is enough to move.
template <typename Part>
void parallel_blocks(std::span<const Stream> streams, std::int64_t blocks, std::int64_t elements, const Part& part) {
  const std::int64_t grain = std::max<std::int64_t>(kGrainBytes / (bytes_per_element(streams) * elements), 1);
  if (blocks <= grain) {
    part(0, blocks);
  } else {
    torch::stable::parallel_for(0, blocks, grain, part);
  }
}

// As walk, over all elements and with several threads.
template <typename Body>
void parallel_walk(const Geometry& geometry, std::span<const Stream> streams, std::size_t outputs, const Body& body) {
  const std::int64_t units = (geometry.numel + kUnit - 1) / kUnit;
  parallel_blocks(streams, units, kUnit, [&](std::int64_t first, std::int64_t last) {
    walk(geometry, streams, outputs, first * kUnit, std::min(last * kUnit, geometry.numel), body);
  });
}

}  // namespace lesa::cpu
