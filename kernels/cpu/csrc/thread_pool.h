// A persistent pool of threads that share work by claiming ranges of units from one atomic word.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace awq_cpu {

// `parallel_for` returns when every unit is done; the calling thread works too and is thread 0. Work is claimed, never
// assigned: a thread that the operating system took off its core holds up nothing but the range it has claimed. Between two
// calls the workers spin for a bounded time (kSpinMicroseconds, yielding in the second half of it), then sleep; an idle
// pool uses no CPU. Which thread computes a unit is not fixed, so a unit's result must not depend on it.
class ThreadPool {
 public:
  static constexpr int kSpinMicroseconds = 60;

  explicit ThreadPool(int num_threads);  // the caller included: starts num_threads - 1 workers
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Wakes sleeping workers ahead of the first parallel_for, so that waking overlaps with what the caller does meanwhile.
  void wake();

  // Throws std::runtime_error in a process forked from the one that made the pool: threads do not survive fork.
  void check_process() const;

  // One caller at a time may use the pool: hold this for a whole program.
  std::mutex& mutex() { return caller_mutex_; }

  // Calls function(begin, end, thread) over ranges that cover 0..num_units-1 once, at most `chunk` units each.
  // function must not throw. num_units < 2^31.
  template <class Function>
  void parallel_for(int64_t num_units, int64_t chunk, Function&& function) {
    if (num_units <= 0) return;
    if (num_threads_ == 1 || num_units <= chunk) {
      function(int64_t{0}, num_units, 0);
      return;
    }
    using Plain = std::remove_reference_t<Function>;
    run_phase(num_units, chunk, [](void* context, int64_t begin, int64_t end, int thread) {
      (*static_cast<Plain*>(context))(begin, end, thread);
    }, const_cast<void*>(static_cast<const void*>(&function)));
  }

  // A chunk that gives each thread several claims, as dynamic sharing needs, without claims so small that they cost; of those in
  // question the one that leaves the busiest thread the least, threads being equally fast.
  int64_t even_chunk(int64_t num_units, int64_t claims_per_thread = 4) const {
    const int64_t claims = claims_per_thread * num_threads_, largest = num_units > claims ? (num_units + claims - 1) / claims : 1;
    int64_t best = largest, best_load = INT64_MAX;
    for (int64_t chunk = largest; 2 * chunk > largest; --chunk) {
      const int64_t num_chunks = (num_units + chunk - 1) / chunk, load = (num_chunks + num_threads_ - 1) / num_threads_ * chunk;
      if (load < best_load) best = chunk, best_load = load;
    }
    return best;
  }

 private:
  using Body = void (*)(void* context, int64_t begin, int64_t end, int thread);

  void run_phase(int64_t num_units, int64_t chunk, Body body, void* context);
  bool claim_and_run(int thread);
  void worker_loop(int thread);
  bool has_work() const;

  int num_threads_;
  long process_id_;
  // High half: units of the phase; low half: the next unit to claim. One word, so that a claim and the size it is checked
  // against always belong to the same phase. A phase cannot end while a claimed unit is not done, so its body and context
  // stay valid for whoever holds a claim.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) std::atomic<int64_t> chunk_{1};
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  uint64_t num_wakes_ = 0;  // guarded by sleep_mutex_
  std::mutex sleep_mutex_;
  std::condition_variable sleep_condition_;
  std::mutex caller_mutex_;
  std::vector<std::thread> workers_;
};

}  // namespace awq_cpu
