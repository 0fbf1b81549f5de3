// Products with a codec's matrix, head by head: queries as what columns of rows hold, and sums of columns as values (compiled
// behind rows.cpp). A matrix is read once for all queries of a head, and as it is stored.

// S of ``kind`` [rows, features], ``row`` elements apart (null: a head's columns are its features), and the mean [features] (or
// null); ``columns``: which feature each of heads * dim is, or null where they are in order, a head's ``apart`` from the next
// one's (0: one matrix for all). ``across``: what is stored is S^T, [dim, rows].
struct Matrix {
  const void* data; int64_t kind, row;
  const void* mean; int64_t mean_kind;
  const int64_t* columns; int64_t heads, dim, rows, apart, across;
};

// Queries or results [batch, heads, queries, dim] of ``kind``: strides in elements, 1 along dim.
struct Lines { void* data; int64_t kind, batch, heads, queries, at_batch, at_head, at_query; };

static inline float number(const void* p, int64_t kind, int64_t i) {
  if (kind == 0) return ((const float*)p)[i];
  const uint16_t raw = ((const uint16_t*)p)[i];
  if (kind == 2) return half_to_float(raw);
  const uint32_t wide = uint32_t(raw) << 16;
  float f; std::memcpy(&f, &wide, 4);
  return f;
}

static inline V numbers_of(const void* p, int64_t kind, int64_t i, int64_t count) {
  if (kind == 0) return numbers<0>((const uint8_t*)p + 4 * i, count);
  return kind == 1 ? numbers<1>((const uint8_t*)p + 2 * i, count) : numbers<2>((const uint8_t*)p + 2 * i, count);
}

// ``count`` numbers as fp32, zeros behind up to a whole vector.
static inline void widened(const void* p, int64_t kind, int64_t i, int64_t count, float* to) {
  for (int64_t j = 0; j < count; j += LANES) store(to + j, numbers_of(p, kind, i + j, std::min<int64_t>(LANES, count - j)));
}

static inline void narrowed(const float* from, int64_t count, void* p, int64_t kind, int64_t i) {
  const int64_t size = kind == 0 ? 4 : 2;
  uint8_t* const to = (uint8_t*)p + i * size;
  uint8_t last[4 * LANES];
  for (int64_t j = 0; j < count; j += LANES) {
    if (j + LANES <= count) put(load(from + j), kind, to + j * size);
    else put(load(from + j), kind, last), std::memcpy(to + j * size, last, (count - j) * size);
  }
}

// Features of head h in a row of S (or in the mean), zeros behind.
static inline void features(const Matrix& a, const void* p, int64_t kind, int64_t row, int64_t h, float* to) {
  if (!a.columns) return widened(p, kind, row + h * a.apart, a.dim, to);
  for (int64_t d = 0; d < a.dim; d++) to[d] = number(p, kind, row + a.columns[h * a.dim + d]);
  for (int64_t d = a.dim; d < padded(a.dim); d++) to[d] = 0;
}

// Some lines of one head, of all batch rows: tasks of heads and parts of their lines, as many as there are threads, or more.
struct Task {
  int64_t head, first, last, each, all;
  // Of the i-th: which line it is of all [batch, heads, queries].
  int64_t line(int64_t i) const { return i / each * all + head * each + i % each; }
};

static inline int64_t parts_of(const Matrix& a, const Lines& q, int64_t threads) {
  return std::min(std::max<int64_t>(threads / a.heads, 1), q.batch * q.heads / a.heads * q.queries);
}

static inline Task task(const Matrix& a, const Lines& q, int64_t parts, int64_t i) {
  const int64_t each = q.heads / a.heads * q.queries, lines = q.batch * each, part = i % parts;
  return {i / parts, part * lines / parts, (part + 1) * lines / parts, each, q.heads * q.queries};
}

static inline int64_t place(const Lines& q, int64_t line) {
  const int64_t query = line % q.queries, head = line / q.queries % q.heads, b = line / q.queries / q.heads;
  return b * q.at_batch + head * q.at_head + query * q.at_query;
}

constexpr int AT_ONCE = 4;   // rows of S

// to[i, r] = sum_d x[i, d] S[r, d] of n lines, ``line`` apart in ``to``; x [n, dim padded with zeros].
static void dots(const Matrix& a, int64_t head, int64_t n, const float* x, float* to, int64_t line) {
  const int64_t wide = padded(a.dim);
  std::vector<float> rows(AT_ONCE * wide);
  for (int64_t r = 0; r < a.rows; r += AT_ONCE) {
    const int64_t few = std::min<int64_t>(AT_ONCE, a.rows - r);
    for (int64_t k = 0; k < few; k++) features(a, a.data, a.kind, (r + k) * a.row, head, &rows[k * wide]);
    for (int64_t i = 0; i < n; i++) {
      V sum[AT_ONCE] = {};
      for (int64_t d = 0; d < wide; d += LANES) {
        const V v = load(&x[i * wide + d]);
#pragma GCC unroll 4
        for (int k = 0; k < AT_ONCE; k++) sum[k] += v * load(&rows[k * wide + d]);
      }
      const Q found = totals(sum[0], sum[1], sum[2], sum[3]);
      std::memcpy(to + i * line + r, &found, 4 * few);
    }
  }
}

// y[i, d] += sum_r x[i, r] S[r, d] of n lines, ``line`` apart in x; y [n, dim padded].
static void sums(const Matrix& a, int64_t head, int64_t n, const float* x, int64_t line, float* y) {
  const int64_t wide = padded(a.dim);
  std::vector<float> rows(AT_ONCE * wide);
  for (int64_t r = 0; r < a.rows; r += AT_ONCE) {
    const int64_t few = std::min<int64_t>(AT_ONCE, a.rows - r);
    for (int64_t k = 0; k < few; k++) features(a, a.data, a.kind, (r + k) * a.row, head, &rows[k * wide]);
    for (int64_t i = 0; i < n; i++) {
      V by[AT_ONCE] = {};
      for (int64_t k = 0; k < few; k++) by[k] = constant(x[i * line + r + k]);
      for (int64_t d = 0; d < wide; d += LANES) {
        V v = load(&y[i * wide + d]);
#pragma GCC unroll 4
        for (int k = 0; k < AT_ONCE; k++) v += by[k] * load(&rows[k * wide + d]);
        store(&y[i * wide + d], v);
      }
    }
  }
}

// Queries of a task -> what rows' columns meet: ``to`` [lines, width], and what the mean adds to a line's scores.
static void asked(const Matrix& a, const Lines& q, const Task& t, float* to, int64_t width, float* offset) {
  const int64_t wide = padded(a.dim), n = t.last - t.first;
  std::vector<float> x(n * wide), made(a.data ? n * std::max(a.rows, wide) : 0), mean(a.mean ? wide : 0);
  for (int64_t i = 0; i < n; i++) widened(q.data, q.kind, place(q, t.line(t.first + i)), a.dim, &x[i * wide]);
  if (a.mean) {
    features(a, a.mean, a.mean_kind, 0, t.head, mean.data());
    for (int64_t i = 0; i < n; i++) {
      V sum = {};
      for (int64_t d = 0; d < wide; d += LANES) sum += load(&x[i * wide + d]) * load(&mean[d]);
      offset[t.line(t.first + i)] = total(sum);
    }
  }
  const int64_t line = a.data && !a.across ? a.rows : wide;
  if (a.data && a.across) sums(a, t.head, n, x.data(), wide, made.data());
  else if (a.data) dots(a, t.head, n, x.data(), made.data(), line);
  const float* const from = a.data ? made.data() : x.data();
  for (int64_t i = 0; i < n; i++)
    std::memcpy(to + t.line(t.first + i) * width, from + i * line, 4 * (a.data ? a.rows : a.dim));
}

// Means of columns [lines, width] of a task's lines, and how much of each is of tokens -> results.
static void answered(const Matrix& a, const Lines& out, const Task& t, const float* from, int64_t width, const float* share) {
  const int64_t wide = padded(a.dim), n = t.last - t.first;
  std::vector<float> y(n * wide), x, mean(a.mean ? wide : 0);
  if (!a.data) {
    for (int64_t i = 0; i < n; i++) std::memcpy(&y[i * wide], from + i * width, 4 * a.dim);
  } else if (!a.across) {
    sums(a, t.head, n, from, width, y.data());
  } else {
    x.resize(n * wide);
    for (int64_t i = 0; i < n; i++) std::memcpy(&x[i * wide], from + i * width, 4 * a.dim);
    dots(a, t.head, n, x.data(), y.data(), wide);
  }
  if (a.mean) {
    features(a, a.mean, a.mean_kind, 0, t.head, mean.data());
    for (int64_t i = 0; i < n; i++) for (int64_t d = 0; d < wide; d += LANES)
      store(&y[i * wide + d], load(&y[i * wide + d]) + constant(share[i]) * load(&mean[d]));
  }
  for (int64_t i = 0; i < n; i++) narrowed(&y[i * wide], a.dim, out.data, out.kind, place(out, t.line(t.first + i)));
}
