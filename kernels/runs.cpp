// Runs of tokens as numbers, column by column: for what meets them several times over (compiled behind rows.cpp).

// Where a plane's columns are among a block's, and what its fields count.
struct Part { int64_t first; float worth; int32_t unused; };

// How a block's levels become numbers: step and half are 1 and 0 of exact ones, which are ``numbers``, else 0. All padded.
struct Levels { const Part* parts; const float *step, *half, *numbers; };

// One plane of block g of tokens from ``start`` on, to where its columns are in ``to`` [tokens, stride].
template <int KIND>
static inline void spread(const Layout& a, const Plane& p, const Part& part, int64_t g, int64_t b, int64_t start,
                          int64_t tokens, float* to, int64_t stride) {
  const int64_t base = p.offset + g % p.beside * p.step, first = g / p.beside * p.fields;
  const int64_t fields = KIND <= 2 || KIND == 16 ? 1 : p.fields;
  const uint8_t* const rows = a.rows + start * a.stride_t + b * a.stride_b;
  for (int64_t j = (p.count - 1) / LANES * LANES; j >= 0; j -= LANES) {   // the last ones first, see below
    const int64_t left = std::min<int64_t>(LANES, p.count - j), at = base + j * size_of<KIND>;
    I lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i < left ? -1 : 0;
    // Token by token for each field: a token's own places overlap, and would wait for one another. Behind a field's last
    // column are others, which are yet to come; to those of lower planes nothing is added.
    auto from_to = [&](int64_t i, int64_t end, int64_t c) __attribute__((always_inline)) {
      for (int64_t f = 0; f < fields; f++) {
        const uint8_t* from = rows + i * a.stride_t + at;
        float* place = to + i * stride + part.first + f * p.count + j;
        if (KIND <= 2) for (int64_t n = i; n < end; n++, from += a.stride_t, place += stride) store(place, numbers<KIND>(from, left));
        else if (part.worth == 1) for (int64_t n = i; n < end; n++, from += a.stride_t, place += stride)
          store(place, field<KIND - 8>(bytes<KIND == 16>(from, c), first + f));
        else for (int64_t n = i; n < end; n++, from += a.stride_t, place += stride)
          store(place, load(place) + constant(part.worth) * field<KIND - 8>(lanes & bytes<KIND == 16>(from, c), first + f));
      }
    };
    const int64_t whole = at + LANES <= a.end ? tokens : at + LANES <= a.end + a.stride_t ? tokens - (start + tokens == a.tokens) : 0;
    from_to(0, whole, LANES);                                            // (of a token that is not the last)
    from_to(whole, tokens, left);
  }
}

// Block g of tokens [start, start + tokens) of batch row b -> ``to`` [tokens, stride] in fp32: ``count`` columns, and 1 where
// a token has the second mean. What is behind them is a number.
static inline void unpack_run(const Layout& a, const Levels& levels, int64_t count, int64_t g, int64_t b, int64_t start,
                              int64_t tokens, const float* size, const float* second, float* to, int64_t stride) {
  auto one = [&](auto kind, int64_t k) __attribute__((always_inline)) {
    spread<decltype(kind)::value>(a, a.planes[k], levels.parts[k], g, b, start, tokens, to, stride);
  };
  for (int64_t k = 0; k < a.n; k++) switch (a.planes[k].kind) {
    case 16: one(std::integral_constant<int, 16>(), k); break;
    case 12: one(std::integral_constant<int, 12>(), k); break;
    case 10: one(std::integral_constant<int, 10>(), k); break;
    case 9: one(std::integral_constant<int, 9>(), k); break;
    case 0: one(std::integral_constant<int, 0>(), k); break;
    case 1: one(std::integral_constant<int, 1>(), k); break;
    case 2: one(std::integral_constant<int, 2>(), k); break;
  }
  for (int64_t c = 0; c < count; c += LANES) {
    const V half = load(levels.half + c), exact = load(levels.step + c) * load(levels.numbers + c);
    const V step = load(levels.step + c) - exact;
    for (int64_t i = 0; i < tokens; i++) {
      float* const at = to + i * stride + c;
      store(at, (load(at) - half) * (exact + step * size[i]));
    }
  }
  for (int64_t i = 0; i < tokens; i++) to[i * stride + count] = second[i];
}

// Tokens at a time, as vectors; and vectors of columns whose sums stay in registers, for four lines at once.
constexpr int VECTORS = 4, RUN = VECTORS * LANES;
#ifdef __AVX512F__
constexpr int WIDE = 4;
#else
constexpr int WIDE = 2;
#endif

// Whether unpacking values first is less work than meeting ``lines`` of a block with planes as they are, where runs of a few bytes
// waste lanes and fields of further bits are columns of their own. In cycles of a vector (AMD Zen 4): 3.7 and 0.83 for each line
// as they are, 4.8 and 0.5 to unpack, and then 1.1 for each line.
static inline bool by_runs(const Layout& a, int64_t columns, int64_t lines) {
  const float held = float(a.width), whole = float(padded(columns)), m = float(lines);
  return held * (3.7f + 0.83f * m) > 4.8f * held + whole * (0.5f + 1.1f * m);
}

// NM lines' weights p [NM, line] times rows [tokens, stride], added to acc [NM, width].
template <int NM>
static inline void sum_rows(const float* rows, int64_t stride, int64_t tokens, const float* p, int64_t line, float* acc,
                            int64_t width) {
  auto part = [&](auto wide, int64_t c) __attribute__((always_inline)) {
    constexpr int N = decltype(wide)::value;
    V sum[NM][N];
#pragma GCC unroll 4
    for (int m = 0; m < NM; m++)
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) sum[m][v] = load(acc + m * width + c + v * LANES);
    for (int64_t i = 0; i < tokens; i++) {
      V x[N];
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) x[v] = load(rows + i * stride + c + v * LANES);
#pragma GCC unroll 4
      for (int m = 0; m < NM; m++) {
        const float weight = p[m * line + i];
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) sum[m][v] += x[v] * weight;
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < NM; m++)
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) store(acc + m * width + c + v * LANES, sum[m][v]);
  };
  int64_t c = 0;
  for (; c + WIDE * LANES <= width; c += WIDE * LANES) part(std::integral_constant<int, WIDE>(), c);
  for (; c < width; c += LANES) part(std::integral_constant<int, 1>(), c);
}

// All lines of tokens [start, stop) of batch row b: weights p, ``a.line`` apart, times numbers, added to acc [lines, width];
// ``rows``: room for RUN tokens of ``width`` and PAD.
static inline void sum_runs(const Layout& a, const Levels& levels, int64_t columns, int64_t width, const float* size,
                            const float* second, int64_t b, int64_t start, int64_t stop, const float* p, float* rows, float* acc) {
  const int64_t stride = width + PAD;
  for (int64_t at = start; at < stop; at += RUN) {
    const int64_t tokens = std::min<int64_t>(RUN, stop - at), i = at - start;
    for (int64_t g = 0; g < a.blocks; g++) {
      unpack_run(a, levels, columns, g, b, at, tokens, size + i, second + i, rows, stride);
      const float* weights = p + g * a.m * a.line + i;
      float* place = acc + g * a.m * width;
      int64_t m = 0;
      for (; m + 4 <= a.m; m += 4) sum_rows<4>(rows, stride, tokens, weights + m * a.line, a.line, place + m * width, width);
      for (; m < a.m; m++) sum_rows<1>(rows, stride, tokens, weights + m * a.line, a.line, place + m * width, width);
    }
  }
}
