// The drivers: a block of items goes through one level at a time, so that a codebook is read once per block while the
// residuals of the block stay in the second-level cache.
#pragma once
#include "aar/msrq.h"
#include "gemm.h"
#include "grid.h"
#include "items.h"
#include "project.h"
#include "search.h"
#include "training.h"

namespace aar {
namespace AAR_ISA {

inline int64_t channels(const Shape& shape) { return shape.channels > 0 ? shape.channels : shape.dim; }

inline void pack(const Shape& shape, const float* codebooks, const Packed& packed, const ThreadPool& pool) {
  parallel(pool, shape.books, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) pack_book(codebooks + b * shape.codes * shape.dim, shape, packed, b);
  });
}

inline void build_table(const float* codebook, const float* folded, int64_t codes, int64_t dim, int64_t taps,
                        float* table, const ThreadPool& pool) {
  const int64_t wide = taps * dim, chunk = 128;
  parallel(pool, (codes + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
    Buffer<float> panel(dim * kTileColumns);
    const int64_t first = begin * chunk, last = end * chunk < codes ? end * chunk : codes;
    std::memset(table + first * wide, 0, sizeof(float) * (last - first) * wide);
    gemm_accumulate(last - first, wide, dim, codebook + first * dim, dim, 1, folded, table + first * wide, panel);
  });
}

// The rows through which the codes of one scale act: found in a table, or computed once for each code in use.
class Rows {
 public:
  Rows(const Shape& shape, const Action& action, int64_t capacity)
      : pointers(capacity), shape_(shape), action_(action), wide_(action.taps * channels(shape)),
        computes_(action.table == nullptr && action.folded != nullptr),
        most_(capacity <= shape.codes ? capacity : shape.codes + 1), slot_of_(shape.codes + 1),
        codes_(computes_ ? most_ * shape.dim : 0), computed_(computes_ ? most_ * wide_ : 0),
        panel_(computes_ ? shape.dim * kTileColumns : 0), zeros_(wide_) {
    std::memset(zeros_, 0, sizeof(float) * wide_);
    for (int64_t k = 0; k <= shape.codes; k++) slot_of_[k] = -1;
  }

  // The rows of all codes of scale s, if they lie in a table.
  const float* tabulated(int64_t s) const {
    if (computes_) return nullptr;
    return action_.table != nullptr ? action_.table + action_.table_of[s] * shape_.codes * wide_ : book(s);
  }

  // Brings the rows of these codes towards the core while others are worked on.
  void fetch(int64_t s, const int64_t* idx, int64_t n) const {
    const float* table = tabulated(s);
    for (int64_t i = 0; table != nullptr && i < n; i++)
      for (int64_t j = 0; idx[i] >= 0 && j < wide_; j += 16) __builtin_prefetch(table + idx[i] * wide_ + j, 0, 2);
  }

  void find(int64_t s, const int64_t* idx, int64_t n) {
    if (!computes_) {
      const float* table = tabulated(s);
      for (int64_t i = 0; i < n; i++) pointers[i] = idx[i] < 0 ? zeros_.get() : table + idx[i] * wide_;
      return;
    }
    int64_t distinct = 0;
    for (int64_t i = 0; i < n; i++) {
      int32_t& slot = slot_of_[idx[i] < 0 ? shape_.codes : idx[i]];
      if (slot < 0) {
        slot = int32_t(distinct++);
        float* code = codes_ + slot * shape_.dim;
        if (idx[i] < 0) std::memset(code, 0, sizeof(float) * shape_.dim);
        else std::memcpy(code, book(s) + idx[i] * shape_.dim, sizeof(float) * shape_.dim);
      }
      pointers[i] = computed_ + slot * wide_;
    }
    for (int64_t i = 0; i < n; i++) slot_of_[idx[i] < 0 ? shape_.codes : idx[i]] = -1;
    std::memset(computed_, 0, sizeof(float) * distinct * wide_);
    gemm_accumulate(distinct, wide_, shape_.dim, codes_, shape_.dim, 1,
                    action_.folded + action_.kernel_of[s] * shape_.dim * wide_, computed_, panel_);
  }

  Buffer<const float*> pointers;  // to the rows of each code

 private:
  const float* book(int64_t s) const {
    return action_.codebooks + (shape_.books > 1 ? s : 0) * shape_.codes * shape_.dim;
  }

  const Shape& shape_;
  const Action& action_;
  const int64_t wide_;
  const bool computes_;
  const int64_t most_;
  Buffer<int32_t> slot_of_;
  Buffer<float> codes_, computed_, panel_, zeros_;
};

inline const float* bias_of(const Shape& shape, const Action& action, int64_t s) {
  return action.bias == nullptr ? nullptr : action.bias + action.kernel_of[s] * shape.dim;
}

// Items that go through the scales together. The more, the more often a code's rows are found in a cache; their residuals
// should still fit the last level of it.
inline int64_t block_items(int64_t batch, int64_t item_floats, int threads) {
  const int64_t share = (batch + threads - 1) / threads, fitting = (int64_t(1) << 18) / item_floats;
  const int64_t block = share < fitting ? share : fitting;
  return block < 1 ? 1 : block;
}

// Rows of a table (2.3 KB each at latent 64) that may be on their way to the second-level cache at a time.
constexpr int64_t kFetched = 64;

// One block of items of `encode`. A block that is alone may have a team: threads that share the rows and the frames
// of each scale.
class Encoder {
 public:
  Encoder(const Shape& shape, const Packed& packed, const Action& action, int64_t length, int64_t items, bool masked,
          const ThreadPool& team)
      : shape_(shape), packed_(packed), action_(action), length_(length), channels_(channels(shape)),
        size_(length * channels_), longest_(longest(shape)), residual_(items * size_),
        items_(residual_, items, length, channels_, masked), pooled_(items * longest_ * shape.dim),
        idx_(items * longest_), resampler_(shape, action.taps, length, team.threads),
        rows_(shape, action, items * longest_), team_(team), scratch_(shape, team.threads) {}

  void run(const float* x, const uint8_t* mask, int64_t first, int64_t items, int64_t tokens, int64_t* out, float* rest) {
    for (int64_t b = 0; b < items; b++)
      items_.start(b, x + (first + b) * size_, mask == nullptr ? nullptr : mask + (first + b) * length_);
    for (int64_t s = 0, offset = 0; s < shape_.scales; offset += shape_.lengths[s++]) {
      const int64_t n = shape_.lengths[s];
      resampler_.plan(s);
      // Only so many items are searched before their codes act that the rows fetched meanwhile stay in the cache.
      const int64_t group = (kFetched + n - 1) / n;
      for (int64_t from = 0; from < items; from += group) {
        const int64_t to = items - from < group ? items : from + group;
        const int64_t tiles = ((to - from) * n + kSearchRows - 1) / kSearchRows;
        divide(tiles, [&](int64_t begin, int64_t end, int64_t worker) {
          find_codes(s, from, begin * kSearchRows, end < tiles ? end * kSearchRows : (to - from) * n, worker);
        });
        for (int64_t b = from; b < to; b++) {
          int64_t* idx = idx_ + (b - from) * n;
          items_.drop_unseen(b, n, idx);
          std::memcpy(out + (first + b) * tokens + offset, idx, sizeof(int64_t) * n);
        }
        if (rest == nullptr && s + 1 == shape_.scales) continue;
        rows_.find(s, idx_, (to - from) * n);
        divide(length_, [&](int64_t begin, int64_t end, int64_t worker) {
          for (int64_t b = from; b < to; b++)
            resampler_.act(rows_.pointers + (b - from) * n, channels_, bias_of(shape_, action_, s), -1.0f,
                           items_.residual(b), begin, end, worker);
        });
        for (int64_t b = from; b < to; b++) items_.clear_masked(b);
      }
    }
    if (rest != nullptr) std::memcpy(rest + first * size_, residual_, sizeof(float) * items * size_);
  }

 private:
  // f(begin, end, worker) over [0, n), by the team where there is enough to share: two threads meet in some microseconds.
  template <class F>
  void divide(int64_t n, const F& f) {
    const int64_t workers = n < 2 * team_.threads ? 1 : team_.threads;
    parallel(team_, workers, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; w++) f(n * w / workers, n * (w + 1) / workers, w);
    });
  }

  // Pools and searches rows [begin, end) of the items from `from` on.
  void find_codes(int64_t s, int64_t from, int64_t begin, int64_t end, int64_t worker) {
    const int64_t n = shape_.lengths[s], dim = shape_.dim;
    for (int64_t i = begin; i < end;) {
      const int64_t item = i / n, last = (item + 1) * n < end ? (item + 1) * n : end, b = from + item;
      const float* own = items_.residual(b) + (channels_ > dim ? s * dim : 0);
      resampler_.pool(s, own, channels_, dim, items_.seen(b), pooled_ + item * n * dim, i - item * n, last - item * n);
      i = last;
    }
    search(pooled_ + begin * dim, end - begin, book(shape_, packed_, action_.codebooks, s), shape_, scratch_, worker,
           idx_ + begin, [&](const int64_t* found, int count) { rows_.fetch(s, found, count); });
  }

  const Shape& shape_;
  const Packed& packed_;
  const Action& action_;
  const int64_t length_, channels_, size_, longest_;
  Buffer<float> residual_;
  Items items_;
  Buffer<float> pooled_;
  Buffer<int64_t> idx_;
  Resampler resampler_;
  Rows rows_;
  const ThreadPool& team_;
  SearchScratch scratch_;
};

inline void encode(const Shape& shape, const Packed& packed, const Action& action, const float* x,
                   const uint8_t* mask, int64_t batch, int64_t length, int64_t* out, float* rest,
                   const ThreadPool& pool) {
  const int64_t tokens = total_tokens(shape), block = block_items(batch, length * channels(shape), pool.threads);
  const int64_t blocks = (batch + block - 1) / block;
  const int64_t shares = pool.threads < blocks ? pool.threads : blocks;
  const ThreadPool alone;
  const ThreadPool& team = blocks == 1 ? pool : alone;
  parallel(pool, shares, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; share++) {
      Encoder encoder(shape, packed, action, length, block, mask != nullptr, team);
      for (int64_t i = blocks * share / shares; i < blocks * (share + 1) / shares; i++) {
        const int64_t first = i * block, items = batch - first < block ? batch - first : block;
        encoder.run(x, mask, first, items, tokens, out, rest);
      }
    }
  });
}

inline bool decode(const Shape& shape, const Action& action, const int64_t* codes, int64_t batch, int64_t length,
                   int64_t first, int64_t last, float* f_hat, float* scales_out, float* next_out,
                   int64_t next_stride, const ThreadPool& pool) {
  const int64_t dim = shape.dim, size = length * dim;
  int64_t tokens = 0;
  for (int64_t s = first; s < last; s++) tokens += shape.lengths[s];
  for (int64_t i = 0; i < batch * tokens; i++)
    if (codes[i] < -1 || codes[i] >= shape.codes) return false;
  // A few items are divided by frames, of which each is a sum over all scales on its own.
  const bool whole = batch >= pool.threads || next_out != nullptr || (action.table == nullptr && action.folded != nullptr);
  const int64_t parts = whole ? 1 : pool.threads;
  parallel(pool, batch * parts, [&](int64_t begin, int64_t end) {
    Rows rows(shape, action, longest(shape));
    Resampler resampler(shape, action.taps, length, 1);
    for (int64_t s = first, offset = 0, next_offset = 0; s < last; offset += shape.lengths[s++]) {
      const int64_t n = shape.lengths[s], n_next = s + 1 < shape.scales ? shape.lengths[s + 1] : 0;
      resampler.plan(s);
      for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / parts, from = length * (task % parts) / parts, to = length * (task % parts + 1) / parts;
        float* f = f_hat + b * size;
        rows.find(s, codes + b * tokens + offset, n);
        if (parts == 1 && b + 1 < end) rows.fetch(s, codes + (b + 1) * tokens + offset, n);
        resampler.act(rows.pointers, dim, bias_of(shape, action, s), 1.0f, f, from, to, 0);
        if (scales_out != nullptr)
          std::memcpy(scales_out + ((s - first) * batch + b) * size + from * dim, f + from * dim,
                      sizeof(float) * (to - from) * dim);
        if (next_out != nullptr && n_next > 0)
          resampler.pool(s + 1, f, dim, dim, nullptr, next_out + b * next_stride + next_offset, 0, n_next);
      }
      next_offset += n_next * dim;
    }
  });
  return true;
}

// VQ-VAE's moving averages (arXiv 1711.00937, appendix A.1), as `update` of aar_kernels/quantization/reference.py.
inline void update(const Shape& shape, const Averages& averages, float* codebooks, float* cluster_size,
                   float* embed_avg, const float* hits, const float* sums, const float* sampled,
                   const ThreadPool& pool) {
  const int64_t dim = shape.dim, size = shape.codes;
  const float keep = averages.decay, take = 1.0f - averages.decay;
  parallel(pool, shape.books, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      double total = 0.0;
      for (int64_t k = b * size; k < (b + 1) * size; k++) {
        float* __restrict average = embed_avg + k * dim;
        const float* __restrict sum = sums + k * dim;
        cluster_size[k] = keep * cluster_size[k] + take * hits[k];
        for (int64_t d = 0; d < dim; d++) average[d] = keep * average[d] + take * sum[d];
        if (sampled != nullptr && cluster_size[k] < averages.dead_code_threshold) {
          const float* row = sampled + k * dim;
          bool offered = false;  // a zero row is none: its sample was padding, or an item that has a NaN in it
          for (int64_t d = 0; d < dim; d++) offered |= row[d] != 0.0f;
          if (offered) {
            // The averages are replaced too: left alone they would overwrite the new row below.
            for (int64_t d = 0; d < dim; d++) average[d] = row[d] * averages.dead_code_threshold;
            cluster_size[k] = averages.dead_code_threshold;
          }
        }
        total += cluster_size[k];
      }
      const double share = total / (total + double(size) * averages.epsilon);
      for (int64_t k = b * size; k < (b + 1) * size; k++) {
        const float inverse = float(1.0 / ((double(cluster_size[k]) + averages.epsilon) * share));
        float* __restrict code = codebooks + k * dim;
        const float* __restrict average = embed_avg + k * dim;
        for (int64_t d = 0; d < dim; d++) code[d] = average[d] * inverse;
      }
    }
  });
}

}  // namespace AAR_ISA
}  // namespace aar

// Where a level's file instantiates the table of kernels.
#define AAR_DEFINE_MSRQ(LEVEL)                                                                              \
  const aar::MsrqKernels aar::msrq_kernels_##LEVEL = {AAR_ISA::pack,       AAR_ISA::build_table,            \
                                                      AAR_ISA::encode,     AAR_ISA::decode,                 \
                                                      AAR_ISA::quantize,   AAR_ISA::update,             \
                                                      AAR_ISA::project,    AAR_ISA::gather};
