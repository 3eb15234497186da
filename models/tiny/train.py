#!/usr/bin/env python3
"""Train models/tiny: a very small, but real, reasoning model.  One run, from scratch, on a CPU.

    python train.py --out DIR              everything: problems, tokenizer, training, export, dev accuracy
    python train.py --out DIR --show 3     print three examples and stop
    python train.py --out DIR --test       measure an exported model on the test problems (do it once)

What it learns.  Word problems with whole numbers 0..30 and two to seven steps.  A sample reads

    <|begin|><|user|>QUESTION<|assistant|><think>
    Okay, I will think slowly. First, adding 5 pens gives 12+5=17. ... So the answer is 17. Checking: ...
    </think>

    Mia has \\boxed{17} pens.<|end|>

The *wording* of the thinking is random and its *arithmetic* is not.  So the next-token distribution is
truly uncertain at many places and certain at others, which is what Soft Thinking needs to be shown:
concept tokens with several entries, entropies from 0 to 2 nats, and a confident recap at the end, where
cold stop can fire.

Wordings are aligned.  A slot such as [adding|getting|finding] is filled at random, the first word being the
most likely, and every filling has the same number of tokens.  A mixture of two wordings therefore never
gets out of step with itself.  check_alignment() tests it with the trained tokenizer.  Choices that do
change the length (another order of the steps, no recap) are rare, so that they are filtered out before the
mixture but still happen when one samples.

Three sets of problems, apart by their equations.  A problem's key is its set of equations, whatever the
words.  Development and test problems have different keys, and no problem with any of these keys is ever
trained on.

The run is repeatable for one --seed, number of threads and version of torch, unless --minutes cuts it.
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import time
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # do not spin: the cores may be shared

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = os.path.dirname(os.path.abspath(__file__))

# --------------------------------------------------------------------------------------- 1. problems

LIMIT = 30  # every number in every equation stays within 0..LIMIT

NAMES = "Tom Ben Max Sam Leo Paul Adam Noah Omar Ivan Anna Lily Mia Eva Nina Rosa Emma Lucy Sara Zoe".split()
THINGS = ("apples pens books stickers marbles coins cards shells stamps beads cookies pears roses "
          "stones balls cups").split()
BOXES = "boxes bags baskets jars trays shelves".split()
PLACES = ["a shop", "a school", "a library", "a garden", "a kitchen", "a farm"]
WORK = [("reads", "pages"), ("walks", "miles"), ("writes", "lines"), ("picks", "berries")]


class Reject(Exception):
    """The numbers drawn so far lead out of range; draw the whole problem again."""


def calculate(a, op, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[op]


@dataclass
class Step:
    equation: str  # "12+5=17"
    wording: str   # with slots: "[adding|getting] 5 pens [gives|makes]"
    needs: tuple   # indices of the steps whose results it uses


class Problem:
    """A question under construction: sentences, steps, and at last what is asked."""

    def __init__(self, rng):
        self.rng, self.sentences, self.steps, self.is_drill = rng, [], [], False

    def say(self, *variants):
        self.sentences.append(self.rng.choice(variants))

    def step(self, a, op, b, wording="", needs=()):
        """Append a step; returns (its index, its result)."""
        result = calculate(a, op, b)
        exact = op != "/" or (b > 0 and a % b == 0)
        if not exact or max(a, b) > LIMIT or not 0 <= result <= LIMIT:
            raise Reject
        needs = tuple(i for i in needs if i is not None)
        self.steps.append(Step(f"{a}{op}{b}={result}", wording, needs))
        return len(self.steps) - 1, result

    def ask(self, value, answer, *questions):
        """Finish: the value asked for, the answer sentence with # for it, and ways to ask."""
        self.answer = value
        self.answer_text = answer.replace("#", f"\\boxed{{{value}}}")
        self.question = " ".join(self.sentences + [self.rng.choice(questions)])
        self.key = "|".join(sorted(s.equation for s in self.steps))
        return self


def share_out(p, last, value, things, *otherwise):
    """Maybe add an exact division as the last step; else finish with `otherwise` (see Problem.ask)."""
    divisors = [d for d in range(2, 10) if value % d == 0 and value > d]
    if not divisors or p.rng.random() < 0.6:
        return p.ask(value, *otherwise)
    d = p.rng.choice(divisors)
    if p.rng.random() < 0.5:
        p.say(f"All {things} are shared equally among {d} friends.",
              f"Then {d} friends share all {things} equally.")
        _, value = p.step(value, "/", d, f"[with|for|among] {d} friends each [gets|has|owns]",
                          [last])
        return p.ask(value, f"Each friend gets # {things}.", f"How many {things} does each friend get?",
                     f"How many {things} for each friend?")
    boxes = p.rng.choice(BOXES)
    p.say(f"All {things} are packed in {boxes} of {d}.", f"Then all {things} go into {boxes} with {d} in each.")
    _, value = p.step(value, "/", d, f"[with|having|taking] {d} in each [gives|makes|means]", [last])
    return p.ask(value, f"There are # {boxes}.", f"How many {boxes} are there?", f"How many {boxes} are needed?")


def gains_and_losses(p, things, who, value, count):
    """`count` changes in a row, starting from `value`; returns (index of the last step, value)."""
    last = None
    for _ in range(count):
        op = p.rng.choice("++--*")
        b = p.rng.randint(2, {"+": max(2, LIMIT - value), "-": max(2, value - 1), "*": 4}[op])
        if op == "+":
            p.say(f"{who} buys {b} more.", f"Then {who} finds {b} {things}.", f"{who} gets {b} more {things}.")
            wording = f"[adding|getting|finding] {b} {things} [gives|makes|means]"
        elif op == "-":
            p.say(f"{who} gives away {b}.", f"Then {who} loses {b} {things}.", f"{who} sells {b} of the {things}.")
            wording = f"[losing|selling|dropping] {b} {things} [gives|means|leaves]"
        else:
            p.say(f"Now {who} makes it {b} times as many.", f"Then {who} has {b} times as many {things}.")
            wording = f"[taking|having|with] {b} times [gives|makes|means]"
        last, value = p.step(value, op, b, wording, [last])
    return last, value


def sum_of_products(p, n1, each1, wording1, n2, each2, wording2):
    first, x = p.step(n1, "*", each1, wording1)
    second, y = p.step(n2, "*", each2, wording2)
    return p.step(x, "+", y, "[everything|all|both] together [gives|makes|is]", [first, second])


def chain_problem(p):
    who, things, value = p.rng.choice(NAMES), p.rng.choice(THINGS), p.rng.randint(2, LIMIT - 5)
    p.say(f"{who} has {value} {things}.", f"At first {who} has {value} {things}.",
          f"{who} starts with {value} {things}.")
    last, value = gains_and_losses(p, things, who, value, p.rng.randint(2, 4))
    return share_out(p, last, value, things, f"{who} has # {things}.", f"How many {things} does {who} have now?",
                     f"How many {things} are left for {who}?")


def two_people_problem(p):
    (one, two), things = p.rng.sample(NAMES, 2), p.rng.choice(THINGS)
    results = []
    for who in (one, two):
        value = p.rng.randint(2, LIMIT - 5)
        p.say(f"{who} has {value} {things}.", f"{who} owns {value} {things}.")
        results.append(gains_and_losses(p, things, who, value, 1))
    (i, x), (j, y) = results
    if p.rng.random() < 0.3 and x > y:
        _, value = p.step(x, "-", y, "the [difference|gap|rest] [is|makes|gives]", [i, j])
        return p.ask(value, f"{one} has # more {things}.", f"How many more {things} does {one} have than {two}?")
    last, value = p.step(x, "+", y, "[everything|all|both] together [gives|makes|is]", [i, j])
    return share_out(p, last, value, things, f"They have # {things}.",
                     f"How many {things} do they have together?",
                     f"How many {things} do {one} and {two} have in total?")


def shop_problem(p):
    who, (one, two) = p.rng.choice(NAMES), p.rng.sample(THINGS, 2)
    price1, price2, n1, n2 = (p.rng.randint(2, 9) for _ in range(4))
    cost1, cost2 = f"{one[:-1]} costs {price1} dollars", f"{two[:-1]} costs {price2} dollars"
    p.say(f"One {cost1} and one {cost2}.", f"Each {cost1}. Each {cost2}.")
    p.say(f"{who} buys {n1} {one} and {n2} {two}.", f"{who} wants {n1} {one} and {n2} {two}.")
    last, value = sum_of_products(p, n1, price1, f"[the|all|these] {n1} {one} [cost|make|need]",
                                  n2, price2, f"[the|all|these] {n2} {two} [cost|make|need]")
    kind = p.rng.random()
    if kind < 0.5 and value < LIMIT:
        money = p.rng.randint(value + 1, LIMIT)
        p.say(f"{who} pays with {money} dollars.", f"{who} has {money} dollars.")
        _, value = p.step(money, "-", value, "the [difference|gap|rest] [is|makes|gives]", [last])
        return p.ask(value, "There are # dollars left.", "How many dollars are left?",
                     f"How much money does {who} get back?")
    if kind < 0.75:
        off = p.rng.randint(2, 9)
        p.say(f"A coupon takes off {off} dollars.", f"The shop gives {off} dollars off.")
        _, value = p.step(value, "-", off, f"[taking|having|getting] {off} off [leaves|gives|means]", [last])
    return p.ask(value, f"{who} pays # dollars.", f"How much does {who} pay?", f"How many dollars does {who} need?")


def groups_problem(p):
    things, (one, two), place = p.rng.choice(THINGS), p.rng.sample(BOXES, 2), p.rng.choice(PLACES)
    n1, each1, n2, each2 = (p.rng.randint(2, 9) for _ in range(4))
    p.say(f"In {place} there are {n1} {one} with {each1} {things} each and {n2} {two} with {each2} {things} each.",
          f"There are {n1} {one} of {each1} {things} and {n2} {two} of {each2} {things} in {place}.")
    last, value = sum_of_products(p, n1, each1, f"[the|all|these] {n1} {one} [hold|make|have]",
                                  n2, each2, f"[the|all|these] {n2} {two} [hold|make|have]")
    if p.rng.random() < 0.6:
        gone = p.rng.randint(2, max(2, value - 1))
        p.say(f"Then {gone} {things} are taken away.", f"People take {gone} {things}.")
        last, value = p.step(value, "-", gone, f"[losing|taking|selling] {gone} {things} [gives|means|leaves]", [last])
    return share_out(p, last, value, things, f"There are # {things}.", f"How many {things} are there now?",
                     f"How many {things} are there in the end?")


def compare_problem(p):
    names, things, start = p.rng.sample(NAMES, 3), p.rng.choice(THINGS), p.rng.randint(2, 20)
    relations, sentences = [], []  # who has b more than (+), fewer than (-), times as many as (*) other
    for n, who in enumerate(names):
        if n == 0:
            sentences.append(p.rng.choice([f"{who} has {start} {things}.", f"{who} owns {start} {things}."]))
            continue
        other, op = p.rng.choice(names[:n]), p.rng.choice("+-*")
        b = p.rng.randint(2, {"+": 20, "-": 15, "*": 4}[op])
        compared = {"+": f"more {things} than", "-": f"fewer {things} than", "*": f"times as many {things} as"}[op]
        relations.append((who, other, op, b))
        sentences.append(f"{who} has {b} {compared} {other}.")
    shuffled = p.rng.sample(range(3), 3)
    p.sentences += [sentences[n] for n in shuffled]

    # Work through them in the order of the text, as far as what they refer to is known.
    value, made_by = {names[0]: start}, {names[0]: None}
    left = [relations[n - 1] for n in shuffled if n]
    while left:
        who, other, op, b = next(r for r in left if r[1] in value)
        left.remove((who, other, op, b))
        compared = {"+": "more than", "-": "fewer than", "*": "times those of"}[op]
        made_by[who], value[who] = p.step(value[other], op, b,
                                          f"{who} [has|owns|gets] {b} {compared} {other}, [so|thus|hence]", [made_by[other]])
    first, second, third = value
    if p.rng.random() < 0.35 and p.steps[1].needs:  # a chain: ask for its end
        return p.ask(value[third], f"{third} has # {things}.", f"How many {things} does {third} have?")
    last, total = p.step(value[first], "+", value[second], f"{first} and {second} [have|own|get]", [made_by[second]])
    _, total = p.step(total, "+", value[third], f"with {third} they [have|own|get]", [made_by[third], last])
    return p.ask(total, f"They have # {things}.", f"How many {things} do they have in total?",
                 f"How many {things} do all three have?")


def rate_problem(p):
    who, (does, unit) = p.rng.choice(NAMES), p.rng.choice(WORK)
    a, days1, c, days2 = (p.rng.randint(2, 9) for _ in range(4))
    p.say(f"{who} {does} {a} {unit} a day for {days1} days and then {c} {unit} a day for {days2} days.",
          f"For {days1} days {who} {does} {a} {unit} each day, and for {days2} days {c} {unit} each day.")
    last, value = sum_of_products(p, a, days1, f"[the|all|these] {days1} days [give|make|bring]",
                                  c, days2, f"[the|all|these] {days2} days [give|make|bring]")
    if p.rng.random() < 0.6 and value < LIMIT:
        goal = p.rng.randint(value + 1, LIMIT)
        p.say(f"The goal is {goal} {unit}.", f"{who} wants to reach {goal} {unit}.")
        _, value = p.step(goal, "-", value, "the [difference|gap|rest] [is|makes|gives]", [last])
        return p.ask(value, f"There are # {unit} left.", f"How many {unit} are left?",
                     f"How many {unit} are still missing?")
    return p.ask(value, f"The total is # {unit}.", f"How many {unit} is that in total?", f"How many {unit} are done?")


def drill_problem(p):
    """Bare arithmetic with a bare trace; in training only, mostly early, to learn the facts."""
    p.is_drill = True
    value, last = p.rng.randint(1, LIMIT), None
    text = str(value)
    for _ in range(p.rng.randint(3, 8)):
        op = p.rng.choice("++++----**//")
        b = p.rng.randint(*{"+": (1, max(1, LIMIT - value)), "-": (1, max(1, value)), "*": (2, 9), "/": (2, 9)}[op])
        try:
            last, value = p.step(value, op, b, needs=[last])
        except Reject:
            continue
        text += {"+": " plus ", "-": " minus ", "*": " times ", "/": " divided by "}[op] + str(b)
    if not p.steps:
        raise Reject
    return p.ask(value, "The result is #.", f"Start with {text}. What is the result?",
                 f"Compute {text}, step by step.")


FAMILIES = [chain_problem, two_people_problem, shop_problem, groups_problem, compare_problem, rate_problem]
HARD = [compare_problem]  # seen more often in training


def make_problem(rng, families=FAMILIES, drill_share=0.0):
    """A problem of a random family; each family as often as any other, however often its numbers do not fit."""
    family = drill_problem if rng.random() < drill_share else rng.choice(families)
    while True:
        try:
            problem = family(Problem(rng))
        except Reject:
            continue
        if problem.is_drill or len(problem.steps) >= 2:
            return problem


def make_held_out(seed, count, taken):
    """`count` word problems whose keys are not in `taken`; adds their keys to it."""
    rng, problems = random.Random(seed), []
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.key not in taken:
            taken.add(problem.key)
            problems.append(dict(question=problem.question, answer=problem.answer, steps=len(problem.steps)))
    return problems


# ------------------------------------------------------------------------------- 2. thinking, in words

OPENING = "[Okay|Well|Right|Sure], I [will|can|must|should] [think|work|count] [slowly|calmly|carefully]."
FIRST = "[First|Here|Initially], "
NEXT = "[Next|Then|Now|Afterwards], "
FINAL = ". [So|Thus|Hence|Therefore], the [answer|result|number] [is|equals|becomes] #."
RECAP = " [Checking|Verifying|Testing]: "
DONE = ". [Yes|Good|Right|Fine], #."

USUAL = 0.95    # how often the choices that change a trace's length or order go the usual way
FALL_OFF = 0.6  # each alternative of a slot is so much as likely as the one before it


def fill(template, rng, fall_off):
    """Replace every [a|b|c] by one of its alternatives.

    The first is the most likely, so that the largest entry of a concept token does not hang on rounding errors.
    """
    def choose(slot):
        alternatives = slot[1].split("|")
        return rng.choices(alternatives, [fall_off ** n for n in range(len(alternatives))])[0]
    return re.sub(r"\[([^\]]*\|[^\]]*)\]", choose, template)


def make_thinking(problem, plan_rng, word_rng, fall_off=FALL_OFF):
    """-> (work, tail).  The work ends with the last equation; thinking may be cut anywhere in the tail.

    `plan_rng` decides order and recap, `word_rng` fills the slots: two calls with equal plans and
    different words give texts of equal token length.
    """
    equations = [s.equation for s in problem.steps]
    if problem.is_drill:
        return ". ".join(equations), ".\n"
    order, left = [], list(range(len(equations)))
    while left:  # a random order that respects what each step needs, the natural one preferred
        ready = [i for i in left if not set(problem.steps[i].needs) & set(left)]
        i = ready[0] if plan_rng.random() < USUAL else plan_rng.choice(ready)
        order.append(i)
        left.remove(i)
    sentences = [(NEXT if n else FIRST) + f"{problem.steps[i].wording} {equations[i]}" for n, i in enumerate(order)]
    work = f"{OPENING} " + ". ".join(sentences)
    tail = FINAL
    if plan_rng.random() < USUAL:
        tail += RECAP + ", ".join(equations[i] for i in order) + DONE
    tail = tail.replace("#", str(problem.answer)) + "\n"
    return fill(work, word_rng, fall_off), fill(tail, word_rng, fall_off)


# ---------------------------------------------------------------------------------------- 3. tokenizer

SPECIALS = ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # Qwen's: every digit is a token of its own
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|assistant|>' + c + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}")
MAX_POSITIONS = 1024


def training_problems(rng, banned, drill_share):
    """Endless problems whose keys are not banned; drill_share() is asked anew for each."""
    while True:
        problem = make_problem(rng, FAMILIES + HARD, drill_share())
        if problem.key not in banned:
            yield problem


def train_tokenizer(seed, vocab_size, banned, out):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def corpus():
        rng = random.Random(seed)
        for problem in itertools.islice(training_problems(rng, banned, lambda: 0.1), 8000):
            yield problem.question
            yield "".join(make_thinking(problem, rng, rng, fall_off=1))  # rare words must become tokens too
            yield problem.answer_text

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tok.save(f"{out}/tokenizer.json")
    write_json(f"{out}/tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>",
        add_bos_token=False, add_eos_token=False, clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS, chat_template=CHAT_TEMPLATE))
    return tok


def check_alignment(tok, seed, count=3000):
    """Two wordings of one plan must have equally many tokens, and the same digits at the same places."""
    rng = random.Random(seed)
    digits = {tok.token_to_id(d) for d in "0123456789"}
    for n in range(count):
        problem = make_problem(rng)
        shapes = []
        for words in (1, 2, 3):
            work, tail = make_thinking(problem, random.Random(n), random.Random(words * count + n))
            ids = tok.encode(work + tail).ids
            parts = tok.encode(work).ids + tok.encode(tail).ids
            assert ids == parts, f"tokens span the border of work and tail: {work!r} {tail!r}"
            shapes.append([i if i in digits else None for i in ids])
        assert shapes[0] == shapes[1] == shapes[2], f"wordings out of step, the last one is: {work + tail}"
    print(f"alignment: 3 wordings each of {count} traces have equal token lengths and digit places", flush=True)


# -------------------------------------------------------------------------------------------- 4. model


class Block(nn.Module):
    """A decoder layer of Qwen3; module names are Hugging Face's, so that state_dict() is the export."""

    def __init__(self, c):
        super().__init__()
        hidden, ffn, self.head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        q_width = c["num_attention_heads"] * self.head_dim
        kv_width = c["num_key_value_heads"] * self.head_dim
        self.group = c["num_attention_heads"] // c["num_key_value_heads"]
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for module, name, width_in, width_out in (
                (self.self_attn, "q_proj", hidden, q_width), (self.self_attn, "k_proj", hidden, kv_width),
                (self.self_attn, "v_proj", hidden, kv_width), (self.self_attn, "o_proj", q_width, hidden),
                (self.mlp, "gate_proj", hidden, ffn), (self.mlp, "up_proj", hidden, ffn),
                (self.mlp, "down_proj", ffn, hidden)):
            setattr(module, name, nn.Linear(width_in, width_out, bias=False))
        self.self_attn.q_norm = nn.RMSNorm(self.head_dim, c["rms_norm_eps"])
        self.self_attn.k_norm = nn.RMSNorm(self.head_dim, c["rms_norm_eps"])
        self.input_layernorm = nn.RMSNorm(hidden, c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(hidden, c["rms_norm_eps"])

    def forward(self, x, cos, sin):  # x [B, T, hidden]; cos, sin [T, head_dim]
        attn, mlp, half = self.self_attn, self.mlp, self.head_dim // 2

        def heads(y):
            return y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2)

        def rotate(y):
            return y * cos + torch.cat((-y[..., half:], y[..., :half]), -1) * sin

        y = self.input_layernorm(x)
        q, k, v = heads(attn.q_proj(y)), heads(attn.k_proj(y)), heads(attn.v_proj(y))
        q, k = rotate(attn.q_norm(q)), rotate(attn.k_norm(k))
        k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class TinyQwen3(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden, layers = c["hidden_size"], c["num_hidden_layers"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(layers))
        self.model.norm = nn.RMSNorm(hidden, c["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, c["vocab_size"], bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = p.shape[1] ** -0.5
                if "embed" in name or "lm_head" in name:
                    std *= 0.5
                if "o_proj" in name or "down_proj" in name:  # they add to the residual stream
                    std /= math.sqrt(2 * layers)
                nn.init.normal_(p, 0, std)
        d = c["head_dim"]
        angle = torch.outer(torch.arange(float(MAX_POSITIONS)), c["rope_theta"] ** (-torch.arange(0, d, 2) / d))
        angle = torch.cat((angle, angle), -1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids, wanted):
        """Logits of the positions where the boolean mask `wanted` [B, T] is set."""
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            x = block(x, self.cos[:ids.shape[1]], self.sin[:ids.shape[1]])
        return self.lm_head(self.model.norm(x[wanted]))


# -------------------------------------------------------------------------------------- 5. the stream

CUT_SHARE = 0.12     # samples whose thinking is cut short, so that the answer survives a cold stop
DIGIT_WEIGHT = 2.0   # weight of a digit in the loss; words weigh 1, the prompt 0
DRILL_START, DRILL_END, DRILL_UNTIL = 0.5, 0.05, 0.6  # share of drills: falls linearly until 60 % of the run


def encode_sample(sp, question, work, tail, answer, cut, is_digit):
    """Token ids and loss weights of one sample; `cut` is how many tokens of the tail remain, or None."""
    prompt = [sp["<|begin|>"], sp["<|user|>"], *question, sp["<|assistant|>"], sp["<think>"]]
    thinking = work + (tail if cut is None else tail[:cut])
    ids = np.array([*prompt, *thinking, sp["</think>"], *answer, sp["<|end|>"]])
    weights = np.where(is_digit[ids], DIGIT_WEIGHT, 1.0).astype(np.float32)
    weights[:len(prompt) + 1] = 0  # the prompt ends with the line break after <think>
    if cut is not None:
        weights[len(prompt) + len(thinking)] = 0  # learn to go on after a cut, not to cut
    return ids, weights


def batches(tok, rng, batch_size, banned, drill_share):
    """Endless fresh samples as (ids [B, T], loss weights [B, T]), of similar length within a batch."""
    sp = {t: tok.token_to_id(t) for t in SPECIALS}
    is_digit = np.zeros(tok.get_vocab_size(), bool)
    is_digit[[tok.token_to_id(d) for d in "0123456789"]] = True
    problems = training_problems(rng, banned, drill_share)

    def encode(texts):
        return [e.ids for e in tok.encode_batch(texts, add_special_tokens=False)]

    while True:
        block = list(itertools.islice(problems, batch_size * 32))
        thoughts = [make_thinking(p, rng, rng) for p in block]
        parts = zip(encode([p.question for p in block]), encode(["\n" + work for work, _ in thoughts]),
                    encode([tail for _, tail in thoughts]), encode(["\n\n" + p.answer_text for p in block]))
        samples = []
        for question, work, tail, answer in parts:
            cut = rng.randrange(len(tail)) if rng.random() < CUT_SHARE else None
            samples.append(encode_sample(sp, question, work, tail, answer, cut, is_digit))
        samples.sort(key=lambda s: len(s[0]))
        groups = [samples[i:i + batch_size] for i in range(0, len(samples), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group)
            ids = np.full((batch_size, length), sp["<|end|>"])
            weights = np.zeros((batch_size, length), np.float32)
            for row, (i, w) in enumerate(group):
                ids[row, :len(i)], weights[row, :len(w)] = i, w
            yield torch.from_numpy(ids), torch.from_numpy(weights)


# --------------------------------------------------------------------------- 6. export, measure, train


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


def export(model, config, tok, out):
    from safetensors.torch import save_file
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, f"{out}/model.safetensors.tmp", metadata={"format": "pt"})
    os.chmod(f"{out}/model.safetensors.tmp", 0o644)
    os.replace(f"{out}/model.safetensors.tmp", f"{out}/model.safetensors")  # a reader never sees half a file
    ids = dict(bos_token_id=tok.token_to_id("<|begin|>"), eos_token_id=tok.token_to_id("<|end|>"))
    write_json(f"{out}/config.json", dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", **config, hidden_act="silu",
        max_position_embeddings=MAX_POSITIONS, attention_bias=False, attention_dropout=0.0,
        tie_word_embeddings=False, use_sliding_window=False, sliding_window=None, torch_dtype="bfloat16", **ids))
    write_json(f"{out}/generation_config.json", dict(
        **ids, pad_token_id=ids["eos_token_id"], do_sample=True, temperature=0.6, top_p=0.95))


def measure(out, problems_file):
    """Greedy accuracy of the exported model, by transformers in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with open(problems_file) as f:
        problems = [json.loads(line) for line in f]
    tok = AutoTokenizer.from_pretrained(out, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    prompts = [tok.apply_chat_template([dict(role="user", content=p["question"])], tokenize=False,
                                       add_generation_prompt=True) for p in problems]
    inputs = tok(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        ids = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask,
                             max_new_tokens=300, do_sample=False)
    texts = tok.batch_decode(ids[:, inputs.input_ids.shape[1]:])
    right = sum(re.findall(r"boxed\{(\d+)\}", t)[:1] == [str(p["answer"])] for t, p in zip(texts, problems))
    print(f"greedy accuracy on the {len(problems)} of {os.path.basename(problems_file)}: "
          f"{right / len(problems):.3f}", flush=True)
    print(f"the first one:\n{prompts[0]}{texts[0].split('<|end|>')[0]}", flush=True)


def train(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    os.makedirs(args.out, exist_ok=True)

    banned = set()
    for name, seed in (("dev", args.seed + 1000), ("test", args.seed + 2000)):
        problems = make_held_out(seed, 500, banned)
        with open(f"{args.out}/problems_{name}.jsonl", "w") as f:
            f.writelines(json.dumps(p) + "\n" for p in problems)
    assert len(banned) == 1000

    for problem in itertools.islice(training_problems(random.Random(args.seed), banned, lambda: 0.05), args.show):
        print(problem.question, *make_thinking(problem, problem.rng, problem.rng), problem.answer_text, "", sep="\n")
    tok = train_tokenizer(args.seed, args.vocab, banned, args.out)
    check_alignment(tok, args.seed + 3000)
    if args.show:
        return

    config = dict(vocab_size=tok.get_vocab_size(), hidden_size=args.hidden, intermediate_size=args.ffn,
                  num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
                  rope_theta=10000.0, rms_norm_eps=1e-6)
    model = TinyQwen3(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", config, flush=True)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.05), dict(params=gains, weight_decay=0.0)],
                                  lr=args.lr, betas=(0.9, 0.98), fused=True)

    progress = 0.0  # 0 .. 1, by steps, or by time if the clock runs faster

    def drill_share():
        return DRILL_START + (DRILL_END - DRILL_START) * min(1.0, progress / DRILL_UNTIL)

    def learning_rate(step):
        return args.lr * min(1.0, step / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    start = exported = time.time()
    mean_loss = mean_digit_loss = 0.0
    stream = batches(tok, random.Random(args.seed), args.batch, banned, drill_share)
    for step, (ids, weights) in enumerate(stream, 1):
        progress = min(1.0, max(step / args.steps, (time.time() - start) / (60 * args.minutes)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        wanted = weights[:, 1:] > 0
        target, weight = ids[:, 1:][wanted], weights[:, 1:][wanted]
        loss_per_token = F.cross_entropy(model(ids[:, :-1], wanted), target, reduction="none")
        loss = (loss_per_token * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        keep = 0.98 if step > 50 else 1 - 1 / step  # running means
        mean_loss = keep * mean_loss + (1 - keep) * loss.item()
        digit_loss = loss_per_token[weight == DIGIT_WEIGHT].mean().item()
        mean_digit_loss = keep * mean_digit_loss + (1 - keep) * digit_loss
        if step % 50 == 0:
            print(f"{step} loss {mean_loss:.4f} digits {mean_digit_loss:.4f} lr {learning_rate(step):.1e} "
                  f"drills {drill_share():.2f} {(time.time() - start) / 60:.1f} min", flush=True)
        if progress == 1 or time.time() - exported > 240:
            export(model, config, tok, args.out)
            exported = time.time()
        if progress == 1:
            break
    measure(args.out, f"{args.out}/problems_dev.jsonl")


def main():
    a = argparse.ArgumentParser(description="Train models/tiny from scratch (see the head of this file).")
    a.add_argument("--out", default=HERE, help="where model, tokenizer and problems go (default: beside this file)")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--threads", type=int, default=2)
    a.add_argument("--steps", type=int, default=4500)
    a.add_argument("--minutes", type=float, default=1e9, help="finish the schedule by then, whatever the step")
    a.add_argument("--batch", type=int, default=16)
    a.add_argument("--lr", type=float, default=3e-3)
    a.add_argument("--vocab", type=int, default=768)
    a.add_argument("--layers", type=int, default=4)
    a.add_argument("--hidden", type=int, default=192)
    a.add_argument("--ffn", type=int, default=384)
    a.add_argument("--show", type=int, default=0, help="print examples, check the tokenizer, and stop")
    a.add_argument("--test", action="store_true", help="measure the model in --out on the test problems, and stop")
    args = a.parse_args()
    if args.test:
        measure(args.out, f"{args.out}/problems_test.jsonl")
    else:
        train(args)


if __name__ == "__main__":
    main()
