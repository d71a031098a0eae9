// Which kernel table is in use: the best one that this CPU runs, capped by HYBRID_ISA. It is chosen
// once, at import.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace hybrid {

// Names of the tables that this build holds and this CPU runs, slowest first.
std::vector<std::string> AvailableIsas();

// The table in use. It is process-wide; a session reads it once per token or chunk.
const KernelTable& ActiveKernels();

// Makes `name` the active table. Throws std::invalid_argument if AvailableIsas() lacks it.
void SetIsa(const std::string& name);

// Activates the best available table that is not above `cap` ("" means no cap). Throws
// std::invalid_argument for an unknown name.
void SetBestIsa(const std::string& cap);

}  // namespace hybrid
