// Work that threads share.
//
// A call's items are handed out in ranges: to the caller, and to every other thread of its team that comes for some. So
// no thread waits for one that has not begun: where another process has its core, the others do its share. A team is
// one OpenMP region, whose end waits for all of them; a recorded step has hundreds of calls and one team. OpenMP's
// threads and none of our own, since those that torch woke would spin in the way of ours.
#pragma once

#include <cstdint>

namespace minirksc {

// How many threads share work: as many as torch was told.
int64_t num_threads();

// run(context), and all that it shares out, by one team.
void with_team(void (*run)(void* context), void* context);

template <typename Body>
void with_team(Body body) {
    with_team([](void* context) { (*(Body*)context)(); }, &body);
}

// run(context, begin, end) of ranges that together are [0, count). Each is one of `parts` (to 15) equal parts of a
// thread's share: 1 where items are alike, more where they are not, and the longest come first.
void share_out(int64_t count, int parts, void (*run)(void* context, int64_t begin, int64_t end), void* context);

// body(begin, end), as above.
template <typename Body>
void for_ranges(int64_t count, int parts, Body body) {
    if (count < 2)
        body((int64_t)0, count);
    else
        share_out(count, parts, [](void* context, int64_t begin, int64_t end) { (*(Body*)context)(begin, end); }, &body);
}

// body(item) of items that are alike, of so many numbers each; by the caller alone where these are few.
template <typename Body>
void for_all(int64_t count, int64_t num_numbers, Body body) {
    constexpr int64_t MIN_NUMBERS = 2048;  // of all items: a microsecond, which another thread takes to come
    auto range = [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) body(item);
    };
    if (count * num_numbers > MIN_NUMBERS)
        for_ranges(count, 1, range);
    else
        range(0, count);
}

}  // namespace minirksc
