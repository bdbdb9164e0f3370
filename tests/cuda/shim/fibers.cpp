// The scheduler behind cuda_runtime.h: threads of a block as ucontext fibers, known to AddressSanitizer.
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace shim {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;

enum class State { ready, in_barrier, in_exchange, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::ready;
  int round =
      0;  // of exchanges: two are kept, so that a lane that runs ahead does not overwrite what others still read
};

struct Warp {
  std::array<unsigned long long, kWarp> lanes[2];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
const std::function<void()>* body = nullptr;
ucontext_t scheduler;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
Fiber* running = nullptr;

void leave(State state) {
  Fiber& self = *running;
  self.state = state;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void start() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  leave(State::done);
}

void prepare(Fiber& fiber) {
  fiber.state = State::ready;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start, 0);
}

void resume(std::size_t index) {
  running = &fibers[index];
  threadIdx.x = static_cast<unsigned>(index);
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, running->stack.get(), kStackBytes);
  swapcontext(&scheduler, &running->context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Releases the fibers [first, last) if all of them wait in this state.
bool release(std::size_t first, std::size_t last, State state) {
  for (std::size_t i = first; i < last; ++i) {
    if (fibers[i].state != state) {
      return false;
    }
  }
  for (std::size_t i = first; i < last; ++i) {
    fibers[i].state = State::ready;
  }
  return true;
}

void run_block(std::size_t threads) {
  for (std::size_t i = 0; i < threads; ++i) {
    prepare(fibers[i]);
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (std::size_t warp = 0; warp < threads; warp += kWarp) {
      do {
        for (std::size_t i = warp; i < warp + kWarp; ++i) {
          if (fibers[i].state == State::ready) {
            resume(i);
            moved = true;
          }
        }
      } while (release(warp, warp + kWarp, State::in_exchange));
    }
    moved = release(0, threads, State::in_barrier) || moved;
  }
  for (std::size_t i = 0; i < threads; ++i) {
    if (fibers[i].state != State::done) {
      const char* where = fibers[i].state == State::in_barrier ? "a barrier" : "a shuffle";
      fibers.clear();  // stacks that were left in the middle are not used again
      throw std::runtime_error("thread " + std::to_string(i) + " waits in " + where + " that others do not reach");
    }
  }
}

}  // namespace

void run_grid(dim3 blocks, dim3 threads, const std::function<void()>& kernel) {
  if (threads.x % kWarp != 0 || threads.y != 1 || threads.z != 1 || blocks.x == 0 || blocks.y != 1 || blocks.z != 1) {
    throw std::runtime_error("a launch must have one dimension, whole warps and at least one block");
  }
  if (fibers.size() < threads.x) {
    fibers = std::vector<Fiber>(threads.x);
    warps = std::vector<Warp>(threads.x / kWarp);
  }
  body = &kernel;
  blockDim = threads;
  gridDim = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
    run_block(threads.x);
  }
}

void wait_for_block() { leave(State::in_barrier); }

const std::array<unsigned long long, kWarp>& exchange_in_warp(unsigned long long bits) {
  auto& lanes = warps[threadIdx.x / kWarp].lanes[running->round++ % 2];
  lanes[threadIdx.x % kWarp] = bits;
  leave(State::in_exchange);
  return lanes;
}

}  // namespace shim

namespace {
cudaError_t result = cudaSuccess;
}

cudaError_t launch_result() { return result; }

extern "C" void fail_launches(int error) { result = static_cast<cudaError_t>(error); }

const char* cudaGetErrorString(cudaError_t) { return "the launch was refused"; }

// A device of one multiprocessor, whose kernels have two resident blocks: small inputs make threads loop.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
