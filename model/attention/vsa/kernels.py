"""Triton kernels of video sparse attention. One program works on one tile of one head, in a fixed order and without
atomics: results are the same bits at every run. Launched by model/attention/vsa/fused.py, which has the shapes.

Scores are scaled in fp32 after the product: a key scaled in bf16 would be rounded twice, its gradient too.
DOT is the dtype of the products' operands: their own, but fp32 in Triton's interpreter, which has no product in bf16;
what is rounded to bf16 before a product is rounded there too. tf32x3 concerns fp32 operands: three products of the
tensor cores that add up to fp32's accuracy.
Imported without triton, the kernels stay plain functions that nothing calls.

B batch  N heads  D head dim  n query tiles  m key tiles  T slots of a tile  K kept key tiles
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:

    def jit(function: Any) -> Any:
        return function


@jit
def tile_kernel(
    x, x_b, x_l, x_n, tokens, counts, tiles, means, heads, D: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Tokens -> one padded tile [T, D] and the mean of its valid tokens, fp32 [D]."""
    tile, row = tl.program_id(0), tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    place = row.to(tl.int64) * tl.num_programs(0) + tile
    slots, cols = tl.arange(0, T), tl.arange(0, D)
    token = tl.load(tokens + tile * T + slots).to(tl.int64)[:, None]
    source = x + batch * x_b + token * x_l + head * x_n + cols[None, :]
    values = tl.load(source, mask=token >= 0, other=0.0)
    tl.store(tiles + (place * T + slots[:, None]) * D + cols[None, :], values)
    mean = tl.sum(values.to(tl.float32), 0) / tl.load(counts + tile)
    tl.store(means + place * D + cols, mean)


@jit
def untile_kernel(
    d_tiles, d_means, tokens, counts, dx, heads, length, D: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Backward of tile_kernel: each token's gradient is its slot's plus its share of the mean's."""
    tile, row = tl.program_id(0), tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    place = row.to(tl.int64) * tl.num_programs(0) + tile
    slots, cols = tl.arange(0, T), tl.arange(0, D)
    token = tl.load(tokens + tile * T + slots).to(tl.int64)[:, None]
    share = tl.load(d_means + place * D + cols) / tl.load(counts + tile)
    direct = tl.load(d_tiles + (place * T + slots[:, None]) * D + cols[None, :]).to(tl.float32)
    target = dx + ((batch * length + token) * heads + head) * D + cols[None, :]
    tl.store(target, direct + share[None, :], mask=token >= 0)


@jit
def select_kernel(scores, chosen, rows, m, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The K highest of each row of m fp32 scores, as ascending indices; ties go to the lower index.

    A row's K-th highest is found bit by bit, over the scores' bits: they order as integers once negatives are flipped.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (cols < m)
    score = tl.load(scores + row.to(tl.int64) * m + cols, mask=inside, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 and 0 are a tie
    order = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)
    threshold = tl.full([ROWS, 1], 0, tl.int32)  # its highest bit the other way round than in `order`
    for step in range(32):
        higher = threshold | (tl.full([ROWS, 1], 1, tl.int32) << (31 - step))
        enough = tl.sum((order >= (higher ^ -0x80000000)).to(tl.int32), 1, keep_dims=True) >= K
        threshold = tl.where(enough, higher, threshold)
    threshold = threshold ^ -0x80000000
    above = (order > threshold).to(tl.int32)
    tied = (order == threshold).to(tl.int32)
    room = K - tl.sum(above, 1, keep_dims=True)
    taken = (above > 0) | ((tied > 0) & (tl.cumsum(tied, 1) <= room))
    place = row.to(tl.int64) * K + tl.cumsum(taken.to(tl.int32), 1) - 1
    tl.store(chosen + place, cols.to(tl.int32) + row * 0, mask=taken & inside)


@jit
def attend_kernel(
    q, k, v, chosen, counts, tokens, coarse, gate, g_b, g_l, g_n, fine, logsum, out, scale, heads, length, m, K,
    D: tl.constexpr, T: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """One query tile over its K kept key tiles: O_f, the logarithm (base 2) of its normaliser, O_f + gate * O_c."""
    tile, row = tl.program_id(0), tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    place = row.to(tl.int64) * tl.num_programs(0) + tile
    slots, cols = tl.arange(0, T), tl.arange(0, D)
    block = slots[:, None] * D + cols[None, :]
    query = tl.load(q + place * T * D + block)
    highest = tl.full([T], float("-inf"), tl.float32)
    total = tl.full([T], 0.0, tl.float32)
    acc = tl.full([T, D], 0.0, tl.float32)
    scale_2 = scale * 1.4426950408889634  # exp(x) = 2^(x log2 e)
    for i in range(K):
        other = tl.load(chosen + place * K + i)
        start = (row.to(tl.int64) * m + other) * T * D
        key = tl.load(k + start + block)
        score = tl.dot(query.to(DOT), tl.trans(key).to(DOT), input_precision="tf32x3") * scale_2
        score = tl.where(slots[None, :] < tl.load(counts + other), score, float("-inf"))
        new = tl.maximum(highest, tl.max(score, 1))  # a tile has a valid token: never -inf
        weight = tl.exp2(score - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(v + start + block)
        acc = acc * shrink[:, None] + tl.dot(weight.to(value.dtype).to(DOT), value.to(DOT), input_precision="tf32x3")
        highest = new
    acc = acc / total[:, None]
    tl.store(fine + place * T * D + block, acc)
    tl.store(logsum + place * T + slots, highest + tl.log2(total))
    token = tl.load(tokens + tile * T + slots).to(tl.int64)[:, None]
    inside = token >= 0
    gates = tl.load(gate + batch * g_b + token * g_l + head * g_n + cols[None, :], mask=inside, other=0.0)
    acc += gates.to(tl.float32) * tl.load(coarse + place * D + cols)[None, :]
    tl.store(out + ((batch * length + token) * heads + head) * D + cols[None, :], acc, mask=inside)


@jit
def gate_backward_kernel(
    d_out, o_b, o_l, o_n, fine, coarse, gate, g_b, g_l, g_n, tokens, d_fine, delta, d_gate, d_coarse, heads, length,
    D: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Backward of the sum: dO as a tile, delta = sum over D of O_f dO, d gate = dO O_c, d O_c = sum of gate dO."""
    tile, row = tl.program_id(0), tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    place = row.to(tl.int64) * tl.num_programs(0) + tile
    slots, cols = tl.arange(0, T), tl.arange(0, D)
    block = slots[:, None] * D + cols[None, :]
    token = tl.load(tokens + tile * T + slots).to(tl.int64)[:, None]
    inside = token >= 0
    upstream = tl.load(d_out + batch * o_b + token * o_l + head * o_n + cols[None, :], mask=inside, other=0.0)
    tl.store(d_fine + place * T * D + block, upstream)  # zero in padding: what padded queries hold adds nothing
    upstream = upstream.to(tl.float32)
    output = tl.load(fine + place * T * D + block).to(tl.float32)
    tl.store(delta + place * T + slots, tl.sum(output * upstream, 1))
    gates = tl.load(gate + batch * g_b + token * g_l + head * g_n + cols[None, :], mask=inside, other=0.0)
    tl.store(d_coarse + place * D + cols, tl.sum(gates.to(tl.float32) * upstream, 0))
    means = tl.load(coarse + place * D + cols)[None, :]
    tl.store(d_gate + ((batch * length + token) * heads + head) * D + cols[None, :], upstream * means, mask=inside)


@jit
def d_query_kernel(
    q, k, v, chosen, counts, d_fine, logsum, delta, dq, scale, m, K, D: tl.constexpr, T: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """dQ of one query tile: P = 2^(S - logsum), dS = P (dO V^T - delta), dQ = scale dS K over its kept tiles."""
    tile, row = tl.program_id(0), tl.program_id(1)
    place = row.to(tl.int64) * tl.num_programs(0) + tile
    slots, cols = tl.arange(0, T), tl.arange(0, D)
    block = slots[:, None] * D + cols[None, :]
    query = tl.load(q + place * T * D + block)
    upstream = tl.load(d_fine + place * T * D + block)
    normaliser = tl.load(logsum + place * T + slots)[:, None]
    shift = tl.load(delta + place * T + slots)[:, None]
    acc = tl.full([T, D], 0.0, tl.float32)
    scale_2 = scale * 1.4426950408889634
    for i in range(K):
        other = tl.load(chosen + place * K + i)
        start = (row.to(tl.int64) * m + other) * T * D
        key = tl.load(k + start + block)
        value = tl.load(v + start + block)
        score = tl.dot(query.to(DOT), tl.trans(key).to(DOT), input_precision="tf32x3") * scale_2
        score = tl.where(slots[None, :] < tl.load(counts + other), score, float("-inf"))
        weight = tl.exp2(score - normaliser)
        d_weight = tl.dot(upstream.to(DOT), tl.trans(value).to(DOT), input_precision="tf32x3")
        d_score = weight * (d_weight - shift)
        acc += tl.dot(d_score.to(key.dtype).to(DOT), key.to(DOT), input_precision="tf32x3")
    tl.store(dq + place * T * D + block, acc * scale)


@jit
def d_key_value_kernel(
    q, k, v, readers, offsets, counts, d_fine, logsum, delta, dk, dv, scale, n, K,
    D: tl.constexpr, T: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """dK and dV of one key tile over the query tiles that kept it, transposed: dV = P^T dO, dK = scale dS^T Q."""
    tile, row = tl.program_id(0), tl.program_id(1)
    m = tl.num_programs(0)
    place = row.to(tl.int64) * m + tile
    slots, cols = tl.arange(0, T), tl.arange(0, D)
    block = slots[:, None] * D + cols[None, :]
    key = tl.load(k + place * T * D + block)
    value = tl.load(v + place * T * D + block)
    valid = slots[:, None] < tl.load(counts + tile)
    d_key = tl.full([T, D], 0.0, tl.float32)
    d_value = tl.full([T, D], 0.0, tl.float32)
    scale_2 = scale * 1.4426950408889634
    first = row.to(tl.int64) * (m + 1) + tile
    for i in range(tl.load(offsets + first), tl.load(offsets + first + 1)):
        other = row.to(tl.int64) * n + tl.load(readers + row.to(tl.int64) * n * K + i)
        query = tl.load(q + other * T * D + block)
        upstream = tl.load(d_fine + other * T * D + block)
        normaliser = tl.load(logsum + other * T + slots)[None, :]
        shift = tl.load(delta + other * T + slots)[None, :]
        score = tl.dot(key.to(DOT), tl.trans(query).to(DOT), input_precision="tf32x3") * scale_2
        weight = tl.exp2(tl.where(valid, score, float("-inf")) - normaliser)
        d_value += tl.dot(weight.to(upstream.dtype).to(DOT), upstream.to(DOT), input_precision="tf32x3")
        d_weight = tl.dot(value.to(DOT), tl.trans(upstream).to(DOT), input_precision="tf32x3")
        d_score = weight * (d_weight - shift)
        d_key += tl.dot(d_score.to(query.dtype).to(DOT), query.to(DOT), input_precision="tf32x3")
    tl.store(dk + place * T * D + block, d_key * scale)
    tl.store(dv + place * T * D + block, d_value)
