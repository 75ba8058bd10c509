// The training forward: all items go through one level at a time, so that of what a level needs (its codebook in the form
// that is searched, its rows, what its codes act through) no more than one level's worth exists at a time.
#pragma once
#include "items.h"
#include "resample.h"
#include "search_floats.h"

namespace aar {
namespace AAR_ISA {

// One level's codebook, as it is or packed for the screen: whichever is cheaper for so many rows.
class LevelBook {
 public:
  LevelBook(const Shape& shape, int64_t most_rows, int64_t workers)
      : shape_(shape), sizes_(sizes(shape, packs(most_rows, shape))), codes_(sizes_.codes), scale_(sizes_.scale),
        bias_(padded(shape.codes)), normalised_(shape.cosine ? shape.codes * shape.dim : 0), bound_(kBounds),
        bytes_(sizes_.bytes), byte_bias_(sizes_.byte_bias), screened_(shape, workers), plain_(shape, workers) {}

  void set(const float* codebook, int64_t rows) {
    packed_ = packs(rows, shape_);
    if (packed_) {
      pack_book(codebook, shape_, packed(), 0);
      book_ = book(shape_, packed(), codebook, 0);
      return;
    }
    plain_book_ = {codebook, bias_, 1.001f, 0.0f};
    if (shape_.cosine) {
      plain_book_.codes = measure_book(codebook, shape_, bias_, normalised_);
      return;
    }
    for (int64_t k = 0; k < shape_.codes; k++) {
      const float* e = codebook + k * shape_.dim;
      bias_[k] = -0.5f * rounded_cost<true>(e, e, shape_.dim);
      plain_book_.largest_bias = std::fmax(plain_book_.largest_bias, bias_[k]);
    }
    plain_book_.largest = 1.001f * std::sqrt(2.0f * plain_book_.largest_bias);
  }

  void search(const float* z, int64_t n, int64_t worker, int64_t* out) {
    if (!packed_) return search_floats(z, n, plain_book_, shape_, plain_, worker, out);
    AAR_ISA::search(z, n, book_, shape_, screened_, worker, out, [](const int64_t*, int) {});
  }

 private:
  // Packing costs for a code about a quarter of what it then saves for a row.
  static bool packs(int64_t rows, const Shape& shape) { return 4 * rows >= shape.codes; }

  static PackedSizes sizes(Shape shape, bool packs) {
    shape.books = 1;
    return packs ? packed_sizes(shape) : PackedSizes{};
  }

  Packed packed() const {
    return {codes_, scale_, bias_, normalised_, bound_, sizes_.bytes > 0 ? bytes_.get() : nullptr, byte_bias_};
  }

  const Shape& shape_;
  const PackedSizes sizes_;
  bool packed_ = false;
  Buffer<int16_t> codes_;
  Buffer<float> scale_, bias_, normalised_, bound_;
  Buffer<uint8_t> bytes_;
  Buffer<int16_t> byte_bias_;
  Book book_{};
  PlainBook plain_book_{};
  SearchScratch screened_;
  FloatScratch plain_;
};

inline double squared_norm(const float* x, int64_t n) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = begin + 4096 < n ? begin + 4096 : n;
    Floats sum = splat(0.0f);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) sum = fma(load(x + i), load(x + i), sum);
    float rest = sum_lanes(sum);
    for (; i < end; i++) rest += x[i] * x[i];
    total += rest;
  }
  return total;
}

// Takes all items through the levels; of each level every worker has a share of the items.
class Trainer {
 public:
  // The residuals are kept in `out.quantized` until the end.
  Trainer(const Shape& shape, const float* codebooks, const Phi& phi, const uint8_t* mask, int64_t batch, int64_t length,
          const Training& out, const ThreadPool& pool)
      : shape_(shape), codebooks_(codebooks), phi_(phi), mask_(mask), batch_(batch), length_(length), dim_(shape.dim),
        size_(length * dim_), square_(dim_ * dim_), tokens_(total_tokens(shape)), longest_(longest(shape)), out_(out),
        pool_(pool), workers_(pool.threads < batch ? pool.threads : batch),
        most_(std::min((batch + workers_ - 1) / workers_ * longest_, shape.codes + 1)),
        items_(out.quantized, batch, length, dim_, mask != nullptr), at_(length),
        book_(shape, batch * (shape.books > 1 ? longest_ : tokens_), workers_), rows_(batch * longest_ * dim_),
        idx_(batch * longest_), slots_(batch * longest_), acting_(batch * longest_),
        slot_of_(workers_ * (shape.codes + 1)), distinct_(workers_), taken_(batch * size_), codes_(workers_ * most_ * dim_),
        products_(phi.kernels > 0 ? workers_ * most_ * dim_ : 0),
        panels_(workers_ * std::max(most_, dim_) * kTileColumns), folded_(phi.kernels > 0 ? phi.taps * square_ : 0),
        folded_bias_(dim_), weight_sums_(learns_phi() ? workers_ * phi.taps * square_ : 0),
        bias_sums_(learns_phi() ? workers_ * dim_ : 0) {
    for (int64_t i = 0; i < workers_ * (shape.codes + 1); i++) slot_of_[i] = -1;
    std::memset(folded_bias_, 0, sizeof(float) * dim_);
  }

  void run(const float* x) {
    share([&](int64_t, int64_t b) { items_.start(b, x + b * size_, mask_ == nullptr ? nullptr : mask_ + b * length_); });
    for (int64_t s = 0, offset = 0; s < shape_.scales; offset += shape_.lengths[s++]) {
      prepare(s);
      parallel(pool_, workers_, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; w++) level(s, offset, w, first_of(w), first_of(w + 1));
      });
      if (out_.hits != nullptr) take_statistics(s);
      const bool last = s + 1 == shape_.scales || kernel_of(s) != kernel_of(s + 1);
      if (learns_phi() && last) add_gradients(kernel_of(s));
    }
    share([&](int64_t, int64_t b) {
      float* quantized = items_.residual(b);
      for (int64_t t = 0; t < length_; t++) {
        const bool real = mask_ == nullptr || mask_[b * length_ + t];
        for (int64_t d = t * dim_; real && d < (t + 1) * dim_; d++) quantized[d] = x[b * size_ + d] - quantized[d];
      }
    });
  }

 private:
  int64_t first_of(int64_t worker) const { return batch_ * worker / workers_; }
  bool learns_phi() const { return out_.weight_grad != nullptr; }
  int64_t kernel_of(int64_t s) const { return phi_.kernels > 0 ? phi_.kernel_of[s] : 0; }

  // f(worker, item) for all items.
  template <class F>
  void share(const F& f) {
    parallel(pool_, workers_, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; w++)
        for (int64_t b = first_of(w); b < first_of(w + 1); b++) f(w, b);
    });
  }

  void prepare(int64_t s) {
    const int64_t n = shape_.lengths[s];
    positions(n, length_, shape_.repeat, at_);
    if (shape_.books > 1) book_.set(codebooks_ + s * shape_.codes * dim_, batch_ * n);
    else if (s == 0) book_.set(codebooks_, batch_ * tokens_);
    if (phi_.kernels == 0 || (s > 0 && kernel_of(s) == kernel_of(s - 1))) return;
    fold(kernel_of(s));
    if (!learns_phi()) return;
    std::memset(weight_sums_, 0, sizeof(float) * workers_ * phi_.taps * square_);
    std::memset(bias_sums_, 0, sizeof(float) * workers_ * dim_);
  }

  // phi(u) = (u + conv(u)) / 2 as one convolution: folded[tap][dim in][dim out].
  void fold(int64_t kernel) {
    const int64_t width = phi_.widths[kernel], margin = (phi_.taps - width) / 2;
    const float* weight = phi_.weights[kernel];
    if (margin > 0) std::memset(folded_, 0, sizeof(float) * phi_.taps * square_);
    for (int64_t in = 0; in < dim_; in++)
      for (int64_t k = 0; k < width; k++)
        for (int64_t o = 0; o < dim_; o++)
          folded_[((margin + k) * dim_ + in) * dim_ + o] = 0.5f * weight[(o * dim_ + in) * width + k];
    for (int64_t d = 0; d < dim_; d++) {
      folded_[(phi_.taps / 2 * dim_ + d) * dim_ + d] += 0.5f;
      folded_bias_[d] = 0.5f * phi_.biases[kernel][d];
    }
  }

  // Items [first, last) of one worker.
  void level(int64_t s, int64_t offset, int64_t worker, int64_t first, int64_t last) {
    const int64_t n = shape_.lengths[s];
    for (int64_t b = first; b < last; b++)
      pool(items_.residual(b), dim_, length_, dim_, n, items_.seen(b), rows_ + b * n * dim_, 0, n);
    book_.search(rows_ + first * n * dim_, (last - first) * n, worker, idx_ + first * n);
    for (int64_t b = first; b < last; b++) {
      items_.drop_unseen(b, n, idx_ + b * n);
      std::memcpy(out_.codes + b * tokens_ + offset, idx_ + b * n, sizeof(int64_t) * n);
    }
    find_distinct(s, worker, first * n, last * n);
    act(n, worker, first, last);
    for (int64_t b = first; b < last; b++) {
      const float* r = items_.residual(b);
      items_.clear_masked(b);
      out_.loss[b] = (s > 0 ? out_.loss[b] : 0.0) + squared_norm(r, size_);
      float* sum = out_.residual_sum + b * size_;
      if (s == 0) std::memcpy(sum, r, sizeof(float) * size_);
      else add_scaled(sum, r, 1.0f, size_);
    }
    if (learns_phi()) learn(n, worker, first, last);
  }

  // Numbers the codes in use of rows [first, last), and gathers them.
  void find_distinct(int64_t s, int64_t worker, int64_t first, int64_t last) {
    const float* book = codebooks_ + (shape_.books > 1 ? s : 0) * shape_.codes * dim_;
    float *codes = codes_ + worker * most_ * dim_, *products = products_ + worker * most_ * dim_;
    int32_t* slot_of = slot_of_ + worker * (shape_.codes + 1) + 1;  // from code -1, none, on
    int32_t distinct = 0;
    for (int64_t i = first; i < last; i++) {
      int32_t& slot = slot_of[idx_[i]];
      if (slot < 0) {
        slot = distinct++;
        if (idx_[i] < 0) std::memset(codes + slot * dim_, 0, sizeof(float) * dim_);
        else std::memcpy(codes + slot * dim_, book + idx_[i] * dim_, sizeof(float) * dim_);
      }
      slots_[i] = slot;
      acting_[i] = (phi_.kernels > 0 ? products : codes) + slot * dim_;
    }
    for (int64_t i = first; i < last; i++) slot_of[idx_[i]] = -1;
    distinct_[worker] = distinct;
  }

  // f(tap, shift, begin, end): frames [begin, end) see what lies at t + shift through this tap.
  template <class F>
  void each_tap(const F& f) {
    for (int64_t tap = 0; tap < phi_.taps; tap++) {
      const int64_t shift = tap - phi_.taps / 2;
      f(tap, shift, std::max<int64_t>(0, -shift), std::min(length_, length_ - shift));
    }
  }

  // Sums over taps first: taking tap by tap from the residual would round at its size each time.
  void act(int64_t n, int64_t worker, int64_t first, int64_t last) {
    const int64_t distinct = distinct_[worker];
    float *codes = codes_ + worker * most_ * dim_, *products = products_ + worker * most_ * dim_;
    float* taken = taken_ + first * size_;
    for (int64_t t = 0; t < (last - first) * length_; t++)
      std::memcpy(taken + t * dim_, folded_bias_, sizeof(float) * dim_);
    each_tap([&](int64_t tap, int64_t shift, int64_t begin, int64_t end) {
      if (phi_.kernels > 0) {
        std::memset(products, 0, sizeof(float) * distinct * dim_);
        gemm_accumulate(distinct, dim_, dim_, codes, dim_, 1, folded_ + tap * square_, products, panel(worker));
      }
      for (int64_t b = first; b < last; b++)
        AAR_ISA::act(acting_ + b * n, at_ + shift, 1, length_, dim_, nullptr, 1.0f, taken_ + b * size_, begin, end);
    });
    add_scaled(items_.residual(first), taken, -1.0f, (last - first) * size_);
  }

  // After a level the residual is what its gradients are made of.
  void learn(int64_t n, int64_t worker, int64_t first, int64_t last) {
    const int64_t distinct = distinct_[worker];
    float *codes = codes_ + worker * most_ * dim_, *gradients = products_ + worker * most_ * dim_;
    each_tap([&](int64_t tap, int64_t shift, int64_t begin, int64_t end) {
      std::memset(gradients, 0, sizeof(float) * distinct * dim_);
      for (int64_t b = first; b < last; b++)
        act_adjoint(items_.residual(b), at_ + shift, begin, end, dim_, slots_ + b * n, gradients);
      gemm_accumulate(dim_, dim_, distinct, gradients, 1, dim_, codes,
                      weight_sums_ + (worker * phi_.taps + tap) * square_, panel(worker));
    });
    // An item's sum first: adding frame by frame to the sum of a batch would lose digits.
    float *sums = bias_sums_ + worker * dim_, *own = panel(worker);
    for (int64_t b = first; b < last; b++) {
      std::memset(own, 0, sizeof(float) * dim_);
      for (int64_t t = 0; t < length_; t++) add_scaled(own, items_.residual(b) + t * dim_, 1.0f, dim_);
      add_scaled(sums, own, 1.0f, dim_);
    }
  }

  // Adds what the workers have summed since this kernel was folded: weight_sums[worker][tap][dim out][dim in].
  void add_gradients(int64_t kernel) {
    const int64_t all = phi_.taps * square_;
    for (int64_t w = 1; w < workers_; w++) {
      add_scaled(weight_sums_, weight_sums_ + w * all, 1.0f, all);
      add_scaled(bias_sums_, bias_sums_ + w * dim_, 1.0f, dim_);
    }
    float* out = out_.weight_grad + kernel * all;
    for (int64_t i = 0; i < square_; i++)
      for (int64_t tap = 0; tap < phi_.taps; tap++)
        out[i * phi_.taps + tap] -= out_.factor * weight_sums_[tap * square_ + i];
    add_scaled(out_.bias_grad + kernel * dim_, bias_sums_, -out_.factor, dim_);
  }

  // Every part of a codebook belongs to one task, which goes through the rows in order: the same sums each time.
  void take_statistics(int64_t s) {
    const int64_t n = shape_.lengths[s], e = shape_.books > 1 ? s : 0, size = shape_.codes;
    float *hits = out_.hits + e * size, *sums = out_.sums + e * size * dim_;
    parallel(pool_, pool_.threads, [&](int64_t begin, int64_t end) {
      const int64_t low = size * begin / pool_.threads, high = size * end / pool_.threads;
      if (s == e) {
        std::memset(hits + low, 0, sizeof(float) * (high - low));
        std::memset(sums + low * dim_, 0, sizeof(float) * (high - low) * dim_);
      }
      for (int64_t i = 0; i < batch_ * n; i++) {
        const int64_t k = idx_[i];
        if (k < low || k >= high) continue;
        hits[k] += 1.0f;
        add_scaled(sums + k * dim_, rows_ + i * dim_, 1.0f, dim_);
      }
      for (int64_t k = low; out_.samples != nullptr && s == e && k < high; k++) {
        const int64_t i = out_.samples[e * size + k];
        float* out = out_.sampled + (e * size + k) * dim_;
        if (idx_[i] < 0) std::memset(out, 0, sizeof(float) * dim_);
        else std::memcpy(out, rows_ + i * dim_, sizeof(float) * dim_);
      }
    });
  }

  float* panel(int64_t worker) const { return panels_ + worker * std::max(most_, dim_) * kTileColumns; }

  const Shape& shape_;
  const float* codebooks_;
  const Phi& phi_;
  const uint8_t* mask_;
  const int64_t batch_, length_, dim_, size_, square_, tokens_, longest_;
  const Training& out_;
  const ThreadPool& pool_;
  const int64_t workers_, most_;
  Items items_;
  Buffer<Position> at_;
  LevelBook book_;
  Buffer<float> rows_;            // of one level, [batch][n][dim], and the code of each
  Buffer<int64_t> idx_;
  Buffer<int32_t> slots_;         // which of its worker's distinct codes each is
  Buffer<const float*> acting_;   // through which row each acts
  Buffer<int32_t> slot_of_;
  Buffer<int64_t> distinct_;
  Buffer<float> taken_;           // from each frame by one level
  Buffer<float> codes_, products_, panels_, folded_, folded_bias_, weight_sums_, bias_sums_;
};

inline void quantize(const Shape& shape, const float* codebooks, const Phi& phi, const float* x, const uint8_t* mask,
                     int64_t batch, int64_t length, const Training& out, const ThreadPool& pool) {
  Trainer(shape, codebooks, phi, mask, batch, length, out, pool).run(x);
}

}  // namespace AAR_ISA
}  // namespace aar
