// Decoding in one launch: the sum of what the codes of some scales stand for, the sum after each of them, and each sum
// pooled to the length of the next scale.
//
// Channels do not meet in any of this, nor do frames but in pooling. So a block takes a few channels of an item, for
// all frames where it has to pool, else for some of them.
#pragma once
#include "resample.h"

namespace aar::cuda {

constexpr int kDecodeThreads = 256;
constexpr int kSliceLanes = 4, kSlice = 4 * kSliceLanes;     // 16 channels: tables are read in sectors of 32 bytes
constexpr int kFramesAtOnce = kDecodeThreads / kSliceLanes;  // 64

struct DecodePlan {
  int slices, parts, frames;  // the grid is [batch][slices][parts], a part being that many frames
  int longest, shared;        // tokens of the longest scale; bytes of shared memory
  bool sums_fit;              // whether the sums are kept in shared memory, else in f_hat
};

template <bool POOL>
class Decoder {
 public:
  AAR_DEVICE Decoder(const Decode& call, const DecodePlan& plan) : call_(call) {
    const int part = block_id() % plan.parts, slice = block_id() / plan.parts % plan.slices;
    item_ = block_id() / plan.parts / plan.slices;
    begin_ = part * plan.frames;
    end_ = begin_ + plan.frames < call.length ? begin_ + plan.frames : call.length;
    channel_ = slice * kSlice + thread_id() % kSliceLanes * 4;
    Carver carver{shared_memory()};
    codes_ = carver.take<int>(plan.longest);
    positions_ = carver.take<Position>(kFramesAtOnce + call.tables.taps - 1);
    sums_ = plan.sums_fit ? carver.take<float4>(plan.frames * kSliceLanes) + thread_id() % kSliceLanes : nullptr;
  }

  AAR_DEVICE void run() {
    for (int t = begin_ + thread_id() / kSliceLanes; t < end_; t += kFramesAtOnce)
      write(t, call_.base == nullptr ? float4{0, 0, 0, 0} : load_channels(row(call_.base, t), channel_, dim()));
    const int64_t* codes = call_.codes + int64_t(item_) * call_.tokens;
    int next = 0;
    for (int s = call_.first; s < call_.last; s++) {
      const Scale& scale = call_.scale[s];
      for (int i = thread_id(); i < scale.length; i += kDecodeThreads) {
        const int64_t code = load_constant(codes + i);
        assert(code >= -1 && code < call_.tables.codes && "codes must be in [-1, codebook size)");
        codes_[i] = int(code);
      }
      codes += scale.length;
      add_scale(s, scale);
      if (POOL && s + 1 < call_.scales) {
        sync_block();
        pool(next, call_.scale[s + 1].length);
        next += call_.scale[s + 1].length;
      }
      sync_block();
    }
    for (int t = begin_ + thread_id() / kSliceLanes; sums_ != nullptr && t < end_; t += kFramesAtOnce)
      store_channels(row(call_.f_hat, t), channel_, dim(), read(t));
  }

 private:
  AAR_DEVICE void add_scale(int s, const Scale& scale) {
    const int half = call_.tables.taps / 2;
    for (int from = begin_; from < end_; from += kFramesAtOnce) {
      const int first = from - half;
      for (int i = thread_id(); i < kFramesAtOnce + 2 * half; i += kDecodeThreads)
        if (first + i >= 0 && first + i < call_.length)
          positions_[i] = position_of(first + i, scale.length, call_.length);
      sync_block();
      const int t = from + thread_id() / kSliceLanes;
      if (t < end_) {
        const float4 h = contribution<3>(call_.tables, scale, codes_, positions_, first, t, call_.length, channel_);
        const float4 sum = add(read(t), h);
        write(t, sum);
        if (call_.scales_out != nullptr)
          store_channels(row(call_.scales_out, t + int64_t(s - call_.first) * call_.batch * call_.length), channel_,
                         dim(), sum);
      }
      if (from + kFramesAtOnce < end_) sync_block();
    }
  }

  AAR_DEVICE void pool(int next, int n) const {
    for (int i = thread_id() / kSliceLanes; i < n; i += kFramesAtOnce) {
      const int begin = window_begin(i, n, call_.length), end = window_end(i, n, call_.length);
      float4 mean = {0, 0, 0, 0};
#pragma unroll 4
      for (int t = begin; t < end; t++) mean = add(mean, read(t));
      if (end - begin > 1) mean = divide(mean, float(end - begin));
      store_channels(call_.next_out + (int64_t(item_) * call_.next_rows + next + i) * dim(), channel_, dim(), mean);
    }
  }

  template <class T>
  AAR_DEVICE T* row(T* sequences, int64_t t) const {
    return sequences + (int64_t(item_) * call_.length + t) * dim();
  }
  AAR_DEVICE float4 read(int t) const {
    return sums_ != nullptr ? sums_[(t - begin_) * kSliceLanes] : reload_channels(row(call_.f_hat, t), channel_, dim());
  }
  AAR_DEVICE void write(int t, const float4& sum) {
    if (sums_ != nullptr) sums_[(t - begin_) * kSliceLanes] = sum;
    else store_channels(row(call_.f_hat, t), channel_, dim(), sum);
  }
  AAR_DEVICE int dim() const { return call_.tables.dim; }

  const Decode& call_;
  int item_, begin_, end_, channel_;
  int* codes_;
  Position* positions_;
  float4* sums_;
};

template <bool POOL>
AAR_KERNEL(kDecodeThreads, POOL ? 3 : 4) decode_kernel(AAR_ARGUMENTS(Decode) call, AAR_ARGUMENTS(DecodePlan) plan) {
  Decoder<POOL>(call, plan).run();
}

}  // namespace aar::cuda
