// Kernels with known results and with planted faults, for test_ptxsim.py.
#include <cuda_bf16.h>

#include <cstdint>

struct History {
  const __nv_bfloat16* features[8];
};

__constant__ float kTable[4] = {0.5F, 2, -3, 8};

// A struct by value, vectors of 16 bytes, a remainder of single elements.
__global__ void predict(History history, const float* weight, const float* bias, const float* gain, __nv_bfloat16* out,
                        int64_t n) {
  float coefficient[8];
  for (int k = 0; k < 8; ++k) {
    coefficient[k] = *gain * weight[k] + (k == 7 ? 1.F : 0.F);
  }
  const float offset = *gain * *bias;
  int64_t i = static_cast<int64_t>(blockIdx.x * blockDim.x + threadIdx.x) * 8;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * 8;
  for (; i + 8 <= n; i += stride) {
    float sum[8];
    for (float& value : sum) {
      value = offset;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint4 vector = __ldg(reinterpret_cast<const uint4*>(history.features[k] + i));
      const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&vector);
      for (int j = 0; j < 4; ++j) {
        const float2 two = __bfloat1622float2(pairs[j]);
        sum[2 * j] += coefficient[k] * two.x;
        sum[2 * j + 1] += coefficient[k] * two.y;
      }
    }
    uint4 result;
    for (int j = 0; j < 4; ++j) {
      reinterpret_cast<__nv_bfloat162*>(&result)[j] = __floats2bfloat162_rn(sum[2 * j], sum[2 * j + 1]);
    }
    *reinterpret_cast<uint4*>(out + i) = result;
  }
  for (; i < n; ++i) {
    float sum = offset;
    for (int k = 0; k < 8; ++k) {
      sum += coefficient[k] * __bfloat162float(history.features[k][i]);
    }
    out[i] = __float2bfloat16(sum);
  }
}

// A parameter that is indexed at run time.
__global__ void choose(History history, int which, __nv_bfloat16* out) {
  out[threadIdx.x] = history.features[which + threadIdx.x % 2][threadIdx.x];
}

// Shuffles, shared memory, and an atomic sum of all blocks.
__global__ void reduce(const float* x, float* y, int n) {
  __shared__ float of_warp[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    sum += x[i] * __expf(-fabsf(x[i]));
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(~0U, sum, distance);
  }
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.F;
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_down_sync(~0U, sum, distance);
    }
    if (threadIdx.x == 0) {
      atomicAdd(y, sum);
    }
  }
}

// Atomics on shared memory by all warps, dynamic shared memory, votes.
__global__ void count(const int* x, int* y) {
  extern __shared__ int counts[];
  if (threadIdx.x < 4) {
    counts[threadIdx.x] = 0;
  }
  __syncthreads();
  atomicAdd(&counts[x[threadIdx.x]], 1);
  __syncthreads();
  if (threadIdx.x < 4) {
    y[threadIdx.x] = counts[threadIdx.x];
  }
  const unsigned ones = __ballot_sync(~0U, x[threadIdx.x] == 1);
  if (threadIdx.x % 32 == 0) {
    y[4 + threadIdx.x / 32] = __popc(ones);
  }
}

__global__ void branches(const int* x, float* y) {
  const int i = threadIdx.x;
  switch (x[i]) {
    case 0: y[i] = 1.5F; break;
    case 1: y[i] = sqrtf(2.F + i); break;
    case 2: y[i] = __fdividef(1.F, i + 1.F); break;
    case 3: y[i] = tanhf(i * .01F); break;
    case 4: y[i] = logf(i + 1.F); break;
    case 5: y[i] = expf(i * .01F); break;
    case 6: y[i] = kTable[i % 4]; break;
    default: y[i] = -1;
  }
}

// An array that lives in local memory, since its index is not known before.
__global__ void local(const int* x, int* y) {
  volatile int places[8];
  for (int i = 0; i < 8; ++i) {
    places[i] = i * i;
  }
  y[threadIdx.x] = places[x[threadIdx.x]];
}

// One warp alone reads a byte and writes it again: no race. With `others` a second one reads it too: a race.
__global__ void reread(float* y, int others) {
  __shared__ volatile float values[32];
  if (threadIdx.x < 32) {
    values[threadIdx.x] = threadIdx.x;
  }
  __syncthreads();
  float value = 0;
  if (threadIdx.x < 32 || others) {
    value = values[threadIdx.x % 32];
  }
  if (threadIdx.x < 32) {
    values[threadIdx.x] = value + 1;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    y[threadIdx.x] = values[threadIdx.x];
  }
}

// Two 8x8 matrices of 16-bit elements to registers and back, the second one transposed on its way.
__global__ void matrices(const unsigned short* x, unsigned short* y) {
  __shared__ __align__(16) unsigned short a[128], b[128];
  const int t = threadIdx.x;
  for (int i = t; i < 128; i += 32) {
    a[i] = x[i];
  }
  __syncthreads();
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(a + (t % 16) * 8));
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(b + (t % 16) * 8));
  unsigned first;
  unsigned second;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "r"(from));
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(to), "r"(first) : "memory");
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to + 128), "r"(second) : "memory");
  __syncthreads();
  for (int i = t; i < 128; i += 32) {
    y[i] = b[i];
  }
}

__global__ void writes_past_the_end(float* y) { y[threadIdx.x + 1] = 1; }

__global__ void writes_nowhere(float* y) { (y + (1 << 30))[threadIdx.x] = 1; }

__global__ void reads_at_an_odd_address(float* y) {
  y[threadIdx.x] = reinterpret_cast<float2*>(y + 1)->x + reinterpret_cast<float2*>(y + 1)->y;
}

__global__ void reads_what_another_warp_writes(float* y) {
  __shared__ float values[256];
  values[threadIdx.x] = y[threadIdx.x];
  y[threadIdx.x] = values[255 - threadIdx.x];
}

__global__ void writes_what_another_warp_writes(float* y) {
  __shared__ float value;
  value = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = value;
}

__global__ void reads_what_nothing_wrote(float* y) {
  __shared__ volatile float values[256];
  y[threadIdx.x] = values[threadIdx.x];
}

__global__ void leaves_shared_memory(float* y) {
  __shared__ volatile float values[256];
  values[threadIdx.x + 1] = 1;
}

__global__ void misses_a_barrier(float* y) {
  if (threadIdx.x < 64) {
    __syncthreads();
    y[threadIdx.x] = 1;
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffles_without_a_lane(float* y) {
  if (threadIdx.x % 32 != 5) {
    y[threadIdx.x] = __shfl_xor_sync(~0U, y[threadIdx.x], 1);
  }
  y[threadIdx.x] += 1;
}

__global__ void never_ends(volatile float* y) {
  while (y[threadIdx.x] != 5) {
  }
}

__global__ void traps(float*) { __trap(); }

__global__ void copies_in_bulk(float*) { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
