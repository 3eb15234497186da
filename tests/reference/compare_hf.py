#!/usr/bin/env python3
"""Compare `sfumato score` with transformers in float32, position by position.  By hand, for any model.

    sfumato score -m DIR --dtype f32 --top 20 --input in.jsonl --output out.jsonl
    python compare_hf.py --model DIR --input in.jsonl --output out.jsonl

DIR is a Hugging Face folder (of a GGUF file: a folder with its dequantised weights).  Input lines:
{"steps": [id | [[id, weight], ...], ...]} or {"text": "..."}, optional "temperature" (1).  Output lines:
{"positions": [{"entropy", "logprob" of the next element or null, "top": [[id, logprob], ...]}]}.

The vocabulary is what the tokenizer knows; padding rows of the matrix have no part.  Prints the largest
and the mean differences, and the top-1 agreement with the positions where the two best are further apart
than --near (nats) counted apart.  Exit status 1 when a difference exceeds --tolerance or such a top-1 differs.
"""
import argparse
import json
import sys

import torch
import transformers


def elements_of(line, tok):
    if "steps" in line:
        return line["steps"]
    if "text" in line:
        return tok(line["text"], add_special_tokens=line.get("add_special", True)).input_ids
    sys.exit("compare_hf.py: an input line needs steps or text")


@torch.no_grad()
def reference(model, vocab, elements, temperature):
    """ln p of every position, [positions, vocab], double."""
    E = model.get_input_embeddings().weight
    x = [E[e] if isinstance(e, int) else sum(w * E[i].double() for i, w in e).float() for e in elements]
    z = model(inputs_embeds=torch.stack(x)[None]).logits[0, :, :vocab].double()
    return (z / temperature).log_softmax(-1)


def logprob_of(log_p, element):
    return float(log_p[element]) if isinstance(element, int) else sum(w * float(log_p[i]) for i, w in element)


def main():
    c = argparse.ArgumentParser()
    c.add_argument("--model", required=True)
    c.add_argument("--input", required=True)
    c.add_argument("--output", required=True)
    c.add_argument("--tolerance", type=float, default=1e-3, help="nats, of entropies and logprobs")
    c.add_argument("--near", type=float, default=2e-3)
    c.add_argument("--show", type=int, default=3, help="print the worst positions")
    c.add_argument("--threads", type=int, default=2)
    c = c.parse_args()
    torch.set_num_threads(c.threads)
    tok = transformers.AutoTokenizer.from_pretrained(c.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(c.model, dtype=torch.float32).eval()
    vocab = min(len(tok), model.config.vocab_size)
    differences = {"entropy": [], "logprob": [], "top": []}
    positions = agree = clear = clear_agree = 0
    with open(c.input) as f, open(c.output) as g:
        for number, (line, result) in enumerate(zip(map(json.loads, f), map(json.loads, g), strict=True), 1):
            if "error" in result:
                sys.exit(f"compare_hf.py: {c.output}, line {number}: {result['error']}")
            elements = elements_of(line, tok)
            log_p = reference(model, vocab, elements, line.get("temperature", 1.0))
            if len(result["positions"]) != len(elements):
                sys.exit(f"compare_hf.py: line {number}: {len(result['positions'])} positions, {len(elements)} expected")
            for t, got in enumerate(result["positions"]):
                def see(kind, mine, theirs):
                    differences[kind].append((abs(mine - theirs), number, t, mine, theirs))
                row = log_p[t]
                see("entropy", got["entropy"], float(-(row.exp() * row).nan_to_num(0.0).sum()))
                if got["logprob"] is not None and t + 1 < len(elements):
                    see("logprob", got["logprob"], logprob_of(row, elements[t + 1]))
                for i, lp in got["top"]:
                    see("top", lp, float(row[i]))
                two, ids = row.topk(2)
                same = bool(got["top"]) and got["top"][0][0] == int(ids[0])
                positions, agree = positions + 1, agree + same
                if two[0] - two[1] > c.near:
                    clear, clear_agree = clear + 1, clear_agree + same
    worst = 0.0
    for kind, seen in differences.items():
        seen.sort(reverse=True)
        if seen:
            worst = max(worst, seen[0][0])
            print(f"{kind:8} {len(seen)} values, largest difference {seen[0][0]:.2e}, mean {sum(s[0] for s in seen) / len(seen):.2e}")
            for d, number, t, mine, theirs in seen[:c.show]:
                print(f"    line {number} position {t}: sfumato {mine:.6f} transformers {theirs:.6f}")
    print(f"top-1    {agree} of {positions} agree; {clear_agree} of {clear} where the best is clear by {c.near} nats")
    sys.exit(int(worst > c.tolerance or clear_agree != clear))


if __name__ == "__main__":
    main()
