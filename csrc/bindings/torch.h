// How bindings unwrap tensors. They call kernels, nothing else: shapes and dtypes are checked by the callers in
// aar_kernels, which are the only ones; what would make a kernel read outside a buffer is checked here again.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "aar/thread_pool.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

inline aar::ThreadPool pool() {
  return {int(torch::stable::get_num_threads()), [](int64_t n, void (*fn)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { fn(begin, end, context); });
          }};
}

template <class T>
T* data(const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype,
                  "aar_native: expected a contiguous CPU tensor of another dtype or device");
  return static_cast<T*>(tensor.data_ptr());
}
inline float* floats(const Tensor& tensor) { return data<float>(tensor, ScalarType::Float); }
inline int64_t* longs(const Tensor& tensor) { return data<int64_t>(tensor, ScalarType::Long); }
inline const float* floats(const MaybeTensor& tensor) { return tensor ? floats(*tensor) : nullptr; }

inline Tensor make(const Tensor& like, Ints sizes, ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(like, sizes, dtype);
}
inline Tensor make_zeros(const Tensor& like, Ints sizes) { return torch::stable::new_zeros(like, sizes); }

}  // namespace
