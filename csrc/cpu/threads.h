// Work shared among threads, on the OpenMP runtime that torch has already loaded.
#pragma once

#include <atomic>
#include <cstdint>

namespace gradnorm::cpu {

// Calls body(data) once on each thread of a team of at most `threads`, the caller among them, and waits for all.
void on_team(int threads, void (*body)(void*), void* data);

// work(item) for every item below `items`, each once, on at most `threads` threads. A thread takes the next item when
// it is done with one: an item's result must not depend on who does it.
template <typename Work>
void share(int threads, int64_t items, Work& work) {
  struct Shared {
    Work& work;
    int64_t items;
    std::atomic<int64_t> next{0};
  } shared{work, items};
  const auto body = [](void* data) {
    Shared& all = *static_cast<Shared*>(data);
    for (int64_t item; (item = all.next.fetch_add(1, std::memory_order_relaxed)) < all.items;) all.work(item);
  };
  on_team(items < threads ? static_cast<int>(items) : threads, body, &shared);
}

}  // namespace gradnorm::cpu
