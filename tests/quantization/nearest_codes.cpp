// Checks that every level of instructions that this processor has finds the very nearest codes, on random rows and on
// rows and codebooks that are hard to screen. Prints what it ran; the exit status is 1 if a code differs.
//
// Links with csrc/cpu/isa.cpp and msrq_{portable,avx2,avx512}.cpp and nothing else, statically if wanted, so that it
// also runs in an emulator of processors that are not at hand.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "aar/msrq.h"

namespace {

std::mt19937 generator(1);

float normal() {
  static std::normal_distribution<float> draw;
  return draw(generator);
}

struct Problem {
  std::string name;
  int64_t codes, dim, rows;
  bool cosine;
  std::vector<float> book, z;
};

// The first of the codes that are nearest in double, as the search defines it.
std::vector<int64_t> nearest(const Problem& p) {
  std::vector<float> book = p.book;
  for (int64_t k = 0; p.cosine && k < p.codes; k++) {
    double square = 0.0;
    for (int64_t d = 0; d < p.dim; d++) square += double(book[k * p.dim + d]) * double(book[k * p.dim + d]);
    const double norm = std::fmax(std::sqrt(square), 1e-12);
    for (int64_t d = 0; d < p.dim; d++) book[k * p.dim + d] = float(double(book[k * p.dim + d]) / norm);
  }
  std::vector<int64_t> out(p.rows);
  for (int64_t i = 0; i < p.rows; i++) {
    double least = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < p.codes; k++) {
      double cost = 0.0;
      for (int64_t d = 0; d < p.dim; d++) {
        const double x = p.z[i * p.dim + d], e = book[k * p.dim + d];
        cost += p.cosine ? -x * e : (x - e) * (x - e);
      }
      if (cost < least) least = cost, out[i] = k;
    }
  }
  return out;
}

std::vector<int64_t> encode(const aar::MsrqKernels& kernels, const Problem& p) {
  const aar::Shape shape{1, 1, p.codes, p.dim, &p.rows, p.cosine};
  const aar::PackedSizes sizes = aar::packed_sizes(shape);
  std::vector<int16_t> codes(sizes.codes), byte_bias(sizes.byte_bias);
  std::vector<float> scale(sizes.scale), bias(sizes.scale), exact(sizes.exact), bound(sizes.bound);
  std::vector<uint8_t> bytes(sizes.bytes);
  const aar::Packed packed{codes.data(), scale.data(), bias.data(), exact.data(), bound.data(),
                           sizes.bytes > 0 ? bytes.data() : nullptr, byte_bias.data()};
  aar::Action action;
  action.codebooks = p.book.data();
  std::vector<int64_t> out(p.rows);
  kernels.pack(shape, p.book.data(), packed, {});
  kernels.encode(shape, packed, action, p.z.data(), nullptr, 1, p.rows, out.data(), nullptr, {});
  return out;
}

// The training forward, by so few rows at a time that it searches the codebook as it is.
std::vector<int64_t> encode_few(const aar::MsrqKernels& kernels, const Problem& p) {
  const int64_t most = std::max<int64_t>(1, (p.codes - 1) / 4);
  std::vector<int64_t> out(p.rows);
  std::vector<float> quantized(most * p.dim), residual_sum(most * p.dim);
  for (int64_t first = 0; first < p.rows; first += most) {
    const int64_t rows = std::min(most, p.rows - first);
    const aar::Shape shape{1, 1, p.codes, p.dim, &rows, p.cosine};
    double loss;
    aar::Training training{};
    training.codes = out.data() + first;
    training.quantized = quantized.data();
    training.loss = &loss;
    training.residual_sum = residual_sum.data();
    kernels.quantize(shape, p.book.data(), {}, p.z.data() + first * p.dim, nullptr, 1, rows, training, {});
  }
  return out;
}

Problem random_problem(int64_t codes, int64_t dim, int64_t rows, bool cosine) {
  Problem p{"random", codes, dim, rows, cosine, std::vector<float>(codes * dim), std::vector<float>(rows * dim)};
  for (float& x : p.book) x = normal() / 3;
  for (float& x : p.z) x = normal();
  return p;
}

struct Trap {
  const char* name;
  std::function<void(Problem&)> set;
};

// Codes so alike that roundings to 8 bits, or to 16, hardly tell them apart.
void draw_together(Problem& p, float apart) {
  for (int64_t i = p.dim; i < p.codes * p.dim; i++) p.book[i] = p.book[i % p.dim] + apart * normal();
}

void scale(std::vector<float>& values, float by) {
  for (float& x : values) x *= by;
}

const Trap kTraps[] = {
    {"all codes equal", [](Problem& p) { draw_together(p, 0); }},
    {"codes differ in the last bit", [](Problem& p) {
       for (int64_t i = 0; i < p.codes * p.dim; i++)
         p.book[i] = std::nextafter(p.book[i % p.dim], generator() % 2 ? 9.0f : -9.0f);
     }},
    {"codes 0.1 apart", [](Problem& p) { draw_together(p, 0.1f); }},
    {"codes 0.01 apart", [](Problem& p) { draw_together(p, 1e-2f); }},
    {"codes 0.001 apart", [](Problem& p) { draw_together(p, 1e-3f); }},
    {"codes 0.00001 apart", [](Problem& p) { draw_together(p, 1e-5f); }},
    {"codes that 8 bits hold exactly", [](Problem& p) {
       for (float& x : p.book) x = std::round(30 * x);
       for (int64_t d = 0; d < p.dim; d++) p.book[d] = d == 0 ? 127 : 0;
       scale(p.z, 30);
     }},
    {"every code twice", [](Problem& p) {
       const int64_t half = p.codes / 2 * p.dim;
       for (int64_t i = half; i < p.codes * p.dim; i++) p.book[i] = p.book[i - half];
     }},
    {"rows on the border of two codes", [](Problem& p) {
       for (int64_t i = 0; i < p.rows; i++) {
         const int64_t a = generator() % p.codes, b = generator() % p.codes;
         for (int64_t d = 0; d < p.dim; d++)
           p.z[i * p.dim + d] = (p.book[a * p.dim + d] + p.book[b * p.dim + d]) / 2 * (1 + 1e-7f * normal());
       }
     }},
    {"rows are codes", [](Problem& p) {
       for (int64_t i = 0; i < p.rows * p.dim; i++) p.z[i] = p.book[i % (p.codes * p.dim)];
     }},
    {"a channel of the rows dominates", [](Problem& p) {
       for (int64_t i = 0; i < p.rows; i++) p.z[i * p.dim] = 1e4f;
     }},
    {"a channel of all dominates", [](Problem& p) {
       for (int64_t i = 0; i < p.rows; i++) p.z[i * p.dim] = 1e4f + normal();
       for (int64_t k = 0; k < p.codes; k++) p.book[k * p.dim] = 1e4f + normal();
     }},
    {"one code is far away", [](Problem& p) { for (int64_t d = 0; d < p.dim; d++) p.book[d] *= 1e4f; }},
    {"norms over six magnitudes", [](Problem& p) {
       for (int64_t k = 0; k < p.codes; k++) {
         const float by = std::pow(10.0f, 6.0f * float(k) / float(p.codes) - 3.0f);
         for (int64_t d = 0; d < p.dim; d++) p.book[k * p.dim + d] *= by;
       }
     }},
    {"every second row is zero", [](Problem& p) {
       for (int64_t i = 0; i < p.rows * p.dim; i++) p.z[i] *= float(i / p.dim % 2);
     }},
    {"all codes are zero", [](Problem& p) { for (float& x : p.book) x = 0; }},
    {"a code is zero", [](Problem& p) {
       for (int64_t d = 0; d < p.dim; d++) p.book[(p.codes - 1) * p.dim + d] = 0;
     }},
    {"small rows", [](Problem& p) { scale(p.z, 1e-6f); }},
    {"rows are denormal", [](Problem& p) { scale(p.z, 1e-41f); }},
    {"all is denormal", [](Problem& p) { scale(p.z, 1e-41f); scale(p.book, 1e-41f); }},
    {"all is tiny", [](Problem& p) { scale(p.z, 1e-14f); scale(p.book, 1e-14f); }},
    {"all is huge", [](Problem& p) { scale(p.z, 1e13f); scale(p.book, 1e13f); }},
    {"large rows", [](Problem& p) { scale(p.z, 1e5f); }},
    {"few values, many ties", [](Problem& p) {
       for (float& x : p.book) x = std::round(x);
       for (float& x : p.z) x = std::round(x);
     }},
    {"all positive, far from zero", [](Problem& p) {
       for (float& x : p.book) x = 5 + x / 9;
       for (float& x : p.z) x = 5 + x / 9;
     }},
    {"values with long tails", [](Problem& p) {
       for (float& x : p.book) x = x * x * x;
       for (float& x : p.z) x = x * x * x;
     }},
};

int failures = 0, checked = 0;

void compare(const char* level, const char* way, const Problem& p, const std::vector<int64_t>& found,
             const std::vector<int64_t>& expected) {
  for (int64_t i = 0; i < p.rows; i++) {
    if (found[i] == expected[i]) continue;
    std::printf("%s, %s: %s, %lld codes of %lld channels%s: row %lld has code %lld, not %lld\n", level, way,
                p.name.c_str(), (long long)p.codes, (long long)p.dim, p.cosine ? ", cosine" : "", (long long)i, (long long)found[i],
                (long long)expected[i]);
    failures++;
    break;
  }
  checked++;
}

void check(const char* level, const aar::MsrqKernels& kernels, const Problem& p, const std::vector<int64_t>& expected) {
  compare(level, "packed", p, encode(kernels, p), expected);
  compare(level, "as it is", p, encode_few(kernels, p), expected);
}

// A row with NaN or an infinity in it breaks the item; in a codebook it must not lead out of it.
void check_nan(const char* level, const aar::MsrqKernels& kernels, float bad) {
  int wrong = 0;
  Problem p = random_problem(300, 20, 13, false);
  p.z[7 * p.dim + 3] = bad;
  for (const auto& codes : {encode(kernels, p), encode_few(kernels, p)})
    for (int64_t code : codes) wrong += code != -1;
  p = random_problem(300, 20, 13, false);
  p.book[5 * p.dim + 3] = bad;
  for (const auto& codes : {encode(kernels, p), encode_few(kernels, p)})
    for (int64_t code : codes) wrong += code < 0 || code >= p.codes;
  for (float& x : p.book) x = bad;
  for (const auto& codes : {encode(kernels, p), encode_few(kernels, p)})
    for (int64_t code : codes) wrong += code < 0 || code >= p.codes;
  if (wrong > 0) std::printf("%s: wrong with %g\n", level, bad);
  failures += wrong > 0;
  checked += 6;
}

}  // namespace

int main() {
  const std::string report = aar::isa_report();
  std::vector<std::pair<const char*, const aar::MsrqKernels*>> levels = {{"portable", &aar::msrq_kernels_portable}};
#if defined(AAR_HAVE_X86)
  const std::string detected = report.substr(report.find("detected="));
  if (detected.find("avx2") < detected.find(";")) levels.push_back({"avx2", &aar::msrq_kernels_avx2});
  if (detected.find("avx512") < detected.find(";")) levels.push_back({"avx512", &aar::msrq_kernels_avx512});
#endif
  std::vector<Problem> problems;
  for (bool cosine : {false, true}) {
    for (int64_t dim : {1, 3, 4, 7, 8, 14, 16, 31, 33, 64, 65, 80, 100, 128, 130, 200, 255, 256, 257})
      for (int64_t codes : {int64_t(256), 257 + 31 * dim % 200, int64_t(40)})
        problems.push_back(random_problem(codes, dim, 1 + (dim + codes) % 19, cosine));
    problems.push_back(random_problem(1024, 64, 40, cosine));
    problems.push_back(random_problem(2048, 256, 14, cosine));
    for (const Trap& trap : kTraps)
      for (int64_t dim : {4, 8, 30, 128, 160}) {
        problems.push_back(random_problem(dim == 30 ? 300 : 513, dim, dim < 30 ? 101 : 17, cosine));
        trap.set(problems.back());
        problems.back().name = trap.name;
      }
  }
  for (const Problem& p : problems) {
    const std::vector<int64_t> expected = nearest(p);
    for (const auto& [name, kernels] : levels) check(name, *kernels, p, expected);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  for (const auto& [name, kernels] : levels)
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity}) check_nan(name, *kernels, bad);
  for (const auto& level : levels) std::printf("%s ", level.first);
  std::printf("ran %d searches, %d wrong\n", checked, failures);
  return failures > 0;
}
