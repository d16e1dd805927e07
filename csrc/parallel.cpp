#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
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

#ifdef _OPENMP

bool is_forked_child = false;
#ifdef __unix__
const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
#endif

void run_on_pool(int threads, int64_t jobs, const Jobs& job, Failure& failure) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t n = 0; n < jobs; ++n) attempt(job, omp_get_thread_num(), n, failure);
}

void run_on_threads(int threads, int64_t jobs, const Jobs& job, Failure& failure) {
  if (is_forked_child)
    std::thread([&] { run_on_pool(threads, jobs, job, failure); }).join();
  else
    run_on_pool(threads, jobs, job, failure);
}

#else

void run_on_threads(int threads, int64_t jobs, const Jobs& job, Failure& failure) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t n = next++; n < jobs; n = next++) attempt(job, thread, n, failure);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (auto& other : others) other.join();
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
