"""Triton source that is the same in all generated modules."""

TANH = '''@triton.jit
def tanh(x):
    """Triton has none of its own on all devices; near 0 the series, where 1 - small would lose digits."""
    square = x * x
    series = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(square < 0.04, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)'''

COMBINE = '''@triton.jit(do_not_specialize=["rows", "splits"])
def combine(
    tops, weights, sums, sink, found, share, rows, splits, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    QUERIES: tl.constexpr, SINK: tl.constexpr, BLIND: tl.constexpr, COLUMNS: tl.constexpr, sink_b, sink_h, sink_s,
):
    """Merges the splits of one query row: found [rows, WIDTH] fp32, the weighted means; share [rows], what of a row's
    weight is tokens' (the rest is a sink's)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.full([1], float("-inf"), tl.float32)
    for i in range(0, splits):
        top = tl.maximum(top, tl.load(tops + i * rows + row))
    if SINK:
        at = (row // (HEADS * QUERIES)) * sink_b + (row // QUERIES % HEADS) * sink_h + (row % QUERIES) * sink_s
        logit = tl.load(sink + at).to(tl.float32)
        top = tl.maximum(top, logit)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([COLUMNS], tl.float32)
    weight = tl.zeros([1], tl.float32)
    for i in range(0, splits):
        part = i * rows + row
        less = tl.exp(tl.load(tops + part) - shift)
        weight += tl.load(weights + part) * less
        total += tl.load(sums + part * WIDTH + c, mask=c < WIDTH, other=0.0) * less
    whole = weight
    if SINK:
        whole += tl.exp(logit - shift)
    if BLIND:
        whole = tl.where(whole == 0.0, 1.0, whole)
    tl.store(found + row * WIDTH + c, total / whole, mask=c < WIDTH)
    tl.store(share + row + tl.arange(0, 1), weight / whole)
'''
