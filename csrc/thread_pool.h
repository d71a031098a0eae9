// A pool of threads that run one job at a time, phase by phase.
//
// A job is a list of phases, and a phase is a number of pieces. All pieces of a phase are done
// before the next phase begins. Chance decides which thread computes a piece, but not what the
// piece computes. Results therefore do not depend on the number of threads. A core that is busy
// elsewhere delays a phase by one piece, not by a whole thread's share.
//
// Protocol. Each thread has a share of a phase's pieces: a range, packed into one word. A thread
// claims a piece by compare-and-swap. It takes the first piece of its own share or, if that is
// empty, the last piece of another thread's share. Shares are neighbouring pieces. If pieces become
// lighter towards the end, they are dealt out like cards instead: all threads then reach the
// lightest pieces last, and none waits long.
//
// A thread touches the job only while it holds a piece or has finished pieces that it has not yet
// published. Neither the phase nor the job can end before it publishes them. Each thread counts its
// finished pieces itself and publishes the count once it finds no more pieces. A counter that all
// threads write for every piece would travel between their caches each time. The thread whose count
// completes a phase opens the next phase. No thread waits for another to arrive.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace hybrid {

// Memory that a thread will read soon.
struct Ahead {
  const uint8_t* begin = nullptr;
  const uint8_t* end = nullptr;
};

struct Job {
  void* context;
  int32_t n_phases;
  int32_t (*n_pieces)(void* context, int32_t phase);  // 0: the phase is skipped
  bool (*is_dealt)(void* context, int32_t phase);
  // What a thread will read first after `phase`. It prefetches this while it waits for the others.
  Ahead (*ahead)(void* context, int32_t phase, int32_t thread, int32_t n_threads);
  void (*run_piece)(void* context, int32_t phase, int32_t piece, int32_t thread);  // must not throw
};

class ThreadPool {
 public:
  // The pool must run and be destroyed in the process that made it: a forked child has no workers.
  // `n_threads` counts the calling thread; 1 starts no worker. Throws std::system_error if a thread
  // cannot start.
  explicit ThreadPool(int32_t n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int process_id() const { return process_id_; }
  int32_t n_threads() const { return static_cast<int32_t>(workers_.size()) + 1; }

  // Between the two calls workers do not park, since jobs follow one another with short waits for
  // another device. A worker that finds nothing for some milliseconds parks nevertheless.
  void StayAwake() { n_awake_.fetch_add(1); }
  void MayPark() { n_awake_.fetch_sub(1); }

  // Runs the job to its end. The calling thread works too, as thread 0. Calls from several threads
  // run one after the other.
  void Run(const Job& job);

 private:
  void Work(int32_t thread);
  // Runs a piece, or publishes the pieces that were run. Returns false if there is neither.
  bool RunOnePiece(int32_t thread);
  void WaitAMoment(int32_t thread);
  void OpenPhase(int32_t phase);
  void Stop();

  // A thread's share of a phase: pieces [first, end), packed so that one exchange claims one piece.
  // If pieces are dealt, index i of thread t's share is piece t + i * n_threads. A successful claim
  // always belongs to the open phase, since that phase cannot end without the claimed piece.
  //
  // The phase is stored beside the range, is written before the range and is read after a claim. A
  // thread therefore begins a phase with one cache line from the thread that opened it.
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};  // first | end << 32
    int32_t phase = 0;
    int32_t n_pieces = 0;  // of the phase
    bool is_dealt = false;
    // Claims the first piece, or the last one if the claim is for another thread. Returns -1 if the
    // share is empty.
    int32_t Take(bool from_end);
  };

  std::mutex run_mutex_;  // one job at a time
  // What a thread keeps for itself: the pieces of the open phase that it has done but not
  // published.
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
  const int process_id_;  // workers exist only in the process that started them
};

// Keeps a pool's workers awake for the lifetime of this object.
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
