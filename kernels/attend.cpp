// Attention of a few queries over stored rows in one pass (compiled behind heads.cpp, runs.cpp and turn.cpp): scores of ``chunk``
// tokens, what the graph does to them, an online softmax (Milakov and Gimelshein, arXiv 1805.02867), and sums of values, so
// that nothing of the length of the cache is ever in memory. Each thread has every n-th chunk, and what threads have is merged
// at the end.

// How a query's numbers become weights of planes, and sums over planes become numbers: for each column of a block its place,
// that of its second plane (-1: none) with the worth of its fields, and a level's step and middle (1 and 0 for exact ones).
struct Column { int64_t place, second; float worth, step, half; int32_t unused; };

struct Rows {
  const uint8_t* rows; int64_t tokens, stride_t, stride_b, scale;      // strides in bytes
  const Plane* planes; int64_t n, blocks, width;
  const Column* columns; int64_t count, further;                       // of a block; further: whether there is a second mean
  Levels levels;
};

// What scores pass through, one after the other. ``extra``: which tensor they meet.
enum Kind { MULTIPLY, ADD, TANH, ADD_EXTRA, MULTIPLY_EXTRA, KEEP_WHERE, KEEP_UNLESS };
struct Step { int64_t kind, extra; float constant; int32_t unused; };

// A tensor that scores meet; strides in elements along batch, heads, queries and tokens, 0 where it has one for all.
struct Extra { const void* data; int64_t flags, batch, head, query, token; };

static inline V choose(I mask, V a, V b) { return (V)((mask & (I)a) | (~mask & (I)b)); }

// e^x for x <= 0 (-inf too), relative error below 3e-7 down to 2^-126, and 0 below it: 2^n times a polynomial of degree 6.
static inline V exponential(V x) {
  const I tiny = x < constant(-87.33654f);
  x = choose(tiny, constant(0), x);
  const V t = x * constant(1.44269504f);
  const I n = __builtin_convertvector(t - constant(0.5f), I);      // towards zero: the nearest integer of what is negative
  const V r = x - __builtin_convertvector(n, V) * constant(0.693147181f);
  V p = constant(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + constant(c);
  return choose(tiny, constant(0), p * (V)((n + 127) << 23));
}

// tanh x, absolute error below 2e-7 and relative error below 3e-6.
static inline V tangent(V x) {
  const V size = (V)((I)x & 0x7fffffff), square = x * x;
  const V e = exponential(constant(-2) * size), big = (constant(1) - e) / (constant(1) + e);
  const V small = size * (constant(1) + square * (constant(-1.0f / 3) + square * (constant(2.0f / 15) - square * constant(17.0f / 315))));
  const V found = choose(size < constant(0.15f), small, big);
  return (V)((I)found | ((I)x & int32_t(0x80000000)));
}

// Whether a mask leaves tokens [start, stop) out for all queries of batch row b.
static inline bool hidden(const Extra& e, int64_t b, int64_t queries, int64_t start, int64_t stop) {
  for (int64_t q = 0; q < (e.query ? queries : 1); q++) for (int64_t t = start; t < stop; t++) {
    const int64_t at = b * e.batch + q * e.query + t * e.token;
    if (e.flags ? ((const uint8_t*)e.data)[at] != 0 : ((const float*)e.data)[at] != -INFINITY) return false;
  }
  return true;
}

// The program on ``count`` scores of one query of one head.
static inline void apply(const Step* steps, int64_t n, const Extra* extras, int64_t b, int64_t head, int64_t query,
                         int64_t start, int64_t count, float* s) {
  for (int64_t k = 0; k < n; k++) {
    const Step& step = steps[k];
    if (step.kind < ADD_EXTRA) {
      const V c = constant(step.constant);
      for (int64_t i = 0; i < count; i += LANES) {
        const V v = load(s + i);
        store(s + i, step.kind == MULTIPLY ? v * c : step.kind == ADD ? v + c : tangent(v));
      }
      continue;
    }
    const Extra& e = extras[step.extra];
    const int64_t at = b * e.batch + head * e.head + query * e.query + start * e.token;
    const float* numbers = (const float*)e.data + at;
    const uint8_t* flags = (const uint8_t*)e.data + at;
    const V other = constant(step.constant);
    for (int64_t i = 0; i < count; i += LANES) {
      const int64_t left = count - i < LANES ? count - i : LANES;
      V x = load(s + i), met = {};
      if (step.kind == ADD_EXTRA || step.kind == MULTIPLY_EXTRA) {
        if (e.token == 1) std::memcpy(&met, numbers + i, left == LANES ? sizeof(V) : 4 * left);
        else for (int64_t j = 0; j < left; j++) met[j] = numbers[(i + j) * e.token];
        x = step.kind == ADD_EXTRA ? x + met : x * met;
      } else {
        I flag = {};
        if (e.token == 1) flag = bytes<false>(flags + i, left);
        else for (int64_t j = 0; j < left; j++) flag[j] = flags[(i + j) * e.token];
        const I keep = step.kind == KEEP_WHERE ? flag != 0 : flag == 0;
        x = choose(keep, x, other);
      }
      store(s + i, x);
    }
  }
}

// The largest lane; NaN where a lane is (``bad``).
static inline float largest(V v, I bad) {
  float lanes[LANES];
  int32_t wrong[LANES], any = 0;
  std::memcpy(lanes, &v, sizeof(V));
  std::memcpy(wrong, &bad, sizeof(I));
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  for (int i = 0; i < LANES; i++) any |= wrong[i];
  return any ? NAN : lanes[0];
}

// ``count`` scores (-inf behind) to weights; what was summed before is worth ``less`` of that now. Returns the sum of
// weights.
static inline float soften(float* s, int64_t count, float& top, float& less) {
  V most = constant(top);
  I bad = most != most;
  for (int64_t i = 0; i < count; i += LANES) {
    const V x = load(s + i);
    most = choose(x > most, x, most);
    bad |= x != x;
  }
  const float higher = largest(most, bad);
  const float shift = higher == -INFINITY ? 0.0f : higher;
  less = top == higher ? 1.0f : std::exp(top - shift);
  top = higher;
  V sum = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const V x = load(s + i) - constant(shift);
    V e = exponential(x);
    e = choose(x != x, x, e);
    store(s + i, e);
    sum += e;
  }
  return total(sum);
}

// One thread's sums over its chunks: per line the maximum, weights, and of values what planes hold.
struct Sums { std::vector<float> top, weight, acc, scales, further; };

// One line of q [count + further] -> weights [width], what the middle of levels takes off, and what the second mean adds.
static inline void prepare(const Rows& k, const float* q, float* weights, float& shift, float& further) {
  float off = 0;
  for (int64_t c = 0; c < k.count; c++) {
    const Column& at = k.columns[c];
    const float w = q[c] * at.step;
    weights[at.place] = w;
    if (at.second >= 0) weights[at.second] = w * at.worth;
    off += w * at.half;
  }
  shift = off;
  further = k.further ? q[k.count] : 0;
}

// Means over tokens of one line, ``to`` [count + further]; returns how much of them is of tokens and not of the sink.
static float merged(const Rows& v, bool runs, int64_t held, const std::vector<Sums>& found, int64_t l, const float* sink,
                    bool blind, std::vector<float>& acc, float* to) {
  float top = sink ? *sink : -INFINITY, weight = 0, scales = 0, second = 0;
  for (const Sums& a : found) if (a.top.size()) top = a.top[l] > top || a.top[l] != a.top[l] ? a.top[l] : top;
  const float shifted = top == -INFINITY ? 0.0f : top;
  std::fill(acc.begin(), acc.end(), 0.0f);
  for (const Sums& a : found) {
    if (!a.top.size()) continue;
    const float less = std::exp(a.top[l] - shifted);
    weight += a.weight[l] * less;
    scales += a.scales[l] * less;
    second += a.further[l] * less;
    const float* const from = a.acc.data() + l * held;
    for (int64_t j = 0; j < held; j++) acc[j] += from[j] * less;
  }
  const float whole = weight + (sink ? std::exp(*sink - shifted) : 0.0f);
  const float by = blind && whole == 0 ? 0.0f : 1 / whole;
  if (runs) for (int64_t c = 0; c < v.count + v.further; c++) to[c] = acc[c] * by;
  else for (int64_t c = 0; c < v.count; c++) {
    const Column& at = v.columns[c];
    const float levels = acc[at.place] + (at.second >= 0 ? acc[at.second] * at.worth : 0.0f);
    to[c] = (levels - scales * at.half) * at.step * by;
  }
  if (!runs && v.further) to[v.count] = second * by;
  return weight * by;
}

// ``key`` and ``value``: the codecs' matrices. ``turn``: keys are turned where ``turns``. ``sink`` (or null): a logit per line
// that takes part in the softmax. ``mask`` (or -1): the extra that says which tokens are out.
struct Call {
  Rows keys, values;
  Matrix key, value;
  Turn turn;
  Lines query, out;
  const Step* steps; int64_t n;
  const Extra *extras, *sink;
  int64_t turns, mask, blind, chunk, threads;
};

constexpr int64_t ALONE = 32768;   // numbers of a matrix that one thread reads by itself

static void attend(const Call& o) {
  const Rows &k = o.keys, &v = o.values;
  const Turn* const turn = o.turns ? &o.turn : nullptr;
  const int64_t batch = o.query.batch, heads = o.query.heads, queries = o.query.queries;
  const int64_t chunk = std::max<int64_t>(1, std::min(o.chunk, k.tokens));  // whatever a tuner's file says
  const int64_t lines = heads * queries, every = batch * lines, tokens = k.tokens, chunks = (tokens + chunk - 1) / chunk;
  const int64_t room = turn ? (chunk + RUN - 1) / RUN * RUN : padded(chunk);
  const int64_t wide = turn ? turn->dim : k.count + k.further, each = v.count + v.further;
  const int64_t matrices = std::max(o.key.heads * o.key.dim * o.key.rows, o.value.heads * o.value.dim * o.value.rows);
  const int64_t threads = std::min(o.threads, std::max(batch * chunks, matrices / ALONE + 1));
  const Matrix plain = {nullptr, 0, 0, nullptr, 0, nullptr, o.key.heads, o.key.dim, 0, o.key.dim, 0};
  const Matrix& key = turn ? plain : o.key;
  std::vector<float> weights(turn ? 0 : every * k.width), q(every * wide), shift(every), further(every);
  std::vector<float> offset(key.mean ? every : 0);
  Turned own;
  if (turn) turned(*turn, o.key, k.count, k.further, every, own);
  const Layout left = {k.rows, tokens, batch, k.stride_t, k.stride_b, k.scale, k.planes, k.n, k.blocks, lines / k.blocks,
                       k.width, room};
  const Layout right = {v.rows, tokens, batch, v.stride_t, v.stride_b, v.scale, v.planes, v.n, v.blocks, lines / v.blocks,
                        v.width, room};
  const bool runs = by_runs(right, v.count, right.m);
  const int64_t held = runs ? padded(v.count + v.further) : v.width;
  std::vector<Sums> found(threads);
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    if (turn) {
#pragma omp for schedule(static) nowait
      for (int64_t h = 0; h < turn->heads; h++) turned_head(*turn, o.key, h, own);
    }
    const int64_t parts = parts_of(key, o.query, all);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < key.heads * parts; i++) {
      const Task t = task(key, o.query, parts, i);
      asked(key, o.query, t, q.data(), wide, offset.data());
      for (int64_t j = t.first; j < t.last; j++) {
        const int64_t l = t.line(j);
        if (turn) turned_lines(*turn, q.data(), l, own);
        else prepare(k, &q[l * wide], &weights[l * k.width], shift[l], further[l]);
      }
    }
    Sums& a = found[me];
    a.top.assign(every, -INFINITY);
    a.weight.assign(every, 0);
    a.acc.assign(every * held, 0);
    a.scales.assign(every, 0);
    a.further.assign(every, 0);
    std::vector<float> scores(lines * room), scaled(lines * room), size(room), second(room);
    std::vector<float> rows(runs ? RUN * (held + PAD) + PAD : 0);
    Room latents(own, turn ? turn->pairs : 0);
    float* const p = scores.data();
    for (int64_t i = me; i < batch * chunks; i += all) {
      const int64_t b = i / chunks, start = i % chunks * chunk, stop = start + chunk < tokens ? start + chunk : tokens;
      const int64_t first = b * lines, count = stop - start;
      if (o.mask >= 0 && o.extras[o.mask].head == 0 && hidden(o.extras[o.mask], b, queries, start, stop)) continue;
      scales_of(left, b, start, stop, size.data(), second.data());
      if (turn) turn_chunk(left, k.levels, *turn, own, latents, size.data(), second.data(), b, start, stop,
                           own.asked.data() + first * own.dim, p);
      else score_chunk(left, size.data(), second.data(), b, start, stop, weights.data() + first * k.width,
                       shift.data() + first, further.data() + first, p, scaled.data());
      for (int64_t l = 0; l < lines; l++) {
        float* const s = p + l * room;
        if (key.mean) for (int64_t j = 0; j < count; j++) s[j] += offset[first + l];
        for (int64_t j = count; j < padded(count); j++) s[j] = 0;
        apply(o.steps, o.n, o.extras, b, l / queries, l % queries, start, count, s);
        for (int64_t j = count; j < padded(count); j++) s[j] = -INFINITY;
        float less;
        const float sum = soften(s, count, a.top[first + l], less);
        a.weight[first + l] = a.weight[first + l] * less + sum;
        if (less != 1) {
          a.scales[first + l] *= less;
          a.further[first + l] *= less;
          float* const acc = a.acc.data() + (first + l) * held;
          for (int64_t j = 0; j < held; j++) acc[j] *= less;
        }
      }
      scales_of(right, b, start, stop, size.data(), second.data());
      if (runs) sum_runs(right, v.levels, v.count, held, size.data(), second.data(), b, start, stop, p, rows.data(),
                         a.acc.data() + first * held);
      else sum_chunk(right, size.data(), second.data(), b, start, stop, p, scaled.data(), a.acc.data() + first * held,
                     a.scales.data() + first, a.further.data() + first);
    }
#pragma omp barrier
    const int64_t few = parts_of(o.value, o.out, all);
    std::vector<float> acc(held), means, share;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < o.value.heads * few; i++) {
      const Task t = task(o.value, o.out, few, i);
      means.resize((t.last - t.first) * each);
      share.resize(t.last - t.first);
      for (int64_t j = t.first; j < t.last; j++) {
        const int64_t l = t.line(j), b = l / lines, head = l % lines / queries, query = l % queries;
        const Extra* const s = o.sink;
        const float* const own_sink = s ? (const float*)s->data + b * s->batch + head * s->head + query * s->query : nullptr;
        share[j - t.first] = merged(v, runs, held, found, l, own_sink, o.blind, acc, &means[(j - t.first) * each]);
      }
      answered(o.value, o.out, t, means.data(), each, share.data());
    }
  }
}
