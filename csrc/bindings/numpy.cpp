// The same kernels over NumPy arrays: encode and decode of codes without torch. One thread, the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "aar/msrq.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Longs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// A quantizer with its codebooks packed and phi tabulated.
class Quantizer {
 public:
  Quantizer(std::vector<int64_t> lengths, Floats codebooks, std::vector<Floats> phi_weights,
            std::vector<Floats> phi_biases, std::vector<int64_t> phi_index, bool cosine)
      : lengths_(std::move(lengths)), codebooks_(std::move(codebooks)), kernel_of_(std::move(phi_index)) {
    require(!lengths_.empty(), "lengths must not be empty");
    for (int64_t n : lengths_) {
      require(n > 0, "lengths must be positive");
      tokens_ += n;
    }
    require(codebooks_.ndim() == 3 && codebooks_.size() > 0, "codebooks must be [scales or 1, codes, latent]");
    shape_ = {int64_t(lengths_.size()), codebooks_.shape(0), codebooks_.shape(1), codebooks_.shape(2),
              lengths_.data(), cosine};
    require(shape_.books == 1 || shape_.books == shape_.scales, "codebooks must be [scales or 1, codes, latent]");
    pack();
    action_.codebooks = codebooks_.data();
    if (!phi_weights.empty()) tabulate(phi_weights, phi_biases);
  }
  // The shape and the action point into this object.
  Quantizer(const Quantizer&) = delete;
  Quantizer& operator=(const Quantizer&) = delete;

  Longs encode(Floats x) const {
    require(x.ndim() == 3 && x.shape(1) > 0 && x.shape(2) == shape_.dim, "x must be [batch, T >= 1, latent]");
    Longs out(std::vector<py::ssize_t>{x.shape(0), tokens_});
    {
      py::gil_scoped_release release;
      aar::msrq_kernels().encode(shape_, packed(), action_, x.data(), nullptr, x.shape(0), x.shape(1),
                            const_cast<int64_t*>(out.data()), nullptr, {});
    }
    return out;
  }

  Floats decode(Longs codes, int64_t length) const {
    require(codes.ndim() == 2 && codes.shape(1) == tokens_, "codes must be [batch, sum of lengths]");
    require(length >= 1, "length must be positive");
    Floats out(std::vector<py::ssize_t>{codes.shape(0), length, shape_.dim});
    bool ok = true;
    {
      py::gil_scoped_release release;
      float* data = const_cast<float*>(out.data());
      for (int64_t i = 0; i < out.size(); i++) data[i] = 0.0f;
      ok = aar::msrq_kernels().decode(shape_, action_, codes.data(), codes.shape(0), length, 0, shape_.scales, data,
                                 nullptr, nullptr, 0, {});
    }
    if (!ok) throw py::index_error("codes must be in [-1, codebook size)");
    return out;
  }

  std::vector<int64_t> lengths() const { return lengths_; }

 private:
  void pack() {
    const aar::PackedSizes sizes = aar::packed_sizes(shape_);
    packed_codes_.resize(sizes.codes + sizes.byte_bias);
    packed_bytes_.resize(sizes.bytes);
    packed_floats_.resize(2 * sizes.scale + sizes.exact + sizes.bound);
    aar::msrq_kernels().pack(shape_, codebooks_.data(), packed(), {});
  }

  aar::Packed packed() const {
    const aar::PackedSizes sizes = aar::packed_sizes(shape_);
    float* floats = const_cast<float*>(packed_floats_.data());
    int16_t* shorts = const_cast<int16_t*>(packed_codes_.data());
    return {shorts, floats, floats + sizes.scale, floats + 2 * sizes.scale, floats + 2 * sizes.scale + sizes.exact,
            sizes.bytes > 0 ? const_cast<uint8_t*>(packed_bytes_.data()) : nullptr, shorts + sizes.codes};
  }

  // As `fold` of aar_kernels/quantization/common.py; one table per scale.
  void tabulate(const std::vector<Floats>& weights, const std::vector<Floats>& biases) {
    const int64_t dim = shape_.dim, kernels = int64_t(weights.size());
    require(weights.size() == biases.size() && int64_t(kernel_of_.size()) == shape_.scales,
            "phi needs one weight and bias per kernel and one index per scale");
    for (int64_t k : kernel_of_) require(k >= 0 && k < kernels, "phi_index names no kernel");
    for (int64_t k = 0; k < kernels; k++) {
      require(weights[k].ndim() == 3 && weights[k].shape(0) == dim && weights[k].shape(1) == dim &&
                  weights[k].shape(2) % 2 == 1 && biases[k].ndim() == 1 && biases[k].size() == dim,
              "a phi kernel is [latent, latent, odd width] with a bias [latent]");
      action_.taps = std::max<int64_t>(action_.taps, weights[k].shape(2));
    }
    const int64_t taps = action_.taps, row = shape_.codes * taps * dim;
    bias_.resize(kernels * dim);
    table_.resize(shape_.scales * row);
    std::vector<float> folded(dim * taps * dim);
    for (int64_t k = 0; k < kernels; k++) {
      std::fill(folded.begin(), folded.end(), 0.0f);
      const int64_t width = weights[k].shape(2), margin = (taps - width) / 2;
      for (int64_t out = 0; out < dim; out++) {
        bias_[k * dim + out] = 0.5f * biases[k].data()[out];
        folded[(out * taps + taps / 2) * dim + out] = 0.5f;
        for (int64_t in = 0; in < dim; in++)
          for (int64_t tap = 0; tap < width; tap++)
            folded[(in * taps + margin + tap) * dim + out] += 0.5f * weights[k].data()[(out * dim + in) * width + tap];
      }
      for (int64_t s = 0; s < shape_.scales; s++)
        if (kernel_of_[s] == k)
          aar::msrq_kernels().build_table(codebooks_.data() + (shape_.books > 1 ? s : 0) * shape_.codes * dim,
                                     folded.data(), shape_.codes, dim, taps, table_.data() + s * row, {});
    }
    for (int64_t s = 0; s < shape_.scales; s++) table_of_.push_back(s);
    action_.table = table_.data();
    action_.table_of = table_of_.data();
    action_.bias = bias_.data();
    action_.kernel_of = kernel_of_.data();
    action_.kernels = kernels;
  }

  std::vector<int64_t> lengths_;
  Floats codebooks_;
  std::vector<int64_t> kernel_of_, table_of_;
  std::vector<int16_t> packed_codes_;
  std::vector<uint8_t> packed_bytes_;
  std::vector<float> packed_floats_, bias_, table_;
  aar::Shape shape_;
  aar::Action action_;
  int64_t tokens_ = 0;
};

}  // namespace

PYBIND11_MODULE(_numpy, m) {
  m.doc() = "Multi-scale residual quantization over NumPy arrays, without torch.";
  m.def("isa_report", &aar::isa_report, "Instruction sets built, detected, and in use.");
  py::class_<Quantizer>(m, "Quantizer")
      .def(py::init<std::vector<int64_t>, Floats, std::vector<Floats>, std::vector<Floats>, std::vector<int64_t>,
                    bool>(),
           py::arg("lengths"), py::arg("codebooks"), py::arg("phi_weights") = std::vector<Floats>{},
           py::arg("phi_biases") = std::vector<Floats>{}, py::arg("phi_index") = std::vector<int64_t>{},
           py::arg("cosine") = false,
           "lengths: tokens per scale. codebooks: float32 [scales or 1, codes, latent]. phi_weights, phi_biases: the\n"
           "distinct kernels [latent, latent, odd] and [latent]; phi_index: which of them each scale uses.")
      .def_property_readonly("lengths", &Quantizer::lengths)
      .def("encode", &Quantizer::encode, py::arg("x"),
           "x: float32 [batch, T, latent] -> codes int64 [batch, sum of lengths]; -1 throughout an item with a NaN.")
      .def("decode", &Quantizer::decode, py::arg("codes"), py::arg("length"),
           "codes: int64 [batch, sum of lengths] -> float32 [batch, length, latent]. IndexError: a code out of range.");
}
