// The LayerCast product on a CPU: y = x W^T + b with x, b, y in FP32 and W in 16 bits, every operation in FP32.
//
// W is never written out in FP32: each 16-bit weight becomes an FP32 register lane on its way into the multiplication.
// Both conversions are exact.
//
// One output is one sum over K, and its order is a function of K alone:
//   * K is cut into blocks of BLOCK, and each block into 16 lanes; a lane is a chain of fused multiply-adds;
//   * the 16 lanes are added as a fixed tree, the blocks one after the other, the bias last.
// It depends neither on the number of rows nor on where a thread's share begins, nor on the instruction set as long as
// that has fused multiply-adds: AVX2 does in two registers what AVX-512 does in one. Hence the same bits at every batch
// size, with every number of threads, in prefill and in decode.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr long LANES = 16;
constexpr long STEP = 2 * LANES;  // weights taken at a time
constexpr long BLOCK = 1024;      // of K: six rows of x and four of W then stay in the first-level cache
constexpr long CHUNK = 192;       // rows of x packed at a time
constexpr long PANEL = 64;        // most outputs that one thread takes at a time
constexpr long SMALL = 32768;     // operations that are sooner done than shared

#if defined(__AVX512F__)

struct Vector {
  __m512 v;
};
inline Vector zero() { return {_mm512_setzero_ps()}; }
inline Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void fma(Vector& sum, Vector a, Vector b) { sum.v = _mm512_fmadd_ps(a.v, b.v, sum.v); }
inline __m128 fold(Vector a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v),
                                     _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
struct BF16 {
  static Vector first(const uint16_t* w) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(w), 16))}; }
  static Vector second(const uint16_t* w) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(w), _mm512_set1_epi32(int(0xFFFF0000u))))};
  }
  static constexpr bool interleaved = true;
};
struct FP16 {
  static Vector first(const uint16_t* w) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)))};
  }
  static Vector second(const uint16_t* w) { return first(w + LANES); }
  static constexpr bool interleaved = false;
};
// Registers: at most 6 * 4 sums, 4 weights, 1 of x.
constexpr int WIDE = 6, WIDE_COLUMNS = 4, NARROW = 2, NARROW_COLUMNS = 8;

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Vector {
  __m256 low, high;
};
inline Vector zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vector load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void fma(Vector& sum, Vector a, Vector b) {
  sum.low = _mm256_fmadd_ps(a.low, b.low, sum.low);
  sum.high = _mm256_fmadd_ps(a.high, b.high, sum.high);
}
inline __m128 fold(Vector a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
inline __m256i integers(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
struct BF16 {
  static __m256 even(__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
  static __m256 odd(__m256i w) {
    return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xFFFF0000u))));
  }
  static Vector first(const uint16_t* w) { return {even(integers(w)), even(integers(w + 16))}; }
  static Vector second(const uint16_t* w) { return {odd(integers(w)), odd(integers(w + 16))}; }
  static constexpr bool interleaved = true;
};
struct FP16 {
  static __m256 wide(const uint16_t* w) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static Vector first(const uint16_t* w) { return {wide(w), wide(w + 8)}; }
  static Vector second(const uint16_t* w) { return first(w + LANES); }
  static constexpr bool interleaved = false;
};
// Registers, two a vector: at most 3 * 2 sums, 2 weights, 1 of x.
constexpr int WIDE = 3, WIDE_COLUMNS = 2, NARROW = 1, NARROW_COLUMNS = 4;

#else  // no intrinsics: plain loops, which compilers vectorise

struct Vector {
  float v[LANES];
};
inline Vector zero() { return Vector{}; }
inline Vector load(const float* p) {
  Vector out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline void fma(Vector& sum, const Vector& a, const Vector& b) {
  for (int i = 0; i < LANES; ++i) {
#if defined(FP_FAST_FMAF)
    sum.v[i] = std::fma(a.v[i], b.v[i], sum.v[i]);
#else  // without the instruction a fused multiply-add would be a function call: other bits, still FP32
    sum.v[i] += a.v[i] * b.v[i];
#endif
  }
}
inline float wide_bf16(uint16_t w) {
  const uint32_t bits = uint32_t(w) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float wide_fp16(uint16_t w) {
  const uint32_t sign = uint32_t(w & 0x8000) << 16, exponent = (w >> 10) & 31, fraction = w & 1023;
  if (exponent == 0) return std::copysign(std::ldexp(float(fraction), -24), sign ? -1.0f : 1.0f);
  const uint32_t bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
struct BF16 {
  static Vector strided(const uint16_t* w) {
    Vector out;
    for (int i = 0; i < LANES; ++i) out.v[i] = wide_bf16(w[2 * i]);
    return out;
  }
  static Vector first(const uint16_t* w) { return strided(w); }
  static Vector second(const uint16_t* w) { return strided(w + 1); }
  static constexpr bool interleaved = true;
};
struct FP16 {
  static Vector first(const uint16_t* w) {
    Vector out;
    for (int i = 0; i < LANES; ++i) out.v[i] = wide_fp16(w[i]);
    return out;
  }
  static Vector second(const uint16_t* w) { return first(w + LANES); }
  static constexpr bool interleaved = false;
};
constexpr int WIDE = 1, WIDE_COLUMNS = 4, NARROW = 1, NARROW_COLUMNS = 4;

#endif

#if defined(__AVX2__)
inline float total(Vector a) {
  const __m128 four = fold(a), two = _mm_hadd_ps(four, four);
  return _mm_cvtss_f32(_mm_hadd_ps(two, two));
}
// Four sums at once, each the same tree as `total`'s.
inline void totals(const Vector* a, float* out) {
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(fold(a[0]), fold(a[1])), _mm_hadd_ps(fold(a[2]), fold(a[3]))));
}
#else
inline float total(const Vector& a) {
  float four[4];
  for (int i = 0; i < 4; ++i) four[i] = (a.v[i] + a.v[i + 8]) + (a.v[i + 4] + a.v[i + 12]);
  return (four[0] + four[1]) + (four[2] + four[3]);
}
inline void totals(const Vector* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = total(a[i]);
}
#endif

// Sums of ROWS rows of x and COLUMNS rows of W over one block of K; out[row * COLUMNS + column].
template <class Weight, int ROWS, int COLUMNS>
inline void tile(const float* x, long x_stride, const uint16_t* w, long w_stride, long length, float* out) {
  Vector sum[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sum[r][c] = zero();

  const auto step = [&](const uint16_t* from, long stride, const float* rows) {
    Vector weight[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) weight[c] = Weight::first(from + c * stride);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vector value = load(rows + r * x_stride);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) fma(sum[r][c], value, weight[c]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) weight[c] = Weight::second(from + c * stride);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vector value = load(rows + r * x_stride + LANES);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) fma(sum[r][c], value, weight[c]);
    }
  };

  const long whole = length / STEP * STEP;
  for (long k = 0; k < whole; k += STEP) step(w + k, w_stride, x + k);
  if (whole < length) {  // the end of a row, with zeros behind it
    uint16_t end[COLUMNS * STEP] = {};
    for (int c = 0; c < COLUMNS; ++c)
      std::memcpy(end + c * STEP, w + c * w_stride + whole, sizeof(uint16_t) * (length - whole));
    step(end, STEP, x + whole);
  }

  for (int r = 0; r < ROWS; ++r) {
    int c = 0;
    for (; c + 4 <= COLUMNS; c += 4) totals(&sum[r][c], out + r * COLUMNS + c);
    for (; c < COLUMNS; ++c) out[r * COLUMNS + c] = total(sum[r][c]);
  }
}

struct Problem {
  const float* x;  // packed, rows of `stride`
  long stride, rows;
  const uint16_t* w;
  const float* bias;
  float* y;
  long n, k;
};

template <class Weight, int ROWS, int COLUMNS>
inline void place(const Problem& p, long row, long column, long from, long length) {
  float sums[ROWS * COLUMNS];
  tile<Weight, ROWS, COLUMNS>(p.x + row * p.stride + from, p.stride, p.w + column * p.k + from, p.k, length, sums);
  const bool last = from + length == p.k;
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) {
      float& y = p.y[(row + r) * p.n + column + c];
      y = from == 0 ? sums[r * COLUMNS + c] : y + sums[r * COLUMNS + c];
      if (last && p.bias) y += p.bias[column + c];
    }
}

template <class Weight, int ROWS, int COLUMNS>
inline void strip(const Problem& p, long row, long begin, long end, long from, long length) {
  long column = begin;
  for (; column + COLUMNS <= end; column += COLUMNS) place<Weight, ROWS, COLUMNS>(p, row, column, from, length);
  for (; column < end; ++column) place<Weight, ROWS, 1>(p, row, column, from, length);
}

template <class Weight, int ROWS>
inline void strips(const Problem& p, long& row, long begin, long end, long from, long length) {
  constexpr int columns = ROWS <= NARROW ? NARROW_COLUMNS : WIDE_COLUMNS;
  for (; row + ROWS <= p.rows; row += ROWS) strip<Weight, ROWS, columns>(p, row, begin, end, from, length);
}

// Outputs [begin, end) of every row.
template <class Weight>
void panel(const Problem& p, long begin, long end) {
  for (long from = 0; from < p.k; from += BLOCK) {
    const long length = std::min(BLOCK, p.k - from);
    long row = 0;
    strips<Weight, WIDE>(p, row, begin, end, from, length);
    if constexpr (WIDE > 4) strips<Weight, 4>(p, row, begin, end, from, length);
    if constexpr (WIDE > 2) strips<Weight, 2>(p, row, begin, end, from, length);
    strips<Weight, 1>(p, row, begin, end, from, length);
  }
}

// A row of x in the order in which the weights come out of their registers, with zeros up to a whole step.
template <class Weight>
void pack(const float* x, long k, float* out) {
  for (long from = 0; from < k; from += STEP, out += STEP)
    for (long i = 0; i < STEP; ++i) {
      const long source = from + (Weight::interleaved ? 2 * (i % LANES) + i / LANES : i);
      out[i] = source < k ? x[source] : 0.0f;
    }
}

template <class Weight>
int product(const float* x, const uint16_t* w, const float* bias, float* y, long m, long n, long k, int threads) {
  const long stride = (k + STEP - 1) / STEP * STEP;
  const long most = std::min(m, CHUNK);
  float* packed = static_cast<float*>(std::aligned_alloc(64, std::max(64L, most * stride * 4)));
  if (!packed) return 1;
  const long share = (n + 4 * threads - 1) / (4 * threads);
  const long width = std::clamp((share + 7) / 8 * 8, 16L, PANEL);
  for (long row = 0; row < m; row += CHUNK) {
    const long rows = std::min(CHUNK, m - row);
    const Problem p{packed, stride, rows, w, bias, y + row * n, n, k};
    const bool few = rows * k <= SMALL;  // packed before the threads wake is sooner than waiting for each other
    if (few)
      for (long r = 0; r < rows; ++r) pack<Weight>(x + (row + r) * k, k, packed + r * stride);
#pragma omp parallel num_threads(threads) if (rows * n * k > SMALL)
    {
      if (!few) {
#pragma omp for schedule(static)
        for (long r = 0; r < rows; ++r) pack<Weight>(x + (row + r) * k, k, packed + r * stride);
      }
#pragma omp for schedule(dynamic) nowait
      for (long begin = 0; begin < n; begin += width) panel<Weight>(p, begin, std::min(begin + width, n));
    }
  }
  std::free(packed);
  return 0;
}

}  // namespace

// x: (m, k), w: (n, k) as bfloat16 (kind 0) or float16 (kind 1), bias: (n) or null, y: (m, n); all contiguous.
// Returns 0, or 1 if memory for the packed rows could not be had.
extern "C" int layercast_linear(const float* x, const uint16_t* w, const float* bias, float* y, long m, long n, long k,
                                int kind, int threads) {
  if (k == 0) {
    for (long i = 0; i < m * n; ++i) y[i] = bias ? bias[i % n] : 0.0f;
    return 0;
  }
  return kind == 0 ? product<BF16>(x, w, bias, y, m, n, k, threads) : product<FP16>(x, w, bias, y, m, n, k, threads);
}
