#include "thread_pool.h"

#include "platform.h"

namespace hybrid {

namespace {
// A wait first spins, since the next phase is usually a microsecond away. Then it yields, so that
// an oversubscribed machine can run the thread that it waits for. A worker that still finds nothing
// parks.
constexpr int kSpins = 2000;
constexpr int kYields = 200;
constexpr int kAwakeYields = 20000;  // some milliseconds
}  // namespace

ThreadPool::ThreadPool(int32_t n_threads)
    : shares_(static_cast<size_t>(n_threads)),
      done_(static_cast<size_t>(n_threads)),
      process_id_(platform::ProcessId()) {
  try {
    for (int32_t thread = 1; thread < n_threads; ++thread)
      workers_.emplace_back(&ThreadPool::Work, this, thread);
  } catch (...) {
    Stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { Stop(); }

void ThreadPool::Stop() {
  {
    std::lock_guard<std::mutex> lock(park_mutex_);
    stop_.store(true);
  }
  park_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(const Job& job) {
  std::lock_guard<std::mutex> run_lock(run_mutex_);
  job_ = &job;
  finished_.store(false);
  OpenPhase(0);
  // The load is sequentially consistent, as accesses to finished_ are: either the worker sees the
  // job, or this thread sees that the worker has parked.
  if (n_parked_.load() > 0) {
    std::lock_guard<std::mutex> lock(park_mutex_);
    park_.notify_all();
  }
  for (int idle = 0; !finished_.load(std::memory_order_acquire); ++idle) {
    if (RunOnePiece(0)) {
      idle = 0;
    } else if (idle < kSpins) {
      WaitAMoment(0);
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::Work(int32_t thread) {
  for (int idle = 0; !stop_.load(std::memory_order_relaxed); ++idle) {
    if (RunOnePiece(thread)) {
      idle = 0;
    } else if (idle < kSpins) {
      WaitAMoment(thread);
    } else if (idle <
               kSpins + (n_awake_.load(std::memory_order_relaxed) > 0 ? kAwakeYields : kYields)) {
      std::this_thread::yield();
    } else {
      std::unique_lock<std::mutex> lock(park_mutex_);
      n_parked_.fetch_add(1);
      park_.wait(lock, [this] { return stop_.load() || !finished_.load(); });
      n_parked_.fetch_sub(1);
      idle = 0;
    }
  }
}

int32_t ThreadPool::Share::Take(bool from_end) {
  uint64_t now = range.load(std::memory_order_acquire);
  for (;;) {
    const uint32_t first = static_cast<uint32_t>(now), end = static_cast<uint32_t>(now >> 32);
    if (first >= end) return -1;
    const uint64_t rest = from_end ? first | uint64_t{end - 1} << 32 : now + 1;
    if (range.compare_exchange_weak(now, rest, std::memory_order_acq_rel,
                                    std::memory_order_acquire))
      return static_cast<int32_t>(from_end ? end - 1 : first);
  }
}

bool ThreadPool::RunOnePiece(int32_t thread) {
  // Neighbouring pieces read neighbouring memory, so a thread first continues where its prefetchers
  // are. When its own share is done, it helps others from the far end of theirs. The count is not
  // n_threads(): workers already run while others are being started.
  const int32_t n = static_cast<int32_t>(shares_.size());
  int32_t piece = -1, share = thread;
  for (int32_t i = 0; i < n && piece < 0; ++i) {
    share = (thread + i) % n;
    piece = shares_[static_cast<size_t>(share)].Take(i > 0);
  }
  Done& done = done_[static_cast<size_t>(thread)];
  if (piece < 0) {
    if (done.n == 0) return false;
    const int32_t published = done.n;
    done.n = 0;
    if (n_done_.fetch_add(published, std::memory_order_acq_rel) + published == done.n_pieces)
      OpenPhase(done.phase + 1);
    return true;
  }
  const Share& from = shares_[static_cast<size_t>(share)];
  if (done.n++ == 0) {
    done.phase = from.phase;
    done.n_pieces = from.n_pieces;
    done.ahead = job_->ahead(job_->context, done.phase, thread, n);
  }
  if (from.is_dealt) piece = share + piece * n;
  job_->run_piece(job_->context, done.phase, piece, thread);
  return true;
}

// Prefetches a few lines, not all at once. The next phase may open at any moment, and what is
// prefetched faster than memory delivers is dropped.
void ThreadPool::WaitAMoment(int32_t thread) {
  constexpr int kLines = 4, kLine = 64;
  Ahead& ahead = done_[static_cast<size_t>(thread)].ahead;
  if (ahead.begin >= ahead.end) return platform::Pause();
  for (int i = 0; i < kLines; ++i) platform::Prefetch(ahead.begin + i * kLine);
  ahead.begin += kLines * kLine;
}

// Called only by the thread that completed the phase before, or by Run.
void ThreadPool::OpenPhase(int32_t phase) {
  int32_t n_pieces = 0;
  while (phase < job_->n_phases && (n_pieces = job_->n_pieces(job_->context, phase)) == 0) ++phase;
  if (phase >= job_->n_phases) {
    finished_.store(true, std::memory_order_release);
    return;
  }
  const bool is_dealt = job_->is_dealt(job_->context, phase);
  n_done_.store(0, std::memory_order_relaxed);
  const int64_t n = static_cast<int64_t>(shares_.size());
  for (int64_t thread = 0; thread < n; ++thread) {
    const int64_t first = is_dealt ? 0 : n_pieces * thread / n,
                  end = is_dealt ? (n_pieces - thread + n - 1) / n : n_pieces * (thread + 1) / n;
    Share& share = shares_[static_cast<size_t>(thread)];
    share.phase = phase;
    share.n_pieces = n_pieces;
    share.is_dealt = is_dealt;
    share.range.store(static_cast<uint64_t>(first) | static_cast<uint64_t>(end) << 32,
                      std::memory_order_release);
  }
}

}  // namespace hybrid
