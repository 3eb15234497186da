#!/usr/bin/env python3
"""Accuracy of models/tiny under several ways of thinking, by transformers in float32, in batches.

    python tiny_arms.py --problems ../../models/tiny/problems_dev.jsonl [--arms greedy,soft,...] [--n 500]

Makes the reference column of the table in models/tiny/README.md.  The answer is always greedy.  Noise comes
from torch here (statistics only); make_tiny.py makes the traces that the engine must reproduce.
"""
import argparse
import json
import os
import re
import time

import torch
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = os.path.normpath(f"{HERE}/../../models/tiny")
FILTERS = dict(temperature=0.6, top_k=30, top_p=0.95, min_p=0.001, max_topk=10)
ARMS = {
    "greedy": dict(mode="greedy"),
    "sampled": dict(mode="sampled", max_topk=30),
    "soft": dict(mode="soft"),
    "soft, K 5": dict(mode="soft", max_topk=5),
    "soft, K 15": dict(mode="soft", max_topk=15),
    "soft, T 1, no filters": dict(mode="soft", temperature=1.0, top_k=768, top_p=1.0, min_p=0.0, max_topk=30),
    "soft, cold stop 0.01 x 16": dict(mode="soft", cold=(0.01, 16)),
    "soft, cold stop 0.05 x 16": dict(mode="soft", cold=(0.05, 16)),
    "soft, cold stop 0.1 x 12": dict(mode="soft", cold=(0.1, 12)),
    "soft, cold stop 0.1 x 8": dict(mode="soft", cold=(0.1, 8)),
    "greedy, cold stop 0.05 x 16": dict(mode="greedy", cold=(0.05, 16)),
    "gumbel, tau 0.5": dict(mode="gumbel", tau=0.5),
    "gumbel, cold stop 0.05 x 16": dict(mode="gumbel", tau=0.5, cold=(0.05, 16)),
    "dirichlet, alpha 1": dict(mode="dirichlet", alpha=1.0),
    "dirichlet, alpha 10": dict(mode="dirichlet", alpha=10.0),
}
MAX_THINKING, MAX_ANSWER, BATCH = 300, 40, 100


def renormalised(w):
    return w / w.sum(-1, keepdim=True)


def concept_tokens(p, a, gen):
    """p [B, V] -> ids, weights [B, K], sorted."""
    w, ids = p.sort(dim=-1, descending=True, stable=True)
    w = renormalised(w[:, :a["top_k"]])
    w = renormalised(w * (w.cumsum(-1) - w < a["top_p"]))
    w = renormalised(w * (w >= a["min_p"] * w[:, :1]))
    ids = ids[:, :w.shape[1]]
    if a["mode"] == "dirichlet":
        w = renormalised(torch._standard_gamma((a["alpha"] * w.double()).clamp_min(1e-12), generator=gen) * (w > 0)).float()
        w, order = w.sort(dim=-1, descending=True)
        ids = ids.gather(1, order)
    w, ids = renormalised(w[:, :a["max_topk"]]), ids[:, :a["max_topk"]]
    if a["mode"] == "gumbel":
        noise = -torch.log(-torch.log(torch.rand(w.shape, generator=gen).clamp(1e-9, 1 - 1e-7)))
        w, order = ((w.log() + noise) / a["tau"]).softmax(-1).sort(dim=-1, descending=True)
        ids = ids.gather(1, order)
    return ids, w


@torch.no_grad()
def run(model, tok, prompts, a, gen):
    """Per prompt dict(thinking=ids, answer=ids, H=[...], top=[...], end=...)."""
    close_id, eos_id, E = tok.convert_tokens_to_ids("</think>"), tok.eos_token_id, model.get_input_embeddings().weight
    inputs = tok(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    mask, x, cache = inputs.attention_mask, E[inputs.input_ids], transformers.DynamicCache()
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    out = [dict(thinking=[], answer=[], H=[], top=[], end="none", low=0, phase="t") for _ in prompts]
    while True:
        z = model(inputs_embeds=x, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]
        p = (z / a["temperature"]).softmax(-1)
        H = torch.special.entr(p).sum(-1)
        ids, w = concept_tokens(p, a, gen)
        if a["mode"] == "greedy":
            chosen = z.argmax(-1)
        elif a["mode"] == "sampled":
            chosen = ids.gather(1, torch.multinomial(w, 1, generator=gen))[:, 0]
        else:
            chosen = ids[:, 0]
        mixed = (w[..., None] * E[ids]).sum(1) if a["mode"] not in ("greedy", "sampled") else E[chosen]
        answer = z.argmax(-1)
        tau, length = a.get("cold", (0.0, 0))
        for b, o in enumerate(out):
            if o["phase"] == "t":
                token = int(chosen[b])
                o["low"] = o["low"] + 1 if H[b] < tau else 0
                end = ("model" if token == close_id else "eos" if token == eos_id else "cold_stop" if length and o["low"] >= length
                       else "budget" if len(o["thinking"]) + 1 >= MAX_THINKING else None)
                if end:
                    token, o["end"], o["phase"] = close_id, end, "a"
                    mixed[b] = E[close_id]
                o["thinking"].append(token)
                o["H"].append(float(H[b]))
                o["top"].append(float(w[b, 0]))
            else:
                mixed[b] = E[answer[b]]
                if o["phase"] == "a":
                    o["answer"].append(int(answer[b]))
                    if answer[b] == eos_id or len(o["answer"]) >= MAX_ANSWER:
                        o["phase"] = "done"
        if all(o["phase"] == "done" for o in out):
            return out
        x, position = mixed[:, None], position[:, -1:] + 1
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)


def main():
    c = argparse.ArgumentParser()
    c.add_argument("--model", default=MODEL)
    c.add_argument("--problems", default=f"{MODEL}/problems_dev.jsonl")
    c.add_argument("--n", type=int, default=10 ** 9)
    c.add_argument("--arms", default=";".join(ARMS), help="separated by ;")
    c.add_argument("--threads", type=int, default=1)
    c = c.parse_args()
    torch.set_num_threads(c.threads)
    with open(c.problems) as f:
        problems = [json.loads(line) for line in f][:c.n]
    tok = transformers.AutoTokenizer.from_pretrained(c.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(c.model, dtype=torch.float32).eval()
    prompts = [tok.apply_chat_template([dict(role="user", content=p["question"])], tokenize=False, add_generation_prompt=True) for p in problems]
    print(f"{os.path.basename(c.problems)}, {len(problems)} problems.  accuracy, mean thinking tokens, mean H in nats, share of steps whose largest "
          "weight is < 0.95, share ended by cold stop")
    for name in c.arms.split(";"):
        start, a = time.time(), {**FILTERS, **ARMS[name]}
        gen = torch.Generator().manual_seed(1)
        out = [o for n in range(0, len(prompts), BATCH) for o in run(model, tok, prompts[n:n + BATCH], a, gen)]
        right = sum(re.findall(r"boxed\{(\d+)\}", tok.decode(o["answer"]))[:1] == [str(p["answer"])] for o, p in zip(out, problems))
        steps, n = sum(len(o["H"]) for o in out), len(out)
        print(f"| {name} | {100 * right / n:.1f} % | {steps / n:.1f} | {sum(sum(o['H']) for o in out) / steps:.3f} | "
              f"{100 * sum(t < 0.95 for o in out for t in o['top']) / steps:.1f} % | {100 * sum(o['end'] == 'cold_stop' for o in out) / n:.1f} % | "
              f"({time.time() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
