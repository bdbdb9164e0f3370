// Which instruction set runs: the widest that both the compiler and the processor know, unless a test forces another.
#pragma once

#include <span>
#include <string_view>

#include "cpu/kernels.h"

namespace lesa::cpu {

#if defined(__x86_64__)
extern const Isa kAvx512;
extern const Isa kAvx2;
#endif
extern const Isa kBaseline;

// What was compiled, widest first.
std::span<const Isa* const> compiled();

// Whether this processor can run it.
bool supported(const Isa& isa);

// The one in use.
const Isa& chosen();

// Uses the one of that name from now on, "auto" the widest; false if it is unknown or this processor lacks it.
bool choose(std::string_view name);

}  // namespace lesa::cpu
