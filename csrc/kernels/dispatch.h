// Which kernel table is in use: the best one that this CPU runs, chosen once at import, capped by
// HYBRID_ISA.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace hybrid {

// Names of the tables that this build holds and this CPU runs, worst first.
std::vector<std::string> AvailableIsas();

// The table in use. Process-wide; a session reads it once per token or chunk.
const KernelTable& ActiveKernels();

// Makes `name` the active table. Throws std::invalid_argument where AvailableIsas() lacks it.
void SetIsa(const std::string& name);

// The best available table that is not above `cap` ("" is no cap). Throws std::invalid_argument for
// an unknown name.
void SetBestIsa(const std::string& cap);

}  // namespace hybrid
