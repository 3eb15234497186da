#!/usr/bin/env python3
"""Make tests/data/golden/think_steps.vec: single thinking steps on random logits, in double precision.

    python make_think_steps.py            (needs numpy only)
"""
import os
import random
import sys

import numpy as np

from soft_thinking import Random, concept_token, hex32

OUT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../data/golden/think_steps.vec"))

HEAD = """\
# think_steps.vec: single thinking steps, logits in, entropy and concept token out
# made by tests/reference/make_think_steps.py, numpy {numpy}, from tests/reference/soft_thinking.py (double precision)
# floats: 8 hex digits of the IEEE single (thresholds and logits are exact, results are rounded from double)
# case N mode=soft|gumbel|dirichlet|off V=vocabulary temperature=F top_k=I(0 off) top_p=F(1 off) min_p=F(0 off) max_topk=I
#   tau=F alpha=F seed=U64 choice=I step=I margin=F set_margin=F       (margins: see the head of soft_thinking.py)
# bias id:F ...      added to the logits in single precision        (absent: none)
# mask id ...        logits set to -inf, after the bias             (absent: none)
# z F...             the V logits, 8 hex digits each, no spaces between
# out H=F p=F(of the first id, before filters) id:F ...             id:weight sorted; mode off: the one id drawn
"""


def logits(rng, nprng, vocab):
    kind = rng.randrange(6)
    if kind == 0:  # broad
        z = nprng.normal(0, rng.choice([0.3, 1, 2]), vocab)
    elif kind == 1:  # language-like: a few large ones
        z = nprng.normal(0, 2, vocab)
        z[nprng.choice(vocab, min(vocab, rng.randint(1, 12)), replace=False)] += rng.uniform(4, 14)
    elif kind == 2:  # nearly certain
        z = nprng.normal(0, 1, vocab)
        z[nprng.integers(vocab)] += rng.uniform(12, 40)
    elif kind == 3:  # exact ties everywhere
        z = np.round(nprng.normal(0, 2, vocab))
    elif kind == 4:  # uniform
        z = np.full(vocab, rng.choice([0.0, -3.5, 80.0]))
    else:  # wide range, large values
        z = nprng.uniform(-60, 60, vocab)
    return z.astype(np.float32)


def options(rng, n):
    o = dict(temperature=rng.choice([0.6, 0.6, 1.0, 0.3, 0.05, 1.7, 5.0, 0.0, 0.0005]), top_k=rng.choice([30, 30, 0, 1, 5, 64, 1000, 100000]),
             top_p=rng.choice([0.95, 0.95, 1.0, 0.5, 0.05, 0.999]), min_p=rng.choice([0.001, 0.0, 0.05, 0.3, 0.99]),
             max_topk=rng.choice([1, 2, 5, 10, 15, 30, 64]), gumbel_temperature=rng.choice([0.5, 0.1, 1.0, 5.0]),
             dirichlet_alpha=rng.choice([1.0, 0.2, 10.0, 1000.0]))
    o["mode"] = "soft" if n < 130 else rng.choice(["gumbel", "dirichlet", "off"])
    return {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in o.items()}  # the values C sees


def main():
    rng, nprng = random.Random(7), np.random.default_rng(7)
    lines, n, left_out = [], 0, 0
    while n < 210:
        vocab = rng.choice([50, 50, 64, 97, 128, 200, 333]) if n % 12 else rng.choice([1000, 1511, 3000])
        z, o = logits(rng, nprng, vocab), options(rng, n)
        o["top_k"] = min(o["top_k"], vocab)
        bias = {i: rng.choice([-100.0, -2.5, 0.75, 5.0]) for i in rng.sample(range(vocab), rng.randint(1, 4))} if rng.random() < 0.2 else {}
        mask = sorted(rng.sample(range(vocab), rng.randint(1, 3))) if rng.random() < 0.25 else []
        if rng.random() < 0.3 and mask:
            mask = sorted({*mask, int(np.argmax(z))})  # masking the best one must show in H too
        seed, choice, step = rng.getrandbits(64), rng.choice([0, 0, 1, 5]), rng.choice([0, 1, 17, 4000])
        work = z.copy()
        for i, b in bias.items():
            work[i] += np.float32(b)
        work[mask] = -np.inf
        r = concept_token(work, o, Random(seed, choice, step))
        if r["set_margin"] < 1e-3:
            left_out += 1  # a near-tie says nothing
            continue
        lines.append(f"case {n} mode={o['mode']} V={vocab} temperature={hex32(o['temperature'])} top_k={o['top_k']} top_p={hex32(o['top_p'])} "
                     f"min_p={hex32(o['min_p'])} max_topk={o['max_topk']} tau={hex32(o['gumbel_temperature'])} alpha={hex32(o['dirichlet_alpha'])} "
                     f"seed={seed} choice={choice} step={step} margin={hex32(r['margin'])} set_margin={hex32(r['set_margin'])}")
        if bias:
            lines.append("bias " + " ".join(f"{i}:{hex32(b)}" for i, b in bias.items()))
        if mask:
            lines.append("mask " + " ".join(map(str, mask)))
        lines.append("z " + "".join(map(hex32, z)))
        pairs = " ".join(f"{i}:{hex32(w)}" for i, w in zip(r["ids"], r["w"]))
        lines.append(f"out H={hex32(r['H'])} p={hex32(np.exp(r['log_p'][r['id']]))} {pairs}")
        n += 1
    with open(OUT, "w") as f:
        f.write(HEAD.format(numpy=np.__version__) + "\n".join(lines) + "\n")
    print(f"{n} cases, {left_out} near-ties left out, {os.path.getsize(OUT)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
