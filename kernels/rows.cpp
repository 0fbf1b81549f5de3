// Products with stored rows, without unpacking them to memory: what attention over rows spends its time on.
//
//   scores   out[b, g, m, t] = scale(b, t) (w[b, g, m] . levels(b, t, g) - shift[b, g, m]) + w'[b, g, m] . exact(b, t, g)
//   sums     acc[b, g, m]   += sum_t p[b, g, m, t] (scale(b, t) levels(b, t, g), exact(b, t, g))
//
// A row is made of planes (packing.py): numbers of the model's dtype, or whole bytes that hold 8, 4, 2 or 1 bits of 1, 2, 4
// or 8 columns each. What a plane holds is linear in its bytes' fields, so a column of 3 bits is two columns, in two planes,
// and the caller lays the weights out plane by plane, field by field, each run padded to PAD. A block g of a row is a head
// where nothing is projected: some bytes of a plane in one of its fields, or all of its bytes in some fields.

// kind: 0 fp32, 1 bf16, 2 fp16, else 8 + the bits of a field; ``offset`` in the row; ``step`` between blocks that lie beside
// one another, of which there are ``beside``; ``count`` of elements (bytes of a quantised plane) and ``fields`` in a block;
// ``at``: where its weights begin.
struct Plane { int64_t kind, offset, step, beside, count, fields, at; };

// Where a row's last plane ends.
static inline int64_t row_bytes(const Plane* planes, int64_t n) {
  int64_t end = 0;
  for (int64_t k = 0; k < n; k++) {
    const Plane& p = planes[k];
    end = std::max(end, p.offset + (p.beside - 1) * p.step + p.count * (p.kind == 0 ? 4 : p.kind <= 2 ? 2 : 1));
  }
  return end;
}

struct Layout {
  const uint8_t* rows; int64_t tokens, batch, stride_t, stride_b;      // strides in bytes
  int64_t scale;                                                       // offset of the fp16 scale, -1 where there is none
  const Plane* planes; int64_t n, blocks, m, width;                    // m weight vectors of ``width`` floats per block
  int64_t line;                                                        // between the scores of two weight vectors
  int64_t end = row_bytes(planes, n);
  bool exact = n > 0 && planes[0].kind <= 2;                           // planes of numbers come first
};

template <int KIND> constexpr int size_of = KIND == 0 ? 4 : KIND <= 2 ? 2 : 1;

// How many elements to read for the last ``count`` of a run: what comes behind may be read as well up to ``end``, if it is bytes.
// It meets weights of zero, or is never looked at.
template <int KIND> static inline int64_t readable(int64_t end, int64_t at, int64_t count) {
  return KIND > 8 && at + LANES <= end ? LANES : count;
}

// Up to where rows [.., t) may be read, from the begin of each: the next one's bytes as well.
static inline int64_t bytes_of(const Layout& a, int64_t t) { return t < a.tokens ? a.end + a.stride_t : a.end; }

// LANES columns (or the last few) of NT rows of a plane, from element j on: of numbers, or as bytes.
template <int KIND, int NT>
__attribute__((always_inline)) static inline void take(const uint8_t* const* rows, int64_t at, int64_t c, I* raw, V* x) {
#pragma GCC unroll 8
  for (int t = 0; t < NT; t++)
    if (KIND > 8) raw[t] = bytes<KIND == 16>(rows[t] + at, c); else x[t] = numbers<KIND>(rows[t] + at, c);
}

// Dot products of NT rows with NM weight vectors over one plane of block g. The sums are copied, so that they stay in
// registers, and whole vectors are apart from what is left: else GCC 12 keeps the sums on the stack.
template <int KIND, int NT, int NM>
static inline void dot_plane(const uint8_t* const* rows, const float* w, const Layout& a, int64_t end, const Plane& p,
                             int64_t g, V (*total)[NM]) {
  const int64_t base = p.offset + g % p.beside * p.step, run = padded(p.count), first = g / p.beside * p.fields;
  const int64_t fields = KIND <= 2 || KIND == 16 ? 1 : p.fields, count = p.count, whole = count / LANES * LANES;
  V sum[NT][NM];
  std::memcpy(sum, total, sizeof(sum));
  auto part = [&](int64_t j, int64_t c) __attribute__((always_inline)) {
    I raw[NT];
    V x[NT];
    take<KIND, NT>(rows, base + j * size_of<KIND>, c, raw, x);
    for (int64_t f = 0; f < fields; f++) {
      if (KIND > 8) {
#pragma GCC unroll 8
        for (int t = 0; t < NT; t++) x[t] = field<KIND - 8>(raw[t], first + f);
      }
#pragma GCC unroll 4
      for (int m = 0; m < NM; m++) {
        const V weight = load(w + m * a.width + p.at + f * run + j);
#pragma GCC unroll 8
        for (int t = 0; t < NT; t++) sum[t][m] += weight * x[t];
      }
    }
  };
  for (int64_t j = 0; j < whole; j += LANES) part(j, LANES);
  if (whole < count) part(whole, readable<KIND>(end, base + whole, count - whole));
  std::memcpy(total, sum, sizeof(sum));
}

// Over the planes of numbers (or, FIELDS, of fields) of block g: apart, because the sums of both would not fit the registers.
template <bool FIELDS, int NT, int NM>
static inline void dots(const uint8_t* const* rows, const float* w, const Layout& a, int64_t end, int64_t g,
                        float (*out)[NT]) {
  V sum[NT][NM] = {};
  for (int64_t k = 0; k < a.n; k++) {
    const Plane& p = a.planes[k];
    if (FIELDS) switch (p.kind) {
      case 16: dot_plane<16, NT, NM>(rows, w, a, end, p, g, sum); break;
      case 12: dot_plane<12, NT, NM>(rows, w, a, end, p, g, sum); break;
      case 10: dot_plane<10, NT, NM>(rows, w, a, end, p, g, sum); break;
      case 9: dot_plane<9, NT, NM>(rows, w, a, end, p, g, sum); break;
    } else switch (p.kind) {
      case 0: dot_plane<0, NT, NM>(rows, w, a, end, p, g, sum); break;
      case 1: dot_plane<1, NT, NM>(rows, w, a, end, p, g, sum); break;
      case 2: dot_plane<2, NT, NM>(rows, w, a, end, p, g, sum); break;
    }
  }
  for (int m = 0; m < NM; m++) {
    if (NT < 4) for (int t = 0; t < NT; t++) out[m][t] = total(sum[t][m]);
    else for (int t = 0; t + 3 < NT; t += 4) {
      const Q four = totals(sum[t][m], sum[t + 1][m], sum[t + 2][m], sum[t + 3][m]);
      std::memcpy(out[m] + t, &four, sizeof(Q));
    }
  }
}

constexpr int CHUNK = 64;   // tokens whose rows stay in the first cache while all blocks of them are read


// Of tokens [start, stop): their scales (1 where rows have none), and 1 for those with the second mean; zeros behind.
static inline void scales_of(const Layout& a, int64_t b, int64_t start, int64_t stop, float* size, float* second) {
  for (int64_t t = start; t < stop; t++) {
    uint16_t h = 0x3c00;
    if (a.scale >= 0) std::memcpy(&h, a.rows + t * a.stride_t + b * a.stride_b + a.scale, 2);
    size[t - start] = half_to_float(h & 0x7fff);
    second[t - start] = h >> 15;
  }
  for (int64_t i = stop - start; i < padded(stop - start); i++) size[i] = second[i] = 0;
}

// ``w``, ``levels`` and ``exact``: of the first line of batch row b, the latter two at this token.
template <int NT, int NM>
static inline void score_some(const Layout& a, int64_t b, int64_t g, int64_t t, int64_t m, const float* w, float* levels,
                              float* exact) {
  const uint8_t* rows[NT];
  for (int i = 0; i < NT; i++) rows[i] = a.rows + (t + i) * a.stride_t + b * a.stride_b;
  float found[NM][NT];
  const int64_t line = g * a.m + m;
  if (a.exact) {
    dots<false, NT, NM>(rows, w + line * a.width, a, bytes_of(a, t + NT), g, found);
    for (int k = 0; k < NM; k++) std::memcpy(exact + (line + k) * a.line, found[k], sizeof(found[k]));
  }
  if (a.scale >= 0) {
    dots<true, NT, NM>(rows, w + line * a.width, a, bytes_of(a, t + NT), g, found);
    for (int k = 0; k < NM; k++) std::memcpy(levels + (line + k) * a.line, found[k], sizeof(found[k]));
  }
}

template <int NT>
static inline void score_all(const Layout& a, int64_t b, int64_t g, int64_t t, const float* w, float* levels, float* exact) {
  int64_t m = 0;
  if (4 * NT <= SUMS) for (; m + 4 <= a.m; m += 4) score_some<NT, 4>(a, b, g, t, m, w, levels, exact);   // in registers
  if (2 * NT <= SUMS) for (; m + 2 <= a.m; m += 2) score_some<NT, 2>(a, b, g, t, m, w, levels, exact);
  for (; m < a.m; m++) score_some<NT, 1>(a, b, g, t, m, w, levels, exact);
}

// ``tiles(g, t, stop)`` for all blocks of tokens [start, stop): block by block where rows lie close to one another, and else
// (several texts, long rows) a few whole rows after the other: nothing fetches them ahead, and what lies far apart evenly has
// few places in the first cache (rows of 1 KiB: 2.4 times as fast so).
template <typename F> static inline void each_block(const Layout& a, int64_t start, int64_t stop, F tiles) {
  const int64_t few = a.stride_t >= 2 * a.end || a.end > 384 ? 8 : stop - start;
  for (int64_t t = start; t < stop; t += few)
    for (int64_t g = 0; g < a.blocks; g++) tiles(g, t, std::min(t + few, stop));
}

// Scores of all blocks of tokens [start, stop) of batch row b, ``a.line`` apart, into ``out`` (``exact``: as much room).
// ``w``, ``shift`` and ``further`` are those of batch row b.
static inline void score_chunk(const Layout& a, const float* size, const float* second, int64_t b, int64_t start, int64_t stop,
                               const float* w, const float* shift, const float* further, float* out, float* exact) {
  if (a.scale < 0) exact = out;
  each_block(a, start, stop, [&](int64_t g, int64_t t, int64_t end) {
    if (a.m == 1) for (; t + 8 <= end; t += 8) score_all<8>(a, b, g, t, w, out + (t - start), exact + (t - start));
    for (; t + 4 <= end; t += 4) score_all<4>(a, b, g, t, w, out + (t - start), exact + (t - start));
    for (; t < end; t++) score_all<1>(a, b, g, t, w, out + (t - start), exact + (t - start));
  });
  if (a.scale < 0) return;
  for (int64_t l = 0; l < a.blocks * a.m; l++) for (int64_t i = 0; i < stop - start; i += LANES) {
    float* const at = out + l * a.line + i;
    V x = load(size + i) * (load(at) - constant(shift[l])) + load(second + i) * constant(further[l]);
    if (a.exact) x += load(exact + l * a.line + i);
    store(at, x);
  }
}

// weights [B, blocks, m, width], shift and further [B, blocks, m] -> out [B, blocks, m, T]
extern "C" void lorc_scores(const uint8_t* rows, int64_t tokens, int64_t batch, int64_t stride_t, int64_t stride_b,
                            int64_t scale, const Plane* planes, int64_t n, int64_t blocks, int64_t m, int64_t width,
                            const float* weights, const float* shift, const float* further, float* out, int64_t threads) {
  const Layout a = {rows, tokens, batch, stride_t, stride_b, scale, planes, n, blocks, m, width, CHUNK};
  const int64_t chunks = (tokens + CHUNK - 1) / CHUNK, each_b = blocks * m;
#pragma omp parallel num_threads(threads)
  {
    float size[CHUNK], second[CHUNK];
    std::vector<float> found(each_b * CHUNK), exact(each_b * CHUNK);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; i++) {
      const int64_t start = i * CHUNK, stop = start + CHUNK < tokens ? start + CHUNK : tokens;
      for (int64_t b = 0; b < batch; b++) {
        const int64_t first = b * each_b;
        scales_of(a, b, start, stop, size, second);
        score_chunk(a, size, second, b, start, stop, weights + first * width, shift + first, further + first, found.data(),
                    exact.data());
        for (int64_t l = 0; l < each_b; l++)
          std::memcpy(out + (first + l) * tokens + start, &found[l * CHUNK], 4 * (stop - start));
      }
    }
  }
}

template <int NT>
static inline void add(const Layout& a, const V* x, const float* weight, float* place) {
  for (int64_t m = 0; m < a.m; m++, weight += a.line, place += a.width) {
    V sum = load(place);
    for (int i = 0; i < NT; i++) sum += x[i] * weight[i];
    store(place, sum);
  }
}

template <int KIND, int NT>
static inline void sum_plane(const Layout& a, int64_t end, const uint8_t* const* rows, const Plane& p, int64_t g,
                             const float* weight, float* place) {
  const int64_t base = p.offset + g % p.beside * p.step, run = padded(p.count), first = g / p.beside * p.fields;
  const int64_t fields = KIND <= 2 || KIND == 16 ? 1 : p.fields, count = p.count, whole = count / LANES * LANES;
  auto part = [&](int64_t j, int64_t c) __attribute__((always_inline)) {
    I raw[NT];
    V x[NT];
    take<KIND, NT>(rows, base + j * size_of<KIND>, c, raw, x);
    for (int64_t f = 0; f < fields; f++) {
      if (KIND > 8) {
#pragma GCC unroll 8
        for (int i = 0; i < NT; i++) x[i] = field<KIND - 8>(raw[i], first + f);
      }
      add<NT>(a, x, weight, place + p.at + f * run + j);
    }
  };
  for (int64_t j = 0; j < whole; j += LANES) part(j, LANES);
  if (whole < count) part(whole, readable<KIND>(end, base + whole, count - whole));
}

// Adds NT rows, weighted, to the sums of one block. ``p``: at this token's weight of the first line of batch row b, and the
// sums are those of batch row b; ``scaled``: the same times the token's scale.
template <int NT>
static inline void sum_some(const Layout& a, int64_t b, int64_t g, int64_t t, const float* p, const float* scaled,
                            float* acc) {
  const uint8_t* rows[NT];
  for (int i = 0; i < NT; i++) rows[i] = a.rows + (t + i) * a.stride_t + b * a.stride_b;
  const int64_t end = bytes_of(a, t + NT);
  const float *exact = p + g * a.m * a.line, *levels = scaled + g * a.m * a.line;
  float* place = acc + g * a.m * a.width;
  for (int64_t k = 0; k < a.n; k++) switch (a.planes[k].kind) {
    case 16: sum_plane<16, NT>(a, end, rows, a.planes[k], g, levels, place); break;
    case 12: sum_plane<12, NT>(a, end, rows, a.planes[k], g, levels, place); break;
    case 10: sum_plane<10, NT>(a, end, rows, a.planes[k], g, levels, place); break;
    case 9: sum_plane<9, NT>(a, end, rows, a.planes[k], g, levels, place); break;
    case 0: sum_plane<0, NT>(a, end, rows, a.planes[k], g, exact, place); break;
    case 1: sum_plane<1, NT>(a, end, rows, a.planes[k], g, exact, place); break;
    case 2: sum_plane<2, NT>(a, end, rows, a.planes[k], g, exact, place); break;
  }
}

// All blocks of tokens [start, stop) of batch row b. ``p``: weights, zeros behind; ``scaled``: room for as many numbers, as far
// apart.
static inline void sum_chunk(const Layout& a, const float* size, const float* second, int64_t b, int64_t start, int64_t stop,
                             const float* p, float* scaled, float* acc, float* scales, float* further) {
  for (int64_t l = 0; l < a.blocks * a.m; l++) {
    V sum = {}, others = {};
    for (int64_t i = 0; i < stop - start; i += LANES) {
      const V weight = load(p + l * a.line + i), by = weight * load(size + i);
      store(scaled + l * a.line + i, by);
      sum += by;
      others += weight * load(second + i);
    }
    scales[l] += total(sum);
    further[l] += total(others);
  }
  each_block(a, start, stop, [&](int64_t g, int64_t t, int64_t end) {
    for (; t + 8 <= end; t += 8) sum_some<8>(a, b, g, t, p + (t - start), scaled + (t - start), acc);
    for (; t < end; t++) sum_some<1>(a, b, g, t, p + (t - start), scaled + (t - start), acc);
  });
}

// p [B, blocks, m, T] -> acc [threads, B, blocks, m, width], and [threads, B, blocks, m] the sums of p scale and of p where a
// token has the second mean; all must be zero before, and are to be added up over threads.
extern "C" void lorc_sums(const uint8_t* rows, int64_t tokens, int64_t batch, int64_t stride_t, int64_t stride_b,
                          int64_t scale, const Plane* planes, int64_t n, int64_t blocks, int64_t m, int64_t width,
                          const float* p, float* acc, float* scales, float* further, int64_t threads) {
  const Layout a = {rows, tokens, batch, stride_t, stride_b, scale, planes, n, blocks, m, width, CHUNK};
  const int64_t each_b = blocks * m, lines = batch * each_b;
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t each = (tokens + all - 1) / all;
    const int64_t start = me * each, stop = start + each < tokens ? start + each : tokens;
    float *mine = acc + me * lines * width, *s = scales + me * lines, *f = further + me * lines;
    float size[CHUNK], second[CHUNK];
    std::vector<float> weights(each_b * CHUNK), scaled(each_b * CHUNK);
    for (int64_t at = start; at < stop; at += CHUNK) {
      const int64_t end = at + CHUNK < stop ? at + CHUNK : stop;
      for (int64_t b = 0; b < batch; b++) {
        const int64_t first = b * each_b;
        for (int64_t l = 0; l < each_b; l++) {
          std::memcpy(&weights[l * CHUNK], p + (first + l) * tokens + at, 4 * (end - at));
          std::fill(&weights[l * CHUNK] + (end - at), &weights[l * CHUNK] + CHUNK, 0.0f);
        }
        scales_of(a, b, at, end, size, second);
        sum_chunk(a, size, second, b, at, end, weights.data(), scaled.data(), mine + first * width, s + first, f + first);
      }
    }
  }
}
