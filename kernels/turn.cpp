// Scores of keys that are turned after their projection (rotary positions, a norm before them), from rows of latents (compiled
// behind runs.cpp). A run of tokens at a time is unpacked, decoded a few features at a time in registers, turned by its tables
// of cosines and sines, and multiplied with the queries of its head: no key is ever in memory.
//
//   y[t, c]   = latent(t) . S[:, c] + mean[c]
//   k[t, i]   = y cos(t, j) - y' sin(t, j),   k[t, i'] = y' cos(t, j) + y sin(t, j)       of the j-th pair of features i, i'
//   score     = q . k    (times 1 / sqrt(mean y^2 + eps) where heads are normed, with its weight on y)

// Features at a time: their sums over a run stay in registers.
#ifdef __AVX512F__
constexpr int FEATURES = 4;
#else
constexpr int FEATURES = 2;
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__)
constexpr bool PRODUCTS = true;                    // of pairs of bf16, summed in fp32
#else
constexpr bool PRODUCTS = false;
#endif

// ``table`` [2 pairs, B or 1, T] (cosines, then sines); ``sources`` [heads, dim] columns of y, and ``dims`` [dim] features of a
// query, pair by pair, then those that are not turned; ``weight`` [dim] as ``dims`` are, or null: heads are normed, ``share``
// being 1 / dim.
struct Turn {
  const void* table; int64_t table_kind, row, batch;      // strides in elements
  const float* weight; float eps, share;
  const int64_t *sources, *dims; int64_t dim, pairs, heads;
};

// Columns of LANES rows, ``stride`` apart -> rows of LANES columns, ``line`` apart: log2 LANES times, halves of blocks change
// places.
template <int STAGE, int... L> static inline void exchanged(V* rows, std::integer_sequence<int, L...> lanes) {
  if constexpr (STAGE < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) if (!(i & STAGE)) {
      const V a = rows[i], b = rows[i + STAGE];
      rows[i] = mixed<(L & STAGE ? LANES + L - STAGE : L)...>(a, b);
      rows[i + STAGE] = mixed<(L & STAGE ? LANES + L : L + STAGE)...>(a, b);
    }
    exchanged<STAGE * 2>(rows, lanes);
  }
}

static inline void transposed(const float* from, int64_t stride, float* to, int64_t line) {
  V rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) rows[i] = load(from + i * stride);
  exchanged<1>(rows, std::make_integer_sequence<int, LANES>{});
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store(to + i * line, rows[i]);
}

// What a call needs once: S as ``words`` [heads, dim / FEATURES, depth, FEATURES] (a number, or two of bf16), means and queries
// [lines, dim] in the same order of features.
struct Turned {
  int64_t count = 0, further = 0, width = 0, depth = 0, dim = 0;
  bool products = false;
  std::vector<uint32_t> words;
  std::vector<float> means, asked;
};

static void turned(const Turn& turn, const Matrix& s, int64_t count, int64_t further, int64_t lines, Turned& t) {
  t.count = count;
  t.further = further;
  t.products = PRODUCTS && s.kind == 1;
  t.width = (count + further + 1) / 2 * 2;
  t.depth = t.products ? t.width / 2 : t.width;
  t.dim = (turn.dim + FEATURES - 1) / FEATURES * FEATURES;
  t.words.resize(turn.heads * t.dim * t.depth);
  t.means.assign(turn.heads * t.dim, 0);
  t.asked.assign(lines * t.dim, 0);
}

// Queries [lines, dim] of some lines in the order of ``dims``.
static inline void turned_lines(const Turn& turn, const float* q, int64_t line, Turned& t) {
  for (int64_t i = 0; i < turn.dim; i++) t.asked[line * t.dim + i] = q[line * turn.dim + turn.dims[i]];
}

// What head h has of S and of the mean.
static void turned_head(const Turn& turn, const Matrix& s, int64_t h, Turned& t) {
  const int64_t rows = t.count + t.further;
  std::fill(&t.words[h * t.dim * t.depth], &t.words[h * t.dim * t.depth] + t.dim * t.depth, 0u);
  for (int64_t i = 0; i < turn.dim; i++) {
    const int64_t c = turn.sources[h * turn.dim + i];
    if (s.mean) t.means[h * t.dim + i] = number(s.mean, s.mean_kind, c);
    uint32_t* const to = t.words.data() + (h * t.dim + i / FEATURES * FEATURES) * t.depth + i % FEATURES;
    if (t.products) {
      const uint16_t* const from = (const uint16_t*)s.data + c;
      for (int64_t r = 0; r < rows; r++) to[r / 2 * FEATURES] |= uint32_t(from[r * s.row]) << (r % 2 * 16);
    } else for (int64_t r = 0; r < rows; r++) {
      const float f = number(s.data, s.kind, r * s.row + c);
      std::memcpy(to + r * FEATURES, &f, 4);
    }
  }
}

// FEATURES features of a head for RUN tokens: sums over ``depth``.
template <bool BY_TWO>
static inline void decoded(const float* latents, int64_t depth, const uint32_t* words, const float* means, V (*out)[VECTORS]) {
  V sum[FEATURES][VECTORS];
#pragma GCC unroll 4
  for (int f = 0; f < FEATURES; f++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sum[f][v] = constant(means[f]);
  for (int64_t r = 0; r < depth; r++) {
    V z[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) z[v] = load(latents + r * RUN + v * LANES);
#pragma GCC unroll 4
    for (int f = 0; f < FEATURES; f++) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
      if (BY_TWO) {
        const __m512i w = _mm512_set1_epi32(int32_t(words[r * FEATURES + f]));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[f][v] = (V)_mm512_dpbf16_ps((__m512)sum[f][v], (__m512bh)z[v], (__m512bh)w);
        continue;
      }
#endif
      float w; std::memcpy(&w, words + r * FEATURES + f, 4);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[f][v] += z[v] * w;
    }
  }
  std::memcpy(out, sum, sizeof(sum));
}

// A thread's room: rows of latents, the same by column, and a run's tables.
struct Room {
  std::vector<float> rows, columns, table;
  Room(const Turned& t, int64_t pairs)
      : rows(RUN * (padded(t.width) + 2 * PAD)), columns((padded(t.width) + PAD) * RUN), table(2 * pairs * RUN + PAD) {}
};

// Scores of RUN tokens or fewer from ``start`` on, of all lines of batch row b, ``line`` apart; zeros behind. ``q``: that row's.
template <bool BY_TWO>
static void turn_run(const Layout& a, const Levels& levels, const Turn& turn, const Turned& t, Room& room, const float* size, const float* second,
                     int64_t b, int64_t start, int64_t tokens, const float* q, float* out, int64_t line) {
  const int64_t stride = padded(t.width) + 2 * PAD, each = turn.heads / a.blocks, lines = a.m / each;
  float *const rows = room.rows.data(), *const columns = room.columns.data(), *const table = room.table.data();
  for (int64_t j = 0; j < 2 * turn.pairs; j++) for (int v = 0; v < VECTORS; v++) {
    const int64_t left = std::min<int64_t>(LANES, tokens - v * LANES);
    const int64_t at = j * turn.row + b * turn.batch + start + v * LANES;
    store(table + j * RUN + v * LANES, left > 0 ? numbers_of(turn.table, turn.table_kind, at, left) : V{});
  }
  for (int64_t g = 0; g < a.blocks; g++) {
    unpack_run(a, levels, t.count, g, b, start, tokens, size, second, rows, stride);
    for (int64_t i = 0; i < tokens; i++) std::fill(rows + i * stride + t.count + t.further, rows + i * stride + t.width, 0.0f);
    for (int64_t i = tokens; i < RUN; i++) std::fill(rows + i * stride, rows + i * stride + t.width, 0.0f);
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    if (BY_TWO) for (int64_t i = 0; i < RUN; i++) for (int64_t c = 0; c < t.width; c += 2 * LANES) {
      float* const at = rows + i * stride + c;
      const __m512bh two = _mm512_cvtne2ps_pbh((__m512)load(at + LANES), (__m512)load(at));
      std::memcpy(at - c / 2, &two, sizeof(two));
    }
#endif
    for (int64_t r = 0; r < t.depth; r += LANES)
      for (int64_t i = 0; i < RUN; i += LANES) transposed(rows + i * stride + r, stride, columns + r * RUN + i, RUN);
    for (int64_t h = g * each; h < (g + 1) * each; h++) {
      float* const scores = out + h * lines * line;
      for (int64_t l = 0; l < lines; l++) std::fill(scores + l * line, scores + l * line + RUN, 0.0f);
      V norm[VECTORS] = {};
      for (int64_t i = 0; i < t.dim; i += FEATURES) {
        V y[FEATURES][VECTORS];
        decoded<BY_TWO>(columns, t.depth, t.words.data() + (h * t.dim + i) * t.depth, t.means.data() + h * t.dim + i, y);
        if (turn.weight) for (int f = 0; f < FEATURES; f++) for (int v = 0; v < VECTORS; v++) {
          norm[v] += y[f][v] * y[f][v];
          y[f][v] *= constant(i + f < turn.dim ? turn.weight[i + f] : 0);
        }
#pragma GCC unroll 2
        for (int f = 0; f < FEATURES; f += 2) if (i + f < 2 * turn.pairs) {
          const float *const cos = table + (i + f) / 2 * RUN, *const sin = cos + turn.pairs * RUN;
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; v++) {
            const V c = load(cos + v * LANES), s = load(sin + v * LANES), first = y[f][v], other = y[f + 1][v];
            y[f][v] = first * c - other * s;
            y[f + 1][v] = other * c + first * s;
          }
        }
        for (int64_t l = 0; l < lines; l++) {
          const float* const asked = q + (h * lines + l) * t.dim + i;
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; v++) {
            V sum = load(scores + l * line + v * LANES);
#pragma GCC unroll 4
            for (int f = 0; f < FEATURES; f++) sum += y[f][v] * asked[f];
            store(scores + l * line + v * LANES, sum);
          }
        }
      }
      if (turn.weight) for (int v = 0; v < VECTORS; v++) {
        V by;
        for (int i = 0; i < LANES; i++) by[i] = 1 / std::sqrt(norm[v][i] * turn.share + turn.eps);
        for (int64_t l = 0; l < lines; l++) store(scores + l * line + v * LANES, load(scores + l * line + v * LANES) * by);
      }
    }
  }
}

// All lines of tokens [start, stop) of batch row b, ``a.line`` apart, which must have room for a RUN behind the last.
static inline void turn_chunk(const Layout& a, const Levels& levels, const Turn& turn, const Turned& t, Room& room, const float* size,
                              const float* second, int64_t b, int64_t start, int64_t stop, const float* q, float* out) {
  for (int64_t at = start; at < stop; at += RUN) {
    const int64_t tokens = std::min<int64_t>(RUN, stop - at), i = at - start;
    (t.products ? turn_run<PRODUCTS> : turn_run<false>)(a, levels, turn, t, room, size + i, second + i, b, at, tokens, q, out + i, a.line);
  }
}
