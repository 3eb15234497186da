#!/usr/bin/env python3
"""Make tests/data/golden/tiny_logits.vec and tiny_soft.vec: models/tiny by transformers in float32.

    python make_tiny.py [--model DIR]

The forward pass is transformers' (weights: the file's bf16 values, as float32), the thinking step is
soft_thinking.py's (double precision).  Mixtures are fed as inputs_embeds.
"""
import argparse
import json
import os
import sys

import numpy as np
import torch
import transformers

from soft_thinking import Thinker, entropy, hex32

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.normpath(f"{HERE}/../data/golden")
MODEL = os.path.normpath(f"{HERE}/../../models/tiny")

HEAD = """\
# {name}: {what}
# made by tests/reference/make_tiny.py, transformers {transformers}, torch {torch}, numpy {numpy}, float32 on CPU
# model models/tiny, weights model.safetensors (bf16, taken as float32) sha256 {sha256}
# config hidden={hidden_size} layers={num_hidden_layers} heads={num_attention_heads} kv_heads={num_key_value_heads} head_dim={head_dim} \
ffn={intermediate_size} vocab={vocab_size}
# floats: 8 hex digits of the IEEE single; a pair id:F is an id and its weight or logit
"""
LOGITS_FORMAT = """\
# case NAME LENGTH           an input of LENGTH positions follows
# in id | id:F id:F ...      one position: an id, or a mixture (weights sum to 1, mixed in double, rounded to single)
# at POSITION H1=F H06=F id:F ...   entropy (nats) at T = 1 and T = 0.6 over all logits, and the 16 largest logits
"""
SOFT_FORMAT = """\
# run NAME mode=M temperature=F top_k=I top_p=F min_p=F max_topk=I tau=F alpha=F cold_entropy=F cold_length=I(0 none)
#   budget=I(0 none) on_eos=close seed=U64 choice=I answer_temperature=F answer_top_k=I answer_top_p=F answer_min_p=F
# prompt id ...              thinking starts with the first generated step
# step PHASE ID H=F p=F margin=F set_margin=F id:F ...
#   PHASE t thinking, a answer.  ID the trace id, which is the step's decision.  H at the phase's temperature (T = 0: at
#   T = 1).  p of ID before filters.  Margins: see the head of tests/reference/soft_thinking.py.  The pairs are the
#   concept token that is fed next; no pairs: a hard step, ID is fed.
# end THINKING_END FINISH    model | cold_stop | budget | eos | none; stop | length
"""


class Model:
    def __init__(self, path):
        self.hf = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tok = transformers.AutoTokenizer.from_pretrained(path)
        self.E = self.hf.get_input_embeddings().weight.detach().double()
        self.vocab = len(self.tok)

    def prompt(self, question):
        text = self.tok.apply_chat_template([dict(role="user", content=question)], tokenize=False, add_generation_prompt=True)
        return self.tok(text, add_special_tokens=False).input_ids

    def embed(self, element):
        """An id, or a list of (id, weight)."""
        if isinstance(element, int):
            element = [(element, 1.0)]
        ids, w = zip(*element)
        return (torch.tensor(w, dtype=torch.float64)[:, None] * self.E[list(ids)]).sum(0).float()

    @torch.no_grad()
    def forward(self, elements, cache=None):
        """fp32 logits [positions, vocab] of the given inputs, after those in the cache."""
        x = torch.stack([self.embed(e) for e in elements])[None]
        out = self.hf(inputs_embeds=x, past_key_values=cache, use_cache=cache is not None)
        return out.logits[0, :, :self.vocab].numpy()


def head(name, what, model_path):
    import hashlib
    with open(f"{model_path}/model.safetensors", "rb") as f:
        sha256 = hashlib.sha256(f.read()).hexdigest()
    with open(f"{model_path}/config.json") as f:
        config = json.load(f)
    return HEAD.format(name=name, what=what, transformers=transformers.__version__, torch=torch.__version__, numpy=np.__version__,
                       sha256=sha256, **config)


def pairs(items):
    return " ".join(f"{i}:{hex32(v)}" for i, v in items)


# ------------------------------------------------------------------------------------------- logits


def random_mixture(rng, vocab, width):
    ids = rng.choice(vocab, width, replace=False)
    w = np.sort(rng.dirichlet(np.ones(width)))[::-1].astype(np.float32)
    return [(int(i), float(x)) for i, x in zip(ids, w)]


def logit_cases(m, problems):
    """(name, elements, positions to report)"""
    text = m.prompt(problems[0]["question"]) + m.tok("Okay, I will think slowly. First, adding 5 pens gives 12+5=17.", add_special_tokens=False).input_ids
    text = (text + m.prompt(problems[1]["question"]) + m.prompt(problems[2]["question"]))[:130]
    assert len(text) == 130
    rng = np.random.default_rng(11)
    for length in (1, 5, 40, 63, 64, 65):
        yield f"ids_{length}", text[:length], sorted({0, length // 2, max(0, length - 2), length - 1})
    yield "ids_130", text, [0, 31, 32, 62, 63, 64, 65, 127, 128, 129]
    for length, width in ((40, 2), (65, 5), (65, 15), (20, 64)):
        elements = list(text[:length])
        for t in range(length // 2, length):
            if t % 3:
                elements[t] = random_mixture(rng, m.vocab, width)
        yield f"mix_{length}_{width}", elements, sorted({length // 2 - 1, length // 2, length // 2 + 1, length // 2 + 2, length - 2, length - 1})
    yield "mix_one_hot", [*text[:20], [(text[20], 1.0)], *text[21:24]], [20, 23]
    yield "mix_all", [random_mixture(rng, m.vocab, 10) for _ in range(24)], [0, 1, 11, 22, 23]


def write_logits(m, problems, path):
    lines = []
    for name, elements, wanted in logit_cases(m, problems):
        z = m.forward(elements)
        lines.append(f"case {name} {len(elements)}")
        lines += ["in " + (str(e) if isinstance(e, int) else pairs(e)) for e in elements]
        for t in wanted:
            top = np.argsort(-z[t], kind="stable")[:16]
            lines.append(f"at {t} H1={hex32(entropy(z[t], 1.0)[0])} H06={hex32(entropy(z[t], np.float32(0.6))[0])} " + pairs((i, z[t][i]) for i in top))
    with open(f"{GOLDEN}/tiny_logits.vec", "w") as f:
        f.write(head("tiny_logits.vec", "logits and entropies of models/tiny", path) + LOGITS_FORMAT + "\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------- soft traces

RUNS = [  # name, problem, thinking, answer, seed, choice
    ("soft_k1", 0, dict(max_topk=1), {}, 1, 0),
    ("soft_k5", 1, dict(max_topk=5), {}, 1, 0),
    ("soft_k10", 2, dict(max_topk=10), {}, 1, 0),
    ("soft_k15", 3, dict(max_topk=15), {}, 1, 0),
    ("soft_wide_t1", 4, dict(max_topk=30, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0), {}, 1, 0),
    ("soft_t0", 5, dict(temperature=0.0), {}, 1, 0),
    ("soft_cold", 6, dict(cold_stop=(0.1, 12)), {}, 1, 0),
    ("soft_cold_k5", 7, dict(max_topk=5, cold_stop=(0.05, 16)), {}, 1, 0),
    ("soft_cold_short", 8, dict(cold_stop=(0.3, 4)), {}, 1, 0),
    ("soft_budget", 9, dict(budget=25), {}, 1, 0),
    ("hard_greedy", 10, dict(mode="off", temperature=0.0), {}, 1, 0),
    ("hard_sampled", 11, dict(mode="off"), dict(temperature=0.6, top_p=0.95), 123456789012345, 0),
    ("hard_sampled_t1", 12, dict(mode="off", temperature=1.0, top_k=0, top_p=1.0, min_p=0.0), dict(temperature=1.0), 3, 2),
    ("gumbel", 13, dict(mode="gumbel"), {}, 42, 0),
    ("gumbel_choice", 13, dict(mode="gumbel", max_topk=15, gumbel_temperature=0.1), {}, 42, 3),
    ("gumbel_cold", 14, dict(mode="gumbel", gumbel_temperature=1.0, cold_stop=(0.1, 12)), {}, 2 ** 63 + 5, 0),
    ("dirichlet", 15, dict(mode="dirichlet"), {}, 42, 0),
    ("dirichlet_sharp", 16, dict(mode="dirichlet", dirichlet_alpha=20.0), {}, 42, 1),
    ("dirichlet_cold", 17, dict(mode="dirichlet", dirichlet_alpha=5.0, cold_stop=(0.1, 12)), dict(temperature=0.6), 7, 0),
]
MAX_STEPS = 250


def single(options):
    """The values a single-precision engine sees."""
    return {k: (tuple(float(np.float32(x)) if isinstance(x, float) else x for x in v) if isinstance(v, tuple)
                else float(np.float32(v)) if isinstance(v, float) else v) for k, v in options.items()}


def write_soft(m, problems, path):
    close_id, eos_id = m.tok.convert_tokens_to_ids("</think>"), m.tok.eos_token_id
    lines = []
    for name, n, think, answer, seed, choice in RUNS:
        base = dict(mode="soft", temperature=0.6, top_k=30, top_p=0.95, min_p=0.001, max_topk=10, gumbel_temperature=0.5, dirichlet_alpha=1.0)
        t = Thinker(single({**base, **think}), single(answer), close_id, [eos_id], seed, choice)
        o, a, cold = t.think, t.answer, t.think["cold_stop"] or (0.0, 0)
        prompt = m.prompt(problems[n]["question"])
        lines.append(f"run {name} mode={o['mode']} temperature={hex32(o['temperature'])} top_k={o['top_k']} top_p={hex32(o['top_p'])} "
                     f"min_p={hex32(o['min_p'])} max_topk={o['max_topk']} tau={hex32(o['gumbel_temperature'])} alpha={hex32(o['dirichlet_alpha'])} "
                     f"cold_entropy={hex32(cold[0])} cold_length={cold[1]} budget={o['budget'] or 0} on_eos=close seed={seed} choice={choice} "
                     f"answer_temperature={hex32(a['temperature'])} answer_top_k={a['top_k']} answer_top_p={hex32(a['top_p'])} answer_min_p={hex32(a['min_p'])}")
        lines.append("prompt " + " ".join(map(str, prompt)))
        cache = transformers.DynamicCache()
        z, answered, worst = m.forward(prompt, cache)[-1], [], 99.0
        for _ in range(MAX_STEPS):
            r = t.step(z)
            worst = min(worst, r["margin"])
            mixture = [(int(i), float(np.float32(w))) for i, w in zip(r["ids"], r["w"])]
            lines.append(f"step {r['phase']} {r['id']} H={hex32(r['H'])} p={hex32(r['p'])} margin={hex32(r['margin'])} "
                         f"set_margin={hex32(r['set_margin'])} {pairs(mixture) if r['soft'] else ''}".rstrip())
            answered += [r["id"]] if r["phase"] == "a" else []
            if t.finished:
                break
            z = m.forward([mixture if r["soft"] else r["id"]], cache)[-1]
        lines.append(f"end {t.end} {'stop' if t.finished else 'length'}")
        print(f"{name:16} {t.steps:4} steps, {t.end:9} smallest margin {worst:.4f}  {m.tok.decode(answered)!r}, right: {problems[n]['answer']}", file=sys.stderr)
    with open(f"{GOLDEN}/tiny_soft.vec", "w") as f:
        f.write(head("tiny_soft.vec", "traces of models/tiny under Soft Thinking", path) + SOFT_FORMAT + "\n".join(lines) + "\n")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--model", default=MODEL)
    a.add_argument("--threads", type=int, default=1)
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    m = Model(a.model)
    with open(f"{a.model}/problems_dev.jsonl") as f:
        problems = [json.loads(line) for line in f][:20]
    write_logits(m, problems, a.model)
    write_soft(m, problems, a.model)
    for name in ("tiny_logits.vec", "tiny_soft.vec"):
        print(name, os.path.getsize(f"{GOLDEN}/{name}"), "bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
