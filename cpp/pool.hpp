// Threads that wait for work, shared by every call in the process. A forked child starts its own.
#pragma once

#include <functional>

namespace gemma4_moe {

// Runs `body` on the calling thread and on up to threads - 1 others at once, and returns when all have returned. The
// bodies divide the work among themselves; one that comes late must find nothing left and return. Calls from several
// threads share the pool. `body` must not throw.
void run_on_threads(int threads, const std::function<void()>& body);

}  // namespace gemma4_moe
