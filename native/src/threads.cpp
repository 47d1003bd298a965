#include "threads.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

namespace pp {

namespace {

constexpr uint64_t kOpen = 1u << 15;
constexpr uint64_t kInside = kOpen - 1;
constexpr int64_t kWorkerSpin_ns = 100'000;  // longer than the serial parts between two jobs of one token
constexpr int64_t kCallerSpin_ns = 30'000;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

// Spin on `ready` for about `limit_ns`; false when the time is over.
template <class Ready>
bool spin(int64_t limit_ns, const Ready& ready) {
  int64_t begin = 0;
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
    const int64_t now = now_ns();
    if (begin == 0) begin = now;
    else if (now - begin > limit_ns) return false;
  }
}

}  // namespace

int Threads::available() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return count;
  }
  const long count = sysconf(_SC_NPROCESSORS_ONLN);
  return count > 0 ? int(count) : 1;
}

bool Threads::start(int num_threads, bool pin) {
  stop();
  stopping_ = false;
  pin_ = pin;
  if (num_threads > kMaxWorkers + 1) num_threads = kMaxWorkers + 1;
  for (int i = 0; i + 1 < num_threads; ++i) {
    starts_[i] = {this, i + 1};
    if (pthread_create(&threads_[i], nullptr, entry, &starts_[i]) != 0) {
      stop();
      return fail("cannot start thread %d of %d", i + 1, num_threads);
    }
    ++num_workers_;
  }
  return true;
}

void Threads::stop() {
  stopping_ = true;
  wake_.fetch_add(1);
  futex_wake(wake_, num_workers_);
  for (int i = 0; i < num_workers_; ++i) pthread_join(threads_[i], nullptr);
  num_workers_ = 0;
}

void* Threads::entry(void* argument) {
  auto* start = static_cast<Start*>(argument);
  if (start->pool->pin_) {
    // The index-th CPU of those allowed; the caller's own thread is left to the system.
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
      int wanted = start->index % (CPU_COUNT(&allowed) > 0 ? CPU_COUNT(&allowed) : 1);
      for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed) || wanted-- > 0) continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        sched_setaffinity(0, sizeof one, &one);
        break;
      }
    }
  }
  start->pool->work(start->index);
  return nullptr;
}

void Threads::run_erased(int items, Erased body, const void* context) {
  items_ = items;
  body_ = body;
  context_ = context;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t generation = (state_.load(std::memory_order_relaxed) >> 16) + 1;
  state_.store((generation << 16) | kOpen, std::memory_order_seq_cst);
  wake_.store(uint32_t(generation), std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) futex_wake(wake_, num_workers_);

  for (int item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item, 0);

  // Close the job: nobody enters any more. Then wait for those inside.
  if ((state_.fetch_and(~kOpen, std::memory_order_acq_rel) & kInside) == 0) return;
  const auto left = [this] { return (state_.load(std::memory_order_acquire) & kInside) == 0; };
  if (spin(kCallerSpin_ns, left)) return;
  caller_sleeps_.store(true, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t seen = done_.load(std::memory_order_seq_cst);
    if (left()) break;
    futex_wait(done_, seen);
  }
  caller_sleeps_.store(false, std::memory_order_relaxed);
}

void Threads::work(int index) {
  uint64_t last = 0;
  const auto fresh = [&] {
    const uint64_t state = state_.load(std::memory_order_acquire);
    return ((state & kOpen) && (state >> 16) != last) || stopping_.load(std::memory_order_relaxed);
  };
  for (;;) {
    if (!spin(kWorkerSpin_ns, fresh)) {
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      const uint32_t seen = wake_.load(std::memory_order_seq_cst);
      if (!fresh()) futex_wait(wake_, seen);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      continue;
    }
    if (stopping_.load(std::memory_order_relaxed)) return;
    uint64_t state = state_.load(std::memory_order_acquire);
    bool inside = false;
    while ((state & kOpen) && (state >> 16) != last) {
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
        inside = true;
        break;
      }
    }
    if (!inside) continue;
    last = state >> 16;
    const int items = items_;
    const Erased body = body_;
    const void* context = context_;
    for (int item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item, index);
    const uint64_t before = state_.fetch_sub(1, std::memory_order_seq_cst);
    if (!(before & kOpen) && (before & kInside) == 1) {
      done_.fetch_add(1, std::memory_order_seq_cst);
      if (caller_sleeps_.load(std::memory_order_seq_cst)) futex_wake(done_, 1);
    }
  }
}

}  // namespace pp
