// Threads that run one step together, phase by phase. They wait awake for microseconds only: on a core that others use too,
// a thread that spins keeps the one it waits for from running. Where waiting takes most of the time all the same, since another
// process has a core, one thread fewer works for a while: all would go at the pace of the one that is not running.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
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
    explicit Pool(int threads) : most_(threads), threads_(threads) {
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
    // Threads that work now, which only changes between runs, and those that there are.
    int threads() const { return threads_; }
    int most() const { return most_; }

    // Runs `task(thread)` on every thread that works now, the caller's included, and returns when all have ended.
    void run(const std::function<void(int)>& task) {
        {
            std::lock_guard<std::mutex> lock(mutex_);  // a worker that wakes late sees one round's task and threads, not two's
            choose_threads();
            task_ = &task;
            if (threads_ > 1) round_.fetch_add(1, std::memory_order_release);
        }
        const auto began = Clock::now();
        waited_ = 0;
        if (threads_ > 1) wake_.notify_all();
        task(0);
        barrier();
        took_ = Clock::now() - began;
    }

    // All threads of a task have come this far, and see what the others wrote.
    void barrier() {
        const int all = threads_;  // read before arriving: afterwards the run may end, and another number work in the next
        if (all == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == all) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int tries = 0; phase_.load(std::memory_order_acquire) == phase; tries++) {
            if (tries < SPINS) {
                relax();
                continue;
            }
            const auto start = Clock::now();  // long past what phases of a step differ by
            while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
            waited_ += (Clock::now() - start).count();
            return;
        }
    }

   private:
    using Clock = std::chrono::steady_clock;
    // Runs in a row that mostly waited before a thread is left out, and how long it stays out at first and at most.
    static constexpr int PATIENCE = 3;
    static constexpr auto OUT = std::chrono::milliseconds(300), LONGEST_OUT = std::chrono::milliseconds(5000);

    void choose_threads() {
        if (threads_ < most_) {
            if (Clock::now() < back_) return;
            threads_ = most_;
            slow_ = PATIENCE - 1;  // a single slow run sends it out again
            return;
        }
        slow_ = waited_ * 3 > took_.count() * (most_ - 1) ? slow_ + 1 : 0;
        if (slow_ == 0) out_ = OUT;
        if (slow_ < PATIENCE || most_ == 1) return;
        threads_ = most_ - 1;
        back_ = Clock::now() + out_;
        out_ = std::min<std::chrono::milliseconds>(2 * out_, LONGEST_OUT);
        slow_ = 0;
    }

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
            const int patience = index < threads_ ? WAITING : 0;  // one that is left out leaves its core
            for (int tries = 0; tries < patience && round_.load(std::memory_order_acquire) == seen; tries++) relax();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return closing_ || round_.load(std::memory_order_relaxed) != seen; });
                if (closing_) return;
                seen = round_.load(std::memory_order_relaxed);
                if (index >= threads_) continue;  // left out of this run
            }
            (*task_)(index);
            barrier();
        }
    }

    const int most_;
    std::atomic<int> threads_;
    int slow_ = 0;
    std::atomic<Clock::rep> waited_{0};  // of the run before: what threads waited for one another past spinning
    Clock::duration took_{};
    Clock::time_point back_{};
    std::chrono::milliseconds out_ = OUT;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* task_ = nullptr;
    std::atomic<uint32_t> round_{0}, phase_{0};
    std::atomic<int> arrived_{0};
    bool closing_ = false;
};
