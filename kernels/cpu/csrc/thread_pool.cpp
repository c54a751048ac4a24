#include "thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>

namespace awq_cpu {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Spins until ready() or the time is over. The first half only pauses; the second also yields, because with as many threads
// as cores whoever is waited for may need this very core.
template <class Ready>
bool spin_until(Ready&& ready, int microseconds) {
  using Clock = std::chrono::steady_clock;
  const auto half = std::chrono::microseconds(microseconds / 2), whole = std::chrono::microseconds(microseconds);
  const auto ready_soon = [&] {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
    return false;
  };
  if (ready_soon()) return true;  // most phases end so: the clock would cost more than they wait
  const auto start = Clock::now();
  for (;;) {
    if (ready_soon()) return true;
    const auto elapsed = Clock::now() - start;
    if (elapsed > whole) return ready();
    if (elapsed > half) sched_yield();
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), process_id_(getpid()) {
  if (num_threads < 1 || num_threads > 1024) {
    throw std::invalid_argument("num_threads: expected 1..1024, found " + std::to_string(num_threads));
  }
  workers_.reserve(num_threads - 1);
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { worker_loop(thread); });
  }
}

ThreadPool::~ThreadPool() {
  if (process_id_ != getpid()) {  // the threads are the parent's; their handles cannot be joined here
    for (auto& worker : workers_) worker.detach();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stopping_.store(true);
    ++num_wakes_;
  }
  sleep_condition_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::check_process() const {
  if (process_id_ != getpid()) {
    throw std::runtime_error("thread pool: made before this process was forked; make the back end after the fork");
  }
}

void ThreadPool::wake() {
  if (num_sleeping_.load(std::memory_order_seq_cst) == 0) return;
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    ++num_wakes_;
  }
  sleep_condition_.notify_all();
}

bool ThreadPool::has_work() const {
  const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
  return static_cast<uint32_t>(ticket) < (ticket >> 32);
}

bool ThreadPool::claim_and_run(int thread) {
  bool worked = false;
  while (has_work()) {
    // The chunk may be an older phase's: a claim is whatever was added, so any size is right.
    const int64_t chunk = chunk_.load(std::memory_order_relaxed);
    const uint64_t ticket = ticket_.fetch_add(static_cast<uint64_t>(chunk), std::memory_order_acq_rel);
    const int64_t total = static_cast<int64_t>(ticket >> 32), begin = static_cast<uint32_t>(ticket);
    if (begin >= total) break;
    const int64_t end = begin + chunk < total ? begin + chunk : total;
    body_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), begin, end, thread);
    num_done_.fetch_add(end - begin, std::memory_order_acq_rel);
    worked = true;
  }
  return worked;
}

void ThreadPool::run_phase(int64_t num_units, int64_t chunk, Body body, void* context) {
  body_.store(body, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  chunk_.store(chunk, std::memory_order_relaxed);
  num_done_.store(0, std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(num_units) << 32, std::memory_order_seq_cst);
  wake();
  claim_and_run(0);
  while (!spin_until([&] { return num_done_.load(std::memory_order_acquire) == num_units; }, 1000)) {
    // Another thread holds a long range, or is off its core: leave it ours.
    sched_yield();
  }
}

void ThreadPool::worker_loop(int thread) {
  while (!stopping_.load(std::memory_order_relaxed)) {
    if (claim_and_run(thread)) continue;
    if (spin_until([&] { return has_work() || stopping_.load(std::memory_order_relaxed); }, kSpinMicroseconds)) continue;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    const uint64_t seen = num_wakes_;
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    // Between the spin's last look and the line above, a phase may have been published by a caller who saw no sleeper.
    if (!has_work()) {
      sleep_condition_.wait(lock, [&] { return num_wakes_ != seen || stopping_.load(std::memory_order_relaxed); });
    }
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace awq_cpu
