// Advice to the system on memory that is about to be written.
#pragma once

#include <cstdint>

namespace gemma4_moe {

// Lets fresh memory come in large pages, where the system has them: mapping small ones can take several times as long as
// the work. Whatever the system answers, the memory is as usable as before.
void advise_large_pages(uintptr_t address, int64_t bytes);

}  // namespace gemma4_moe
