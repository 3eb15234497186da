"""Soft Thinking in numpy, double precision, written from the definition and from nothing else.

One thinking step, for the logits z of a position (after bias and masks), T > 0:

  1. z' = z/T; p = softmax(z'); H = -sum p ln p over the whole vocabulary, before any filter
  2. candidates by (z' descending, id ascending); keep top_k; renormalise
  3. keep the shortest prefix with cumulative probability >= top_p; renormalise
  4. drop p < min_p * p_max; renormalise
  5. dirichlet: replace p by a draw from Dirichlet(alpha * p); sort again
  6. keep the max_topk largest; renormalise: the weights
  7. gumbel: w = softmax((ln w + g)/tau); sort again
  8. trace id = first id; then, in this order: close marker, end of sequence, cold stop, budget

T = 0 (or below 1e-3): one-hot on the largest logit, H at T = 1.

Random numbers: Philox4x32-10, key = (low, high word of the seed), counter = (step, choice, purpose,
slot | try << 16), purpose 1 categorical, 2 Gumbel, 3 Dirichlet; u = ((x >> 9) + 0.5) * 2^-23.

Every decision comes with its margins, so that a test in single precision can leave out near-ties:
  margin      how far the trace id was from being another: ln(w1/w2) of the two largest weights (T = 0: the gap of the
              two largest logits; a categorical draw: distance of u from the borders of its interval). At most 99.
  set_margin  the smallest gap of *any* discrete choice of the step: order and membership of the candidates in
              ln p, top_p crossing in probability, min_p in ln p, H against the cold-stop threshold. At most 99.
An exact tie of two logits is no near-tie (the lower id goes first) and has no part in the margins.
"""
import math

import numpy as np

BIG = 99.0
CATEGORICAL, GUMBEL, DIRICHLET = 1, 2, 3
FLT_MIN = 2.0 ** -126


def philox(counter, key):
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


PHILOX_KNOWN = [  # counter, key, output: Random123's published known answers
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
for _counter, _key, _output in PHILOX_KNOWN:
    assert philox(_counter, _key) == _output


class Random:
    """The draws of one step of one choice."""

    def __init__(self, seed, choice, step):
        self.key, self.choice, self.step = (seed & 0xFFFFFFFF, seed >> 32), choice, step

    def uniforms(self, purpose, slot, attempt=0):
        words = philox((self.step, self.choice, purpose, slot | attempt << 16), self.key)
        return [((x >> 9) + 0.5) * 2.0 ** -23 for x in words]

    def gumbel(self, slot):
        return -math.log(-math.log(self.uniforms(GUMBEL, slot)[0]))

    def log_gamma_variate(self, shape, slot):
        """(ln of a Gamma(shape, 1) variate, margin of its accept tests): Marsaglia and Tsang, 2000."""
        boost, margin = 0.0, BIG
        if shape < 1:
            boost, shape = math.log(self.uniforms(DIRICHLET, slot)[3]) / shape, shape + 1
        d = shape - 1 / 3
        c = 1 / math.sqrt(9 * d)
        for attempt in range(65536):
            u0, u1, u2, _ = self.uniforms(DIRICHLET, slot, attempt)
            x = math.sqrt(-2 * math.log(u0)) * math.cos(2 * math.pi * u1)
            v = (1 + c * x) ** 3
            margin = min(margin, abs(v))
            if v > 0:
                gap = 0.5 * x * x + d * (1 - v + math.log(v)) - math.log(u2)
                margin = min(margin, abs(gap))
                if gap > 0:
                    return math.log(d * v) + boost, margin
        raise RuntimeError("no gamma variate")


class Gap:
    """Keeps the smallest margin seen."""

    def __init__(self):
        self.value = BIG

    def see(self, *gaps):
        self.value = float(min([self.value, *gaps]))


def entropy(z, temperature):
    """(H in nats, ln p) of softmax(z/T); entries of -inf have no part."""
    z = np.asarray(z, np.float64) / (temperature if temperature >= 1e-3 else 1.0)
    with np.errstate(invalid="ignore"):
        log_p = z - z.max()
        log_p -= np.log(np.exp(log_p).sum())
        terms = np.where(np.isneginf(log_p), 0.0, np.exp(log_p) * log_p)
    return float(-terms.sum()), log_p


def by_weight(ids, w):
    order = np.lexsort((ids, -w))
    return ids[order], w[order]


def see_order(gap, log_w):
    """The order of neighbours in a sorted list, in ln p.  An exact tie is no near-tie: the lower id goes first."""
    gaps = log_w[:-1] - log_w[1:]
    gap.see(*gaps[gaps > 0])


def without_underflow(ids, w, gap):
    """Drop what is 0 in single precision; a result that may or may not be 0 there has no margin."""
    if np.any((w > 1e-50) & (w < FLT_MIN)):
        gap.see(-1.0)
    return ids[w >= FLT_MIN], w[w >= FLT_MIN]


def filtered(log_p, top_k, top_p, min_p, gap):
    """Items 2 to 4: (ids, p) sorted, renormalised.  top_k <= 0, top_p = 1 and min_p = 0 are off."""
    ids = np.flatnonzero(~np.isneginf(log_p))
    order = np.lexsort((ids, -log_p[ids]))
    ids = ids[order]
    if 0 < top_k < len(ids):
        see_order(gap, log_p[ids[top_k - 1:top_k + 1]])
        ids = ids[:top_k]
    p = np.exp(log_p[ids])
    p /= p.sum()
    if top_p < 1:
        cumulative = np.cumsum(p)
        n = int(np.searchsorted(cumulative, top_p))  # first index with cumulative >= top_p
        n = min(n, len(p) - 1)
        gap.see(abs(cumulative[n] - top_p), *([abs(top_p - cumulative[n - 1])] if n else []))
        see_order(gap, log_p[ids[n:n + 2]])
        ids, p = ids[:n + 1], p[:n + 1] / p[:n + 1].sum()
    if min_p > 0:
        gap.see(np.min(np.abs(log_p[ids] - log_p[ids[0]] - math.log(min_p))))
        keep = p >= min_p * p[0]
        ids, p = ids[keep], p[keep] / p[keep].sum()
    return without_underflow(ids, p, gap)


DEFAULTS = dict(mode="soft", temperature=0.6, top_k=30, top_p=0.95, min_p=0.001, max_topk=10,
                gumbel_temperature=0.5, dirichlet_alpha=1.0)


def concept_token(z, options, rng=None):
    """Items 1 to 7 (and the categorical draw of mode off) -> dict(H, log_p, ids, w, id, margin, set_margin)."""
    o = {**DEFAULTS, **options}
    z = np.asarray(z, np.float64)
    H, log_p = entropy(z, o["temperature"])
    gap, result = Gap(), dict(H=H, log_p=log_p)
    if o["temperature"] < 1e-3:
        best = int(np.argmax(z))  # numpy gives the lowest id of a tie
        two = np.sort(z[~np.isneginf(z)])[::-1][:2]
        margin = float(min(BIG, two[0] - two[1])) if len(two) > 1 and two[0] > two[1] else BIG
        return dict(result, ids=np.array([best]), w=np.array([1.0]), id=best, margin=margin, set_margin=margin)
    ids, p = filtered(log_p, o["top_k"], o["top_p"], o["min_p"], gap)
    if o["mode"] == "off":
        see_order(gap, np.log(p))
        u, borders = rng.uniforms(CATEGORICAL, 0)[0], np.concatenate(([0.0], np.cumsum(p)))
        n = min(int(np.searchsorted(borders[1:], u, side="right")), len(ids) - 1)
        margin = min(u - borders[n] if n else BIG, borders[n + 1] - u if n + 1 < len(ids) else BIG)
        gap.see(margin)
        return dict(result, ids=ids[n:n + 1], w=np.array([1.0]), id=int(ids[n]), margin=float(margin), set_margin=gap.value)
    if o["mode"] == "dirichlet":
        see_order(gap, np.log(p))  # a slot is a place in this order
        draws = [rng.log_gamma_variate(o["dirichlet_alpha"] * float(x), slot) for slot, x in enumerate(p)]
        gap.see(*(m for _, m in draws))
        log_g = np.array([g for g, _ in draws])
        w = np.exp(log_g - log_g.max())
        ids, p = by_weight(ids, w / w.sum())
    if o["mode"] == "dirichlet":
        ids, p = without_underflow(ids, p, gap)
    see_order(gap, np.log(p[:o["max_topk"] + 1]))
    ids, w = ids[:o["max_topk"]], p[:o["max_topk"]]
    w = w / w.sum()
    if o["mode"] == "gumbel":
        see_order(gap, np.log(w))
        y = (np.log(w) + np.array([rng.gumbel(slot) for slot in range(len(w))])) / o["gumbel_temperature"]
        w = np.exp(y - y.max())
        ids, w = by_weight(ids, w / w.sum())
        ids, w = without_underflow(ids, w, gap)
    see_order(gap, np.log(w))
    margin = float(min(BIG, math.log(w[0] / w[1]))) if len(w) > 1 else BIG
    if margin == 0:  # an exact tie, see see_order
        return dict(result, ids=ids, w=w, id=int(ids[0]), margin=BIG, set_margin=gap.value)
    return dict(result, ids=ids, w=w, id=int(ids[0]), margin=margin, set_margin=min(gap.value, margin))


class Thinker:
    """One sequence: phase, cold stop, budget.  step(z) -> record with the next input as (ids, w)."""

    def __init__(self, think, answer, close_id, eos_ids, seed=0, choice=0):
        self.think = {**DEFAULTS, "cold_stop": None, "budget": None, "on_eos": "close", **think}
        self.answer = {**dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0), **answer, "mode": "off"}
        self.close_id, self.eos_ids, self.seed, self.choice = close_id, set(eos_ids), seed, choice
        self.steps = self.low = 0
        self.thinking, self.end, self.finished = True, "none", False

    def step(self, z):
        o, rng = self.think if self.thinking else self.answer, Random(self.seed, self.choice, self.steps)
        z = np.array(z, np.float64)
        if self.thinking and o["on_eos"] == "mask":
            z[list(self.eos_ids)] = -np.inf
        r = concept_token(z, o, rng)
        r.update(phase="t" if self.thinking else "a", soft=False)
        self.steps += 1
        if self.thinking:
            self.think_rules(r, o)
        elif r["id"] in self.eos_ids:
            self.finished = True
        r["p"] = float(np.exp(r["log_p"][r["id"]]))
        if not r["soft"]:
            r["ids"], r["w"] = np.array([r["id"]]), np.array([1.0])
        return r

    def think_rules(self, r, o):
        """Item 8, a to d."""
        end, cold = None, o["cold_stop"]
        if r["id"] == self.close_id:
            end = "model"
        elif r["id"] in self.eos_ids:
            if o["on_eos"] == "finish":
                self.end, self.finished = "eos", True
                return
            end = "eos"
        else:
            if cold:
                self.low = self.low + 1 if r["H"] < cold[0] else 0
                r["set_margin"] = min(r["set_margin"], abs(r["H"] - cold[0]))
            if cold and self.low >= cold[1]:
                end = "cold_stop"
            elif o["budget"] and self.steps >= o["budget"]:
                end = "budget"
        if end:
            r["id"], self.end, self.thinking = self.close_id, end, False
        else:
            r["soft"] = o["mode"] != "off"


def hex32(x):
    """fp32 bits as 8 hex digits."""
    return f"{int(np.float32(x).view(np.uint32)):08x}"
