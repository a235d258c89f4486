#include "threads.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>

namespace minirksc {
namespace {

constexpr int64_t MAX_UNITS = (1 << 16) - 1;
constexpr int SPINS = 2000;  // about 50 us

// Asks again and again; gives its core up now and then when it takes long.
template <typename IsOver>
void wait_until(IsOver is_over) {
    for (int spins = 0; !is_over(); ++spins) {
        __builtin_ia32_pause();
        if (spins > SPINS) sched_yield();
    }
}

// A call, as the team sees it: how many units it has, how many of them are taken, how many are taken at a time, and a
// number that changes from call to call. Who took units of it by replacing the whole word knows that the call lasts
// until they are done.
struct Call {
    uint64_t word = 0;

    Call() = default;
    explicit Call(uint64_t word) : word(word) {}
    Call(uint64_t number, uint64_t at_a_time, uint64_t units) : word(number << 48 | at_a_time << 32 | units << 16) {}
    uint64_t taken() const { return word & 0xffff; }
    uint64_t units() const { return word >> 16 & 0xffff; }
    uint64_t at_a_time() const { return word >> 32 & 0xffff; }
    uint64_t number() const { return word >> 48; }
    uint64_t left() const { return units() - taken(); }
};

class Team {
  public:
    explicit Team(int64_t size) : size(size) {}

    void share_out(int64_t count, int parts, void (*run_)(void*, int64_t, int64_t), void* context_) {
        run = run_, context = context_, num_items = count;
        unit = (count + MAX_UNITS - 1) / MAX_UNITS;
        uint64_t units = (count + unit - 1) / unit, num_ranges = parts * size;
        done.store(0, std::memory_order_relaxed);
        Call next(Call(call.load(std::memory_order_relaxed)).number() + 1, (units + num_ranges - 1) / num_ranges, units);
        call.store(next.word, std::memory_order_release);
        take_ranges(next);
        wait_until([&] { return done.load(std::memory_order_acquire) == units; });
    }

    // What others than the caller do, until it is over.
    void help() {
        while (!is_over.load(std::memory_order_acquire)) {
            Call now;
            wait_until([&] {
                now = Call(call.load(std::memory_order_acquire));
                return now.left() || is_over.load(std::memory_order_acquire);
            });
            take_ranges(now);
        }
    }

    void end() { is_over.store(true, std::memory_order_release); }

  private:
    void take_ranges(Call now) {
        uint64_t number = now.number(), num_done = 0;
        while (now.left() && now.number() == number) {
            uint64_t units = std::min(now.left(), now.at_a_time());
            if (!call.compare_exchange_weak(now.word, now.word + units, std::memory_order_acq_rel)) continue;
            int64_t begin = now.taken() * unit;
            run(context, begin, std::min(num_items, begin + (int64_t)units * unit));
            num_done += units;
            now.word += units;
        }
        if (num_done) done.fetch_add(num_done, std::memory_order_acq_rel);
    }

    // Lines of memory apart, since the others keep asking for the first.
    alignas(64) std::atomic<uint64_t> call{0};
    std::atomic<bool> is_over{false};
    // Of the call; written before it is published, read by a thread that took units of it.
    alignas(64) void (*run)(void*, int64_t, int64_t) = nullptr;
    void* context = nullptr;
    int64_t num_items = 0, unit = 1, size;
    alignas(64) std::atomic<uint64_t> done{0};  // units
};

thread_local Team* team = nullptr;  // that this thread leads

}  // namespace

int64_t num_threads() { return omp_get_max_threads(); }

void with_team(void (*run)(void*), void* context) {
    if (team != nullptr || num_threads() == 1) return run(context);
    Team own(num_threads());
#pragma omp parallel
    {
        if (omp_get_thread_num() == 0) {
            team = &own;
            run(context);
            team = nullptr;
            own.end();
        } else {
            own.help();
        }
    }
}

void share_out(int64_t count, int parts, void (*run)(void*, int64_t, int64_t), void* context) {
    if (num_threads() == 1) return run(context, 0, count);
    with_team([&] { team->share_out(count, parts, run, context); });
}

}  // namespace minirksc
