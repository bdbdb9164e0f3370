// What the CPU library tells about itself (the inspection module and the tests look these two up by name).
#pragma once

// JSON: compiler, instruction sets compiled, supported and chosen, sizes that shape the work. Valid until the next
// call.
extern "C" __attribute__((visibility("default"))) const char* lesa_cpu_info();

// Forces an instruction set by name ("avx512", "avx2", "baseline"; "auto" undoes it). 0 on success, 1 if there is no
// such one here. For tests: results of calls in flight on other threads may come from either.
extern "C" __attribute__((visibility("default"))) int lesa_cpu_set_isa(const char* name);
