#include "pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace gemma4_moe {
namespace {

struct Job {
  const std::function<void()>* body;
  int places;  // how many more threads may join
  int running = 0;
};

class Pool {
 public:
  explicit Pool(pid_t owner) : owner(owner) {}

  const pid_t owner;

  void run(int threads, const std::function<void()>& body) {
    Job job{&body, threads - 1};
    {
      std::lock_guard lock(mutex_);
      grow(threads - 1);
      jobs_.push_back(&job);
    }
    work_.notify_all();
    body();
    std::unique_lock lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    done_.wait(lock, [&] { return job.running == 0; });
  }

 private:
  // The caller works too, so that a system out of threads only makes the work slower.
  void grow(int wanted) {
    try {
      for (; size_ < wanted; ++size_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return !jobs_.empty(); });
      Job* job = jobs_.front();
      ++job->running;
      if (--job->places == 0) jobs_.pop_front();
      lock.unlock();
      (*job->body)();
      lock.lock();
      // A job that has no work left for this thread has none for any other.
      jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
      if (--job->running == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<Job*> jobs_;
  int size_ = 0;
};

// Never freed: its threads live as long as the process. In a forked child they don't exist, and the parent's mutex may
// be held by one of them, so the child leaves that pool alone and makes another.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load();
  while (found == nullptr || found->owner != getpid()) {
    Pool* fresh = new Pool(getpid());
    if (current.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void run_on_threads(int threads, const std::function<void()>& body) {
  if (threads > 1) {
    pool().run(threads, body);
  } else {
    body();
  }
}

}  // namespace gemma4_moe
