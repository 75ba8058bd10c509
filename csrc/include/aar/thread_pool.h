// The caller's threads, whoever they are: PyTorch's, or none.
#pragma once
#include <cstdint>

namespace aar {

// Runs fn(begin, end, context) over disjoint ranges that cover [0, n); ranges may run at the same time.
struct ThreadPool {
  int threads = 1;
  void (*run)(int64_t n, void (*fn)(int64_t, int64_t, void*), void* context) = nullptr;
};

template <class F>
inline void parallel(const ThreadPool& pool, int64_t n, const F& f) {
  if (pool.threads <= 1 || pool.run == nullptr || n <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  pool.run(n, [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); },
           const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace aar
