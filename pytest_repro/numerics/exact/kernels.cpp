// Exact compute on a CPU: the operations of operations.py, fused, with the same bits.
//
// Every sum in here is one of two kinds, and the comments say which:
//   * exact: integers over a power of two, held in float64 or int64, which never round. Their order is free, so they are
//     vectorised, blocked and, where there is the instruction, fused multiply-added: none of it can change a bit;
//   * fixed: a few float64 additions in the order that operations.py writes down.
// What is neither (exp, division, square root, scaling) is one IEEE 754 operation after the other, number by number, in the
// order of elementary.py. The file is compiled with -ffp-contract=off, so that a compiler fuses none of these.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr long LANES = 8;
constexpr long BLOCK = 64;       // of K in a linear layer: 26 + 21 + 6 = 53 bits
constexpr long HEAD_BLOCK = 32;  // of a head: 24 + 24 + 5 = 53 bits
constexpr long TOKENS = 8;       // of weighted values: 24 + 24 + 3 = 51 bits, the most that `whole` takes
constexpr long PANEL = 16;       // outputs whose weights are packed together
#if defined(__AVX512F__)
constexpr long ROWS = 12;  // rows of x beside a panel: their sums stay in registers
#else
constexpr long ROWS = 3;
#endif
constexpr long FEW = 6;          // rows up to which packing would cost more than it saves
constexpr long SOME = 512;       // numbers between one step and the next
constexpr long SMALL = 32768;    // operations that are sooner done than shared
constexpr int X_BITS = 26, HEAD_BITS = 24, NORM_BITS = 24, SHARE_BITS = 40;
constexpr long SMALLEST = -300;
constexpr int NO_NUMBER = 2;
constexpr double WHOLE = 6755399441055744.0;  // 1.5 * 2^52: added to an integer below 2^51, it shows it in its low bits

typedef double Vector __attribute__((vector_size(64)));
typedef int64_t Integers __attribute__((vector_size(64)));

inline Vector load(const double* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(double* p, Vector v) { std::memcpy(p, &v, sizeof v); }
inline Vector all(double x) { return Vector{x, x, x, x, x, x, x, x}; }

// sum += a * b, exact: fused or not, the same bits.
inline void add_exact(Vector& sum, Vector a, Vector b) {
#if defined(__AVX512F__)
  sum = (Vector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  __m256d x[2], y[2], s[2];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(s, &sum, 64);
  s[0] = _mm256_fmadd_pd(x[0], y[0], s[0]);
  s[1] = _mm256_fmadd_pd(x[1], y[1], s[1]);
  std::memcpy(&sum, s, 64);
#else
  sum += a * b;
#endif
}

// The sums of eight vectors' lanes, exact.
inline Vector fold(const Vector* v) {
  Vector pair[4], four[2];
  for (int i = 0; i < 4; ++i)
    pair[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
              __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; ++i)
    four[i] = __builtin_shufflevector(pair[2 * i], pair[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(pair[2 * i], pair[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

inline int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline double of_bits(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline double power(long e) { return of_bits((int64_t)(e + 1023) << 52); }

// Exponent of a largest magnitude, as dyadic.exponent gives it.
inline long exponent(double largest) { return std::max<long>((bits_of(largest) >> 52) - 1023, SMALLEST); }

// The largest magnitude's bits, of float32; from 0x7f800000 on there is an infinity or a NaN.
inline uint32_t largest_bits(const float* x, long n) {
  uint32_t most = 0;
  for (long i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    most = std::max(most, bits & 0x7fffffffu);
  }
  return most;
}
inline bool no_number(uint32_t bits) { return bits >= 0x7f800000u; }
inline double as_double(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// x rounded to the grid of its own largest, times a scale: dyadic.Dyadic.of. Returns the grid, sets bad where there is none.
inline long to_grid(const float* x, long n, int bits, double* out, bool whole, bool& bad) {
  const uint32_t most = largest_bits(x, n);
  bad |= no_number(most);
  const long grid = exponent(as_double(most)) + 1 - bits;
  const double big = power(grid + 52) * 1.5, scale = whole ? power(-grid) : 1.0;
  for (long i = 0; i < n; ++i) out[i] = ((double(x[i]) + big) - big) * scale;
  return grid;
}

struct BF16 {
  static Vector wide(const uint16_t* w) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)w)), 16);
    return (Vector)_mm512_cvtps_pd(_mm256_castsi256_ps(bits));
#else
    Vector v;
    for (int i = 0; i < LANES; ++i) v[i] = one(w[i]);
    return v;
#endif
  }
  static double one(uint16_t w) { return as_double(uint32_t(w) << 16); }
};
struct FP16 {
  static double one(uint16_t w) {
    const int e = w >> 10 & 31, m = w & 1023;
    const double size = e ? (1024 + m) * power(e - 25) : m * power(-24);
    return w & 0x8000 ? -size : size;
  }
  static Vector wide(const uint16_t* w) {
    Vector v;
#if defined(__AVX512F__) && defined(__F16C__)
    v = (Vector)_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w)));
#else
    for (int i = 0; i < LANES; ++i) v[i] = one(w[i]);
#endif
    return v;
  }
};
struct Wide {
  static Vector wide(const double* w) { return load(w); }
};

// Sums over one block for eight columns and R rows, lanes along K: sums[r] of the eight columns. Exact.
template <class Weight, int R, class T>
inline void block_of(const double* x, long x_stride, const T* const* w, long from, long length, Vector* sums) {
  Vector parts[R][LANES] = {};
  for (long k = 0; k < length; k += LANES) {
    Vector rows[R];
    for (int r = 0; r < R; ++r) rows[r] = load(x + r * x_stride + from + k);
    for (int c = 0; c < LANES; ++c) {
      const Vector weight = Weight::wide(w[c] + from + k);
      for (int r = 0; r < R; ++r) add_exact(parts[r][c], rows[r], weight);
    }
  }
  for (int r = 0; r < R; ++r) sums[r] = fold(parts[r]);
}

struct Problem {
  const double* x;  // on its grid, each row with zeros up to a whole block
  long stride, rows;
  const uint16_t* w;
  const float* bias;
  float* y;
  long n, k;
};

inline void finish(const Problem& p, long row, long column, const double* total, long count) {
  for (long c = 0; c < count; ++c)
    p.y[row * p.n + column + c] = float(p.bias ? total[c] + double(p.bias[column + c]) : total[c]);
}

// A few rows: weights go from memory into registers once for all of them.
template <class Weight, int R>
void narrow(const Problem& p, long row, long begin, long end) {
  const uint16_t none[BLOCK] = {};
  for (long column = begin; column < end; column += LANES) {
    const uint16_t* w[LANES];
    uint16_t rest[LANES][BLOCK];
    for (long c = 0; c < LANES; ++c) w[c] = p.w + std::min(column + c, p.n - 1) * p.k;
    Vector total[R] = {};
    for (long from = 0; from < p.k; from += BLOCK) {
      const long length = std::min(BLOCK, p.k - from);
      Vector sums[R];
      if (length % LANES == 0) {
        block_of<Weight, R>(p.x + row * p.stride, p.stride, w, from, length, sums);
      } else {
        const uint16_t* ends[LANES];
        for (long c = 0; c < LANES; ++c) {
          std::memcpy(rest[c], none, sizeof none);
          std::memcpy(rest[c], w[c] + from, length * 2);
          ends[c] = rest[c];
        }
        block_of<Weight, R>(p.x + row * p.stride + from, p.stride, ends, 0, BLOCK, sums);
      }
      for (int r = 0; r < R; ++r) total[r] += sums[r];  // fixed
    }
    for (int r = 0; r < R; ++r) {
      double out[LANES];
      store(out, total[r]);
      finish(p, row + r, column, out, std::min(LANES, end - column));
    }
  }
}

// R rows beside one packed block of 16 columns: totals += their sums over the block.
template <int R>
inline void beside(const double* x, long stride, const double* packed, double* totals) {
  Vector sums[R][2] = {};
  for (long k = 0; k < BLOCK; ++k) {
    const Vector low = load(packed + k * PANEL), high = load(packed + k * PANEL + LANES);
    for (int r = 0; r < R; ++r) {
      const Vector one = all(x[r * stride + k]);
      add_exact(sums[r][0], one, low);
      add_exact(sums[r][1], one, high);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int half = 0; half < 2; ++half) {
      double* at = totals + r * PANEL + half * LANES;
      store(at, load(at) + sums[r][half]);  // fixed
    }
}

// Many rows: sixteen columns are packed as float64, a block at a time, and serve all of them.
template <class Weight>
void panel(const Problem& p, long column, double* totals) {
  alignas(64) double packed[BLOCK * PANEL];
  const long count = std::min(PANEL, p.n - column);
  std::fill(totals, totals + p.rows * PANEL, 0.0);
  for (long from = 0; from < p.k; from += BLOCK) {
    const long length = std::min(BLOCK, p.k - from);
    if (count < PANEL || length < BLOCK) std::fill(packed, packed + BLOCK * PANEL, 0.0);
    for (long c = 0; c < count; ++c)
      for (long k = 0; k < length; ++k) packed[k * PANEL + c] = Weight::one(p.w[(column + c) * p.k + from + k]);
    long row = 0;
    for (; row + ROWS <= p.rows; row += ROWS)
      beside<ROWS>(p.x + row * p.stride + from, p.stride, packed, totals + row * PANEL);
    for (; row + 3 <= p.rows; row += 3) beside<3>(p.x + row * p.stride + from, p.stride, packed, totals + row * PANEL);
    for (; row < p.rows; ++row) beside<1>(p.x + row * p.stride + from, p.stride, packed, totals + row * PANEL);
  }
  for (long row = 0; row < p.rows; ++row) finish(p, row, column, totals + row * PANEL, count);
}

template <class Weight>
void multiply(const Problem& p, int threads) {
  const bool shared = p.rows * p.n * p.k > SMALL;
  if (p.rows <= FEW) {
    const long width = std::max(LANES, std::min(64L, (p.n / (4 * threads) + LANES - 1) / LANES * LANES));
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (shared)
    for (long begin = 0; begin < p.n; begin += width) {
      const long end = std::min(begin + width, p.n);
      long row = 0;
      for (; row + 2 <= p.rows; row += 2) narrow<Weight, 2>(p, row, begin, end);
      if (row < p.rows) narrow<Weight, 1>(p, row, begin, end);
    }
    return;
  }
#pragma omp parallel num_threads(threads) if (shared)
  {
    std::vector<double> totals(p.rows * PANEL);
#pragma omp for schedule(dynamic)
    for (long column = 0; column < p.n; column += PANEL) panel<Weight>(p, column, totals.data());
  }
}

// e^x as elementary.exp gives it.
inline double exponential(double x) {
  constexpr double c[] = {
      1.0 / 1.0,       1.0 / 1.0,        1.0 / 2.0,         1.0 / 6.0,          1.0 / 24.0,
      1.0 / 120.0,     1.0 / 720.0,      1.0 / 5040.0,      1.0 / 40320.0,      1.0 / 362880.0,
      1.0 / 3628800.0, 1.0 / 39916800.0, 1.0 / 479001600.0, 1.0 / 6227020800.0};
  x = x < -700.0 ? -700.0 : x > 700.0 ? 700.0 : x;
  const double shown = x * 1.44269504088896338700e00 + WHOLE, count = shown - WHOLE;
  const double rest = (x - count * 6.93147180369123816490e-01) - count * 1.90821492927058770002e-10;
  double total = c[13];
  for (int i = 12; i >= 0; --i) total = total * rest + c[i];
  return total * of_bits((int64_t)(((uint64_t)bits_of(shown) << 52) + ((uint64_t)1023 << 52)));
}

// An integer below 2^51 that a float64 holds.
inline int64_t integer(double x) { return bits_of(x + WHOLE) - bits_of(WHOLE); }

struct Heads {
  const float *query, *key, *value;
  const uint8_t* seen;
  float* out;
  long batch, heads, groups, asked, tokens, width;
  long by_batch, by_head, by_query;  // strides of `seen`
  double scaling;
};

// Keys and values of all tokens, on their grids; of values the numerators, and their grids beside them.
struct Known {
  std::vector<double> keys, values;
  std::vector<long> grids;
  long stride;
};

bool know(const Heads& h, Known& known, int threads) {
  const long rows = h.batch * h.groups * h.tokens;
  known.stride = (h.width + HEAD_BLOCK - 1) / HEAD_BLOCK * HEAD_BLOCK;
  known.keys.assign(rows * known.stride, 0.0);
  known.values.assign(rows * known.stride, 0.0);
  known.grids.resize(rows);
  int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad) if (rows * h.width > SMALL)
  for (long row = 0; row < rows; ++row) {
    bool wrong = false;
    const long at = row * h.width, to = row * known.stride;
    for (long from = 0; from < h.width; from += HEAD_BLOCK)
      to_grid(h.key + at + from, std::min(HEAD_BLOCK, h.width - from), HEAD_BITS, &known.keys[to + from], false, wrong);
    known.grids[row] = to_grid(h.value + at, h.width, HEAD_BITS, &known.values[to], true, wrong);
    bad |= wrong;
  }
  return !bad;
}

// One query's row, as operations.attention gives it.
bool attend(const Heads& h, const Known& known, long batch, long head, long asked, double* scores, double* row,
            int64_t* sums) {
  const long group = head / (h.heads / h.groups), first = (batch * h.groups + group) * h.tokens;
  const uint8_t* seen = h.seen + batch * h.by_batch + head * h.by_head + asked * h.by_query;
  const long at = ((batch * h.heads + head) * h.asked + asked) * h.width;
  bool bad = false;
  std::fill(row, row + known.stride, 0.0);
  for (long from = 0; from < h.width; from += HEAD_BLOCK)
    to_grid(h.query + at + from, std::min(HEAD_BLOCK, h.width - from), HEAD_BITS, row + from, false, bad);
  if (bad) return false;

  // What is not seen would add a zero numerator: it is left out.
  long begin = 0, end = h.tokens;
  while (begin < end && !seen[begin]) ++begin;
  while (end > begin && !seen[end - 1]) --end;
  double largest = -INFINITY;
  for (long token = begin; token < end; token += LANES) {
    const double* keys[LANES];
    for (long i = 0; i < LANES; ++i) keys[i] = &known.keys[(first + std::min(token + i, end - 1)) * known.stride];
    Vector total = {}, sum;
    for (long from = 0; from < known.stride; from += HEAD_BLOCK) {
      block_of<Wide, 1>(row, 0, keys, from, HEAD_BLOCK, &sum);
      total += sum;  // fixed
    }
    store(scores + token, total);
  }
  for (long token = begin; token < end; ++token) {
    scores[token] *= h.scaling;
    if (seen[token]) largest = std::max(largest, scores[token]);
  }
  if (largest == -INFINITY) largest = 0.0;

  constexpr double fine = 1.5 * 4096.0;  // 1.5 * 2^(52 - SHARE_BITS)
  static_assert(SHARE_BITS == 40, "fine follows it");
  int64_t whole = 0;
#pragma omp simd
  for (long token = begin; token < end; ++token) scores[token] = exponential(scores[token] - largest);
  for (long token = begin; token < end; ++token) scores[token] = seen[token] ? scores[token] : 0.0;
#pragma omp simd reduction(+ : whole)
  for (long token = begin; token < end; ++token) whole += bits_of(scores[token] + fine) - bits_of(fine);
  const double share = double(whole) * power(-SHARE_BITS);

  const long* grids = &known.grids[first];
  double most = 0.0;
  for (long token = begin; token < end; ++token) {
    scores[token] *= power(grids[token]);
    most = std::max(most, scores[token]);
  }
  const long grid = exponent(most) + 1 - HEAD_BITS;
  const double big = power(grid + 52) * 1.5, scale = power(-grid);
  for (long token = begin; token < end; ++token) scores[token] = ((scores[token] + big) - big) * scale;

  std::fill(sums, sums + known.stride, 0);
  for (long from = begin; from < end; from += TOKENS) {
    const long last = std::min(from + TOKENS, end);
    for (long d = 0; d < known.stride; d += LANES) {
      Vector part = {};
      for (long token = from; token < last; ++token)
        add_exact(part, all(scores[token]), load(&known.values[(first + token) * known.stride + d]));
      Integers some = (Integers)(part + WHOLE) - bits_of(WHOLE), before;
      std::memcpy(&before, sums + d, sizeof before);
      before += some;  // exact
      std::memcpy(sums + d, &before, sizeof before);
    }
  }
  for (long d = 0; d < h.width; ++d)
    h.out[at + d] = share == 0.0 ? 0.0f : float(double(sums[d]) * power(grid) / share);
  return true;
}

}  // namespace

// Each returns 0, or 2 where an infinity or a NaN was met, which has no numerator.

// x: (m, k), w: (n, k) on its grid as bfloat16 (kind 0) or float16 (kind 1), bias: (n) or null, y: (m, n).
extern "C" int exact_linear(const float* x, const uint16_t* w, const float* bias, float* y, long m, long n, long k,
                            int kind, int threads) {
  const long stride = (k + BLOCK - 1) / BLOCK * BLOCK;
  std::vector<double> rows(m * stride, 0.0);
  int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad) if (m * k > SMALL)
  for (long row = 0; row < m; ++row) {
    bool wrong = false;
    for (long from = 0; from < k; from += BLOCK)
      to_grid(x + row * k + from, std::min(BLOCK, k - from), X_BITS, &rows[row * stride + from], false, wrong);
    bad |= wrong;
  }
  if (bad) return NO_NUMBER;
  const Problem p{rows.data(), stride, m, w, bias, y, n, k};
  kind == 0 ? multiply<BF16>(p, threads) : multiply<FP16>(p, threads);
  return 0;
}

// query, out: (B, H, Q, D); key, value: (B, G, S, D); seen: bool with its strides, S contiguous.
extern "C" int exact_attention(const float* query, const float* key, const float* value, const uint8_t* seen, float* out,
                               long batch, long heads, long groups, long asked, long tokens, long width, long by_batch,
                               long by_head, long by_query, double scaling, int threads) {
  const Heads h{query, key, value, seen, out, batch, heads, groups, asked, tokens, width, by_batch, by_head, by_query,
                scaling};
  Known known;
  if (!know(h, known, threads)) return NO_NUMBER;
  int bad = 0;
#pragma omp parallel num_threads(threads) reduction(| : bad) if (batch * heads * asked * tokens * width > SMALL)
  {
    std::vector<double> scores(tokens + LANES), row(known.stride);
    std::vector<int64_t> sums(known.stride);
#pragma omp for schedule(dynamic, 4)
    for (long i = 0; i < batch * heads * asked; ++i) {
      const long query_at = i % asked, head = i / asked % heads, b = i / asked / heads;
      bad |= !attend(h, known, b, head, query_at, scores.data(), row.data(), sums.data());
    }
  }
  return bad ? NO_NUMBER : 0;
}

// y = x w / sqrt(mean(x^2) + epsilon): operations.rms_norm. x, y: (m, k), w: (k) as float32.
extern "C" int exact_rms_norm(const float* x, const float* w, float* y, long m, long k, double epsilon, int threads) {
  int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad) if (m * k > SMALL)
  for (long row = 0; row < m; ++row) {
    const float* from = x + row * k;
    const uint32_t most = largest_bits(from, k);
    bad |= no_number(most);
    const long grid = exponent(as_double(most)) + 1 - NORM_BITS;
    const double big = power(grid + 52) * 1.5, scale = power(-grid);
    int64_t whole = 0;
    for (long i = 0; i < k; ++i) {
      const double n = ((double(from[i]) + big) - big) * scale;
      whole += integer(n * n);  // exact
    }
    const double root = std::sqrt(double(whole) * power(2 * grid) / double(k) + epsilon);
    for (long i = 0; i < k; ++i) y[row * k + i] = float(double(from[i]) * double(w[i]) / root);
  }
  return bad ? NO_NUMBER : 0;
}

// y = x / (1 + e^-x): operations.silu.
extern "C" int exact_silu(const float* x, float* y, long n, int threads) {
#pragma omp parallel for num_threads(threads) if (n * 16 > SMALL)
  for (long from = 0; from < n; from += SOME) {
    const long count = std::min(SOME, n - from);
    double wide[SOME], below[SOME];  // a loop for each step, which compilers vectorise
    for (long i = 0; i < count; ++i) wide[i] = x[from + i];
#pragma omp simd
    for (long i = 0; i < count; ++i) below[i] = exponential(-wide[i]) + 1.0;
    for (long i = 0; i < count; ++i) y[from + i] = float(wide[i] / below[i]);
  }
  return 0;
}

// total[i] = sum of e^(x - largest) of each row, in steps of 2^-40: operations.logsumexp's.
extern "C" int exact_shares(const float* x, double* total, long m, long k, int threads) {
#pragma omp parallel for num_threads(threads) if (m * k > SMALL)
  for (long row = 0; row < m; ++row) {
    const float* from = x + row * k;
    double largest = from[0];
    for (long i = 1; i < k; ++i) largest = std::max(largest, double(from[i]));
    constexpr double fine = 1.5 * 4096.0;
    int64_t whole = 0;
#pragma omp simd reduction(+ : whole)
    for (long i = 0; i < k; ++i) whole += bits_of(exponential(double(from[i]) - largest) + fine) - bits_of(fine);
    total[row] = double(whole) * power(-SHARE_BITS);
  }
  return 0;
}
