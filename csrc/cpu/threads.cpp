// The team of threads: torch's own, found at run time.
//
// torch's operators run on OpenMP, whose idle workers spin for a while. A second pool of threads would fight with them
// for the cores, and a second OpenMP runtime may end the process. So nothing is linked: the entry point behind
// "#pragma omp parallel" is looked up among what the process has loaded (libgomp has it, LLVM's and Intel's runtimes
// have it too). Where there is none, threads are started for each call.
#include "threads.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace gradnorm::cpu {

namespace {

using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

Parallel find_parallel() { return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

}  // namespace

void on_team(int threads, void (*body)(void*), void* data) {
  if (threads <= 1) return body(data);
  static const Parallel parallel = find_parallel();
  if (parallel) return parallel(body, data, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

}  // namespace gradnorm::cpu
