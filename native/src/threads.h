// A pool of threads that share the items of one job at a time.
//
// Items are handed out one by one by an atomic counter, so a thread that the system slows down takes fewer.
// A worker joins a job only if it is running while the job is open: the caller waits for workers that
// have begun, never for one that is asleep or has no CPU. Waiting spins briefly, then sleeps.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace pp {

class Threads {
 public:
  ~Threads() { stop(); }
  // Starts num_threads - 1 workers (the caller is the other one). `pin` gives each a CPU of its own.
  bool start(int num_threads, bool pin);
  void stop();
  int count() const { return num_workers_ + 1; }

  // Runs body(item, thread) for every item in [0, items); thread is 0 for the caller.
  template <class Body>
  void run(int items, const Body& body) {
    if (items <= 0) return;
    if (items == 1 || num_workers_ == 0) {
      for (int i = 0; i < items; ++i) body(i, 0);
      return;
    }
    run_erased(items, [](const void* context, int item, int thread) { (*static_cast<const Body*>(context))(item, thread); },
               &body);
  }

  // CPUs that this process may use.
  static int available();

 private:
  using Erased = void (*)(const void*, int, int);
  struct Start {
    Threads* pool;
    int index;
  };
  void run_erased(int items, Erased body, const void* context);
  void work(int index);
  static void* entry(void* argument);

  static constexpr int kMaxWorkers = 255;
  pthread_t threads_[kMaxWorkers];
  Start starts_[kMaxWorkers];
  int num_workers_ = 0;
  bool pin_ = false;

  // Job: generation << 16 | open << 15 | workers inside.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> done_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};
  int items_ = 0;
  Erased body_ = nullptr;
  const void* context_ = nullptr;
};

}  // namespace pp
