#include "runtime/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __unix__
#include <pthread.h>
#endif

namespace gossamer {
namespace {

// The first exception of several threads.
class Failure {
 public:
  void keep(std::exception_ptr exception) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!exception_) exception_ = std::move(exception);
  }
  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr exception_;
};

using Jobs = std::function<void(int, int64_t)>;

void attempt(const Jobs& job, int thread, int64_t n, Failure& failure) {
  try {
    job(thread, n);
  } catch (...) {
    failure.keep(std::current_exception());
  }
}

// Whether the thread could be started: the system may have none to give.
template <class Work>
bool start(std::thread& thread, const Work& work) {
  try {
    thread = std::thread(work);
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

#ifdef _OPENMP

// Whether this process was forked and has not executed a program since, as Linux says. OpenMP may have started threads
// before the fork, which nothing here was loaded to see.
bool is_fork_at_load() {
  bool forked = false;
#ifdef __linux__
  if (std::FILE* file = std::fopen("/proc/self/stat", "r")) {
    constexpr unsigned kForkedNoExec = 0x40;  // PF_FORKNOEXEC
    char text[512] = {};
    unsigned flags = 0;
    const size_t length = std::fread(text, 1, sizeof text - 1, file);
    const char* after_name = length > 0 ? std::strrchr(text, ')') : nullptr;
    if (after_name != nullptr && std::sscanf(after_name + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1)
      forked = (flags & kForkedNoExec) != 0;
    std::fclose(file);
  }
#endif
  return forked;
}

bool is_forked_child = is_fork_at_load();
#ifdef __unix__
const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
#endif

void run_on_pool(int threads, int64_t jobs, const Jobs& job, Failure& failure) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t n = 0; n < jobs; ++n) attempt(job, omp_get_thread_num(), n, failure);
}

void run_on_threads(int threads, int64_t jobs, const Jobs& job, Failure& failure) {
  if (!is_forked_child) {
    run_on_pool(threads, jobs, job, failure);
    return;
  }
  std::thread caller;
  if (start(caller, [&] { run_on_pool(threads, jobs, job, failure); }))
    caller.join();
  else
    for (int64_t n = 0; n < jobs; ++n) attempt(job, 0, n, failure);
}

#else

void run_on_threads(int threads, int64_t jobs, const Jobs& job, Failure& failure) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t n = next++; n < jobs; n = next++) attempt(job, thread, n, failure);
  };
  std::vector<std::thread> others(threads - 1);
  size_t started = 0;
  while (started < others.size() && start(others[started], [&work, started] { work(static_cast<int>(started) + 1); }))
    ++started;
  work(0);
  for (size_t n = 0; n < started; ++n) others[n].join();
}

#endif

}  // namespace

void run_parallel(int threads, int64_t jobs, const Jobs& job) {
  Failure failure;
  threads = static_cast<int>(std::min<int64_t>(threads, jobs));
  if (threads <= 1) {
    for (int64_t n = 0; n < jobs; ++n) attempt(job, 0, n, failure);
  } else {
    run_on_threads(threads, jobs, job, failure);
  }
  failure.rethrow();
}

}  // namespace gossamer
