// The passes of attention. A thread takes one head of one item at a time: packs its keys and values into panels, then
// takes blocks of rows through them. A block's logits, at most kBlockRows by all keys, stay in the second-level cache,
// so that softmax is two plain passes and nothing has to be rescaled.
#pragma once
#include <type_traits>

#include "attention_tiles.h"

namespace aar {
namespace AAR_ISA {

constexpr int64_t kBlockRows = 48;  // of which kTileRows is a divisor
constexpr int64_t kFewRows = 3;     // for which packing the keys would cost more than the product
constexpr float kLargestLogScale = 4.605170186f;  // ln 100

// For each token, the number of keys that it sees, and the first token that sees it.
struct Seen {
  Buffer<int64_t> begin, end;
  Seen(const AttentionShape& shape, const int64_t* lengths) : begin(shape.tokens), end(shape.tokens) {
    for (int64_t first = 0, s = 0; first < shape.tokens; first += lengths[s++])
      for (int64_t i = first; i < first + lengths[s]; i++) begin[i] = first, end[i] = first + lengths[s];
  }
};

inline bool cosine(const AttentionShape& shape) { return shape.head_log_scale != nullptr; }

inline float query_factor(const AttentionShape& shape, int64_t head) {
  if (!cosine(shape)) return shape.softmax_scale;
  return shape.softmax_scale * std::exp(std::min(shape.head_log_scale[head], kLargestLogScale));
}

inline int64_t padded_dim(const AttentionShape& shape) { return round_up(shape.dim, kTileColumns); }

// An odd number of cache lines, so that a column's elements do not all fall into a few sets of the cache.
inline int64_t strip_stride(int64_t keys) { return round_up(keys, 32) + 16; }

// Rows of one head against keys that were packed before.
template <class T>
class Forward {
 public:
  Forward(const AttentionShape& shape, int64_t keys)
      : shape_(shape), wide_(padded_dim(shape)), keys_(round_up(keys, kTileColumns)), stride_(strip_stride(keys)),
        queries_(kBlockRows * wide_), out_(kBlockRows * wide_), tile_(kTileColumns * wide_), k_(keys_ * wide_),
        v_(keys_ * wide_), strip_(kBlockRows * stride_) {}

  void pack(const Rows<T>& k, const Rows<T>& v, int64_t keys, bool normalise) {
    for (int64_t j = 0; j < keys; j += kTileColumns) {
      const int64_t count = std::min<int64_t>(kTileColumns, keys - j);
      for (int64_t i = 0; i < count; i++)
        load_scaled(k[j + i], shape_.dim, wide_, normalise, 1.0f, tile_ + i * wide_);
      pack_columns(tile_, wide_, k_ + j * wide_);
      for (int64_t i = 0; i < count; i++) load_row(v[j + i], shape_.dim, tile_ + i * wide_);
      pack_rows(tile_, count, wide_, keys_, j, v_);
    }
  }

  // At most kBlockRows; row i sees the first end[i] of the packed keys.
  void attend(const Rows<T>& q, int64_t rows, const int64_t* end, float factor, const Rows<T>& out, float* lse) {
    start(q, rows, factor);
    logits(rows, end, queries_, shape_.dim, wide_, k_, strip_, stride_);
    for (int64_t i = 0; i < rows; i++) sums_[i] = softmax(strip_ + i * stride_, end[i], lse + i);
    weighted_sums(rows, end, strip_, stride_, v_, keys_, wide_, out_);
    finish(out, rows);
  }

  // At most kFewRows, which see all of these keys: nothing is packed.
  void attend_few(const Rows<T>& q, int64_t rows, const Rows<T>& k, const Rows<T>& v, int64_t keys, float factor,
                  const Rows<T>& out) {
    start(q, rows, factor);
    for (int64_t j = 0; j < keys; j += kLanes) {
      const float* key[kLanes];
      for (int64_t i = 0; i < kLanes; i++) key[i] = as_floats(k, std::min(j + i, keys - 1), i);
      for (int64_t r = 0; r < rows; r++) {
        Floats sum[kLanes] = {};
        for (int64_t d = 0; d < wide_; d += kLanes) {
          const Floats x = load(queries_ + r * wide_ + d);
          for (int i = 0; i < kLanes; i++) sum[i] = fma(x, load(key[i] + d), sum[i]);
        }
        transpose(sum);
        for (int width = kLanes / 2; width > 0; width /= 2)
          for (int i = 0; i < width; i++) sum[i] += sum[i + width];
        store(strip_ + r * stride_ + j, sum[0]);
      }
    }
    float unused;
    for (int64_t i = 0; i < rows; i++) sums_[i] = softmax(strip_ + i * stride_, keys, &unused);
    const int64_t chunk = in_place() ? keys : kTileColumns;
    for (int64_t j = 0; j < keys; j += chunk) {
      const int64_t count = std::min(chunk, keys - j);
      const float* values = as_floats(v, j, 0);
      for (int64_t i = 1; i < count && !in_place(); i++) as_floats(v, j + i, i);
      for (int64_t d = 0; d < wide_; d += kTileColumns)
        gemm_edge<kFewRows>(int(rows), strip_ + j, stride_, 1, values + d, in_place() ? v.stride : wide_, count,
                            out_ + d, wide_);
    }
    finish(out, rows);
  }

 private:
  void start(const Rows<T>& q, int64_t rows, float factor) {
    for (int64_t i = 0; i < rows; i++)
      load_scaled(q[i], shape_.dim, wide_, cosine(shape_), factor, queries_ + i * wide_);
    std::memset(out_, 0, sizeof(float) * rows * wide_);
  }

  void finish(const Rows<T>& out, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
      float* row = out_ + i * wide_;
      const Floats inverse = splat(1.0f / sums_[i]);
      for (int64_t d = 0; d < wide_; d += kLanes) store(row + d, load(row + d) * inverse);
      store_row(row, shape_.dim, out[i]);
    }
  }

  bool in_place() const { return std::is_same_v<T, float> && shape_.dim == wide_; }

  // Row j as whole vectors of fp32, in the given place of tile_ if it is not that already.
  const float* as_floats(const Rows<T>& rows, int64_t j, int64_t place) {
    if constexpr (std::is_same_v<T, float>)
      if (in_place()) return rows[j];
    load_row(rows[j], shape_.dim, tile_ + place * wide_);
    return tile_ + place * wide_;
  }

  const AttentionShape& shape_;
  const int64_t wide_, keys_, stride_;
  Zeroed queries_, out_, tile_;
  Buffer<float> k_, v_, strip_;
  float sums_[kBlockRows];
};

// Shares of one head's rows, so that few heads keep many threads busy; each packs the keys anew.
inline int64_t shares_of(const AttentionShape& shape, const ThreadPool& pool) {
  const int64_t heads = shape.batch * shape.heads, blocks = (shape.tokens + kBlockRows - 1) / kBlockRows;
  return heads == 0 || heads >= pool.threads ? 1 : std::min(blocks, (2 * pool.threads + heads - 1) / heads);
}

template <class T>
inline void forward(const AttentionShape& shape, const int64_t* lengths, const Heads& q, const Heads& k,
                    const Heads& v, const Heads& out, float* lse, const ThreadPool& pool) {
  Seen seen(shape, lengths);
  const int64_t* end = seen.end;
  const int64_t shares = shares_of(shape, pool), blocks = (shape.tokens + kBlockRows - 1) / kBlockRows;
  parallel(pool, shape.batch * shape.heads * shares, [&](int64_t begin, int64_t last) {
    Forward<T> pass(shape, shape.tokens);
    for (int64_t task = begin; task < last; task++) {
      const int64_t share = task % shares, head = task / shares % shape.heads, item = task / shares / shape.heads;
      const Rows<T> queries = rows_of<T>(q, item, head), results = rows_of<T>(out, item, head);
      // Blocks in turn: later ones see more keys.
      const int64_t final_block = (blocks - 1 - share) / shares * shares + share;
      const int64_t keys = end[std::min((final_block + 1) * kBlockRows, shape.tokens) - 1];
      pass.pack(rows_of<T>(k, item, head), rows_of<T>(v, item, head), keys, cosine(shape));
      for (int64_t row = share * kBlockRows; row < shape.tokens; row += shares * kBlockRows) {
        const int64_t rows = std::min(kBlockRows, shape.tokens - row);
        pass.attend({queries[row], q.token}, rows, end + row, query_factor(shape, head), {results[row], out.token},
                    lse + (item * shape.heads + head) * shape.tokens + row);
      }
    }
  });
}

// Gradients of one head. Weights are computed again from lse; the gradients of its keys and values add up in fp32.
template <class T>
class Backward {
 public:
  explicit Backward(const AttentionShape& shape)
      : shape_(shape), wide_(padded_dim(shape)), keys_(round_up(shape.tokens, kTileColumns)),
        stride_(strip_stride(shape.tokens)), queries_(kBlockRows * wide_), grads_(kBlockRows * wide_),
        tile_(kTileColumns * wide_), unit_(wide_), k_columns_(keys_ * wide_), v_columns_(keys_ * wide_),
        k_rows_(keys_ * wide_), grad_k_(keys_ * wide_), grad_v_(keys_ * wide_), grad_q_(kBlockRows * wide_),
        query_panels_(kBlockRows * wide_), grad_panels_(kBlockRows * wide_), weights_(kBlockRows * stride_),
        grad_logits_(kBlockRows * stride_) {}

  void start(const Rows<T>& k, const Rows<T>& v) {
    for (int64_t j = 0; j < shape_.tokens; j += kTileColumns) {
      const int64_t count = std::min<int64_t>(kTileColumns, shape_.tokens - j);
      for (int64_t i = 0; i < count; i++)
        load_scaled(k[j + i], shape_.dim, wide_, cosine(shape_), 1.0f, tile_ + i * wide_);
      pack_columns(tile_, wide_, k_columns_ + j * wide_);
      pack_rows(tile_, count, wide_, keys_, j, k_rows_);
      for (int64_t i = 0; i < count; i++) load_row(v[j + i], shape_.dim, tile_ + i * wide_);
      pack_columns(tile_, wide_, v_columns_ + j * wide_);
    }
    std::memset(grad_k_, 0, sizeof(float) * keys_ * wide_);
    std::memset(grad_v_, 0, sizeof(float) * keys_ * wide_);
  }

  // Rows row..row + rows of the head; returns their part of the derivative by the logarithm of the factor.
  double attend(const Rows<T>& grad, const Rows<T>& q, int64_t row, int64_t rows, const Seen& seen, float factor,
                const float* lse, const Rows<T>& grad_q) {
    const int64_t *end = seen.end + row, keys = end[rows - 1];
    for (int64_t i = 0; i < rows; i++) {
      load_scaled(q[row + i], shape_.dim, wide_, cosine(shape_), factor, queries_ + i * wide_);
      load_row(grad[row + i], shape_.dim, grads_ + i * wide_);
    }
    pack_rows(queries_, rows, wide_, kBlockRows, 0, query_panels_);
    pack_rows(grads_, rows, wide_, kBlockRows, 0, grad_panels_);
    logits(rows, end, queries_, shape_.dim, wide_, k_columns_, weights_, stride_);
    logits(rows, end, grads_, shape_.dim, wide_, v_columns_, grad_logits_, stride_);
    for (int64_t i = 0; i < rows; i++)
      backward_softmax(weights_ + i * stride_, grad_logits_ + i * stride_, end[i], lse[row + i]);
    transposed_sums(rows, row, keys, seen.begin, weights_, stride_, grad_panels_, kBlockRows, wide_, grad_v_);
    transposed_sums(rows, row, keys, seen.begin, grad_logits_, stride_, query_panels_, kBlockRows, wide_,
                    grad_k_);
    std::memset(grad_q_, 0, sizeof(float) * rows * wide_);
    weighted_sums(rows, end, grad_logits_, stride_, k_rows_, keys_, wide_, grad_q_);
    double by_factor = 0.0;
    for (int64_t i = 0; i < rows; i++)
      by_factor += backward_scaled(q[row + i], shape_.dim, wide_, cosine(shape_), factor, grad_q_ + i * wide_, unit_,
                                   grad_q[row + i]);
    return by_factor;
  }

  void finish(const Rows<T>& k, const Rows<T>& grad_k, const Rows<T>& grad_v) {
    for (int64_t j = 0; j < shape_.tokens; j++) {
      backward_scaled(k[j], shape_.dim, wide_, cosine(shape_), 1.0f, grad_k_ + j * wide_, unit_, grad_k[j]);
      store_row(grad_v_ + j * wide_, shape_.dim, grad_v[j]);
    }
  }

 private:
  const AttentionShape& shape_;
  const int64_t wide_, keys_, stride_;
  Zeroed queries_, grads_, tile_, unit_;
  Buffer<float> k_columns_, v_columns_, k_rows_, grad_k_, grad_v_, grad_q_, query_panels_, grad_panels_, weights_,
      grad_logits_;
};

template <class T>
inline void backward(const AttentionShape& shape, const int64_t* lengths, const Heads& grad, const Heads& q,
                     const Heads& k, const Heads& v, const float* lse, const Heads& grad_q, const Heads& grad_k,
                     const Heads& grad_v, float* grad_scale, const ThreadPool& pool) {
  Seen seen(shape, lengths);
  const int64_t heads = shape.batch * shape.heads;
  Buffer<double> by_factor(heads);
  parallel(pool, heads, [&](int64_t begin, int64_t last) {
    Backward<T> pass(shape);
    for (int64_t task = begin; task < last; task++) {
      const int64_t item = task / shape.heads, head = task % shape.heads;
      const Rows<T> keys = rows_of<T>(k, item, head);
      pass.start(keys, rows_of<T>(v, item, head));
      by_factor[task] = 0.0;
      for (int64_t row = 0; row < shape.tokens; row += kBlockRows)
        by_factor[task] += pass.attend(rows_of<T>(grad, item, head), rows_of<T>(q, item, head), row,
                                       std::min(kBlockRows, shape.tokens - row), seen, query_factor(shape, head),
                                       lse + task * shape.tokens, rows_of<T>(grad_q, item, head));
      pass.finish(keys, rows_of<T>(grad_k, item, head), rows_of<T>(grad_v, item, head));
    }
  });
  if (!cosine(shape)) return;
  for (int64_t head = 0; head < shape.heads; head++) {
    double sum = 0.0;
    for (int64_t item = 0; item < shape.batch; item++) sum += by_factor[item * shape.heads + head];
    // At the limit the gradient still passes, as through torch.clamp.
    grad_scale[head] = shape.head_log_scale[head] <= kLargestLogScale ? float(sum) : 0.0f;
  }
}

// Writes one head's new keys and values into the caches.
template <class T>
inline void add_to_cache(const AttentionShape& shape, int64_t start, const Rows<T>& k, const Rows<T>& v,
                         const Rows<T>& cache_k, const Rows<T>& cache_v, float* unit) {
  for (int64_t i = 0; i < shape.tokens; i++) {
    load_scaled(k[i], shape.dim, padded_dim(shape), cosine(shape), 1.0f, unit);
    store_row(unit, shape.dim, cache_k[start + i]);
    std::memcpy(cache_v[start + i], v[i], sizeof(T) * shape.dim);
  }
}

template <class T>
inline void step(const AttentionShape& shape, int64_t start, const Heads& q, const Heads& k, const Heads& v,
                 const Heads& cache_k, const Heads& cache_v, const Heads& out, const ThreadPool& pool) {
  const int64_t heads = shape.batch * shape.heads, shares = shares_of(shape, pool), keys = start + shape.tokens;
  const auto add = [&](int64_t task, float* unit) {
    const int64_t item = task / shape.heads, head = task % shape.heads;
    add_to_cache(shape, start, rows_of<T>(k, item, head), rows_of<T>(v, item, head), rows_of<T>(cache_k, item, head),
                 rows_of<T>(cache_v, item, head), unit);
  };
  if (shares > 1)  // then several threads read the keys of a head
    parallel(pool, heads, [&](int64_t begin, int64_t last) {
      Zeroed unit(padded_dim(shape));
      for (int64_t task = begin; task < last; task++) add(task, unit);
    });
  parallel(pool, heads * shares, [&](int64_t begin, int64_t last) {
    const bool few = shape.tokens <= kFewRows;
    Forward<T> pass(shape, keys);
    Zeroed unit(padded_dim(shape));
    int64_t end[kBlockRows];
    float lse[kBlockRows];
    std::fill(end, end + kBlockRows, keys);
    for (int64_t task = begin; task < last; task++) {
      const int64_t share = task % shares, head = task / shares % shape.heads, item = task / shares / shape.heads;
      if (shares == 1) add(task, unit);
      const Rows<T> queries = rows_of<T>(q, item, head), results = rows_of<T>(out, item, head);
      const Rows<T> all_k = rows_of<T>(cache_k, item, head), all_v = rows_of<T>(cache_v, item, head);
      const float factor = query_factor(shape, head);
      if (few) {
        pass.attend_few(queries, shape.tokens, all_k, all_v, keys, factor, results);
        continue;
      }
      pass.pack(all_k, all_v, keys, false);
      for (int64_t row = share * kBlockRows; row < shape.tokens; row += shares * kBlockRows)
        pass.attend({queries[row], q.token}, std::min(kBlockRows, shape.tokens - row), end, factor,
                    {results[row], out.token}, lse);
    }
  });
}

// Calls f with a value of the type of the elements.
template <class F>
inline void with_element(Element element, const F& f) {
  if (element == Element::float32) return f(float());
  if (element == Element::bfloat16) return f(BFloat16());
  f(Float16());
}

inline void forward_any(const AttentionShape& shape, const int64_t* lengths, const Heads& q, const Heads& k,
                        const Heads& v, const Heads& out, float* lse, const ThreadPool& pool) {
  with_element(shape.element, [&](auto x) { forward<decltype(x)>(shape, lengths, q, k, v, out, lse, pool); });
}

inline void backward_any(const AttentionShape& shape, const int64_t* lengths, const Heads& grad, const Heads& q,
                         const Heads& k, const Heads& v, const float* lse, const Heads& grad_q, const Heads& grad_k,
                         const Heads& grad_v, float* grad_scale, const ThreadPool& pool) {
  with_element(shape.element, [&](auto x) {
    backward<decltype(x)>(shape, lengths, grad, q, k, v, lse, grad_q, grad_k, grad_v, grad_scale, pool);
  });
}

inline void step_any(const AttentionShape& shape, int64_t start, const Heads& q, const Heads& k, const Heads& v,
                     const Heads& cache_k, const Heads& cache_v, const Heads& out, const ThreadPool& pool) {
  with_element(shape.element, [&](auto x) { step<decltype(x)>(shape, start, q, k, v, cache_k, cache_v, out, pool); });
}

}  // namespace AAR_ISA
}  // namespace aar

// Where a level's file instantiates the table of kernels.
#define AAR_DEFINE_ATTENTION(LEVEL)                                                                        \
  const aar::AttentionKernels aar::attention_kernels_##LEVEL = {AAR_ISA::forward_any, AAR_ISA::backward_any, \
                                                                AAR_ISA::step_any};
