// Threads that run one step together, phase by phase. They wait awake for microseconds only: on a core that others use too,
// a thread that spins keeps the one it waits for from running.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Pool {
   public:
    explicit Pool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    int threads() const { return threads_; }

    // Runs `task(thread)` on every thread, the caller's included, and returns when all have ended.
    void run(const std::function<void(int)>& task) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        task(0);
        barrier();
    }

    // All threads of a task have come this far, and see what the others wrote.
    void barrier() {
        if (threads_ == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int tries = 0; phase_.load(std::memory_order_acquire) == phase; tries++)
            tries < SPINS ? relax() : std::this_thread::yield();
    }

   private:
    static constexpr int SPINS = 4000;    // in a step: some tens of microseconds
    static constexpr int WAITING = 12000;  // between steps, for the next one

    static void relax() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void work(int index) {
        uint32_t seen = 0;
        for (;;) {
            for (int tries = 0; tries < WAITING && round_.load(std::memory_order_acquire) == seen; tries++) relax();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return closing_ || round_.load(std::memory_order_relaxed) != seen; });
                if (closing_) return;
                seen = round_.load(std::memory_order_relaxed);
            }
            (*task_)(index);
            barrier();
        }
    }

    int threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* task_ = nullptr;
    std::atomic<uint32_t> round_{0}, phase_{0};
    std::atomic<int> arrived_{0};
    bool closing_ = false;
};
