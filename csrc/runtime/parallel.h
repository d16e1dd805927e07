// Jobs on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace gossamer {

// Calls job(thread, n) for every n below `jobs`, with thread in [0, threads). Each job runs whole on one thread, so
// that what it computes does not depend on their number. If jobs throw, one of the exceptions is thrown again at the
// end.
//
// The threads are OpenMP's, shared with torch, or own ones where the build lacks OpenMP; there, where the system starts
// no more, the work is done by those there are. A forked child has none of its parent's threads, while OpenMP would
// wait for them: there the calls start from a new thread, which gets a pool of its own.
void run_parallel(int threads, int64_t jobs, const std::function<void(int, int64_t)>& job);

}  // namespace gossamer
