// Jobs on more threads than the system has to give: every job runs, and the process goes on. Prints how many ran.
//
//   threads LIMIT [fork]    pthread_create fails from the LIMIT-th call on; `fork` runs the jobs in a forked child
#include <dlfcn.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime/parallel.h"

static int threads_left = 0;

// In place of the C library's, for libstdc++ too.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*work)(void*), void* given) {
  if (threads_left-- <= 0) return EAGAIN;
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return real(thread, attributes, work, given);
}

static int run_jobs() {
  std::atomic<int> done{0};
  gossamer::run_parallel(4, 100, [&](int thread, int64_t) { done += thread >= 0 && thread < 4; });
  std::printf("%d\n", done.load());
  std::fflush(stdout);
  return done == 100 ? 0 : 1;
}

int main(int argc, char** argv) {
  threads_left = std::atoi(argv[1]);
  if (argc < 3 || std::strcmp(argv[2], "fork") != 0) return run_jobs();
  const pid_t child = fork();
  if (child == 0) _exit(run_jobs());
  int status = 1;
  waitpid(child, &status, 0);
  return status == 0 ? 0 : 1;
}
