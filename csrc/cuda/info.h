// What the CUDA library tells about itself (the inspection module and lesa.status() look it up by name).
#pragma once

// JSON: CUDA version and architectures of the build, how kernels are launched. Needs no GPU; valid for good.
extern "C" __attribute__((visibility("default"))) const char* lesa_cuda_info();
