// A pool of threads that run one job at a time, phase by phase.
//
// A job is a list of phases, a phase a number of pieces. All pieces of a phase are done before the
// next phase begins. Which thread computes a piece is left to chance, what a piece computes is not:
// so results do not depend on the number of threads, and a core that is busy elsewhere costs one
// piece, not a barrier.
//
// Protocol. Every thread has a share of a phase's pieces, a range in one word. A thread claims a
// piece from its own share's beginning, or, where that is empty, from another's end, with
// compare-and-swap. Shares are neighbouring pieces, or dealt out in turn where pieces become
// lighter: then all threads come to the lightest last, and none waits long. Only a thread that
// holds a piece, or has not published one, touches the job: neither phase nor job can end before.
// A thread counts its pieces by itself and publishes the count once it finds no more: a counter
// that all threads write for every piece would travel between their caches each time. The thread
// whose count completes a phase opens the next phase. No thread waits for another to arrive.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace hybrid {

// Memory that a thread will read before long.
struct Ahead {
  const uint8_t* begin = nullptr;
  const uint8_t* end = nullptr;
};

struct Job {
  void* context;
  int32_t n_phases;
  int32_t (*n_pieces)(void* context, int32_t phase);  // 0: the phase is skipped
  bool (*is_dealt)(void* context, int32_t phase);
  // What a thread will read first after `phase`: it prefetches that while it waits for the others.
  Ahead (*ahead)(void* context, int32_t phase, int32_t thread, int32_t n_threads);
  void (*run_piece)(void* context, int32_t phase, int32_t piece, int32_t thread);  // must not throw
};

class ThreadPool {
 public:
  // Must be destroyed, and run, in the process that made it: a forked child has no workers.
  // `n_threads` counts the calling thread: 1 starts none. Throws std::system_error if a thread
  // cannot start.
  explicit ThreadPool(int32_t n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int process_id() const { return process_id_; }
  int32_t n_threads() const { return static_cast<int32_t>(workers_.size()) + 1; }

  // Between the two calls workers do not park: jobs follow one another, with short waits for
  // another device. Workers that find nothing for some milliseconds park all the same.
  void StayAwake() { n_awake_.fetch_add(1); }
  void MayPark() { n_awake_.fetch_sub(1); }

  // Runs the job to its end; the calling thread works too, as thread 0. Calls from several threads
  // queue up.
  void Run(const Job& job);

 private:
  void Work(int32_t thread);
  // Runs a piece, or publishes those that were run. Returns false where there is neither.
  bool RunOnePiece(int32_t thread);
  void WaitAMoment(int32_t thread);
  void OpenPhase(int32_t phase);
  void Stop();

  // A thread's share of a phase: pieces [first, end), packed so that one exchange takes one; where
  // pieces are dealt, index i of thread t's share is piece t + i * n_threads. A claim that succeeds
  // is one of the phase that is open, since the phase cannot end without that piece.
  // With the phase beside them, which is written before the range and read after a claim: a thread
  // then begins a phase with one cache line from the thread that opened it.
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};  // first | end << 32
    int32_t phase = 0;
    int32_t n_pieces = 0;  // of the phase
    bool is_dealt = false;
    // Takes the first piece, or for another thread the last. Returns -1 where there is none.
    int32_t Take(bool from_end);
  };

  std::mutex run_mutex_;  // one job at a time
  // Pieces of the open phase that a thread has done and not published; its own.
  struct alignas(64) Done {
    int32_t n = 0;
    int32_t phase = 0, n_pieces = 0;  // of the phase
    Ahead ahead;
  };

  std::vector<Share> shares_;
  std::vector<Done> done_;
  alignas(64) std::atomic<int32_t> n_done_{0};
  alignas(64) std::atomic<bool> finished_{true};
  const Job* job_ = nullptr;  // written before the first phase is opened

  std::mutex park_mutex_;
  std::condition_variable park_;
  std::atomic<int32_t> n_parked_{0};
  std::atomic<int32_t> n_awake_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
  const int process_id_;  // workers exist in the process that started them, not in forked children
};

// Keeps a pool's workers awake while it lives.
class AwakePool {
 public:
  explicit AwakePool(ThreadPool& pool) : pool_(pool) { pool.StayAwake(); }
  ~AwakePool() { pool_.MayPark(); }
  AwakePool(const AwakePool&) = delete;
  AwakePool& operator=(const AwakePool&) = delete;

 private:
  ThreadPool& pool_;
};

}  // namespace hybrid
