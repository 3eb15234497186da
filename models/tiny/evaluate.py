#!/usr/bin/env python3
"""Problems in, `sfumato generate` input out; its output in, accuracy out.  Standard library only.

    python3 evaluate.py prepare --problems problems_dev.jsonl --n 100 --output in.jsonl
    sfumato generate --think soft --temperature 0 --input in.jsonl --output out.jsonl
    python3 evaluate.py score --problems problems_dev.jsonl --results out.jsonl

prepare keeps the problem's line number in custom_id, so score needs no particular order.  What a line does
not say comes from sfumato's flags: prepare adds only the question, and --max-tokens if given.
"""
import argparse
import collections
import json
import re
import statistics
import sys


def read_lines(path):
    with sys.stdin if path == "-" else open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def prepare(args):
    problems = read_lines(args.problems)[:args.n]
    with sys.stdout if args.output == "-" else open(args.output, "w", encoding="utf-8") as f:
        for number, problem in enumerate(problems, 1):
            body = {"custom_id": f"problem-{number}", "messages": [{"role": "user", "content": problem["question"]}]}
            if args.max_tokens:
                body["max_tokens"] = args.max_tokens
            f.write(json.dumps(body) + "\n")


def boxed(answer):
    """The number in the answer's first \\boxed{}, or None."""
    found = re.search(r"\\boxed\{\s*(-?\d+)\s*\}", answer or "")
    return int(found[1]) if found else None


def score(args):
    problems = read_lines(args.problems)
    right, errors, thinking, entropies, ends, by_steps = 0, 0, [], [], collections.Counter(), {}
    results = read_lines(args.results)
    for n, result in enumerate(results):
        number = re.fullmatch(r"problem-(\d+)", result.get("custom_id") or "")
        if not number or not 1 <= int(number[1]) <= len(problems):
            sys.exit(f"evaluate.py: {args.results}, line {n + 1}: custom_id {result.get('custom_id')!r} is not from prepare with this file")
        problem = problems[int(number[1]) - 1]
        if "error" in result:
            errors += 1
            print(f"problem {number[1]}: error: {result['error'].get('message')}")
            continue
        answer = boxed(result.get("answer"))
        good = answer == problem["answer"]
        length, end = result["usage"]["reasoning_tokens"], result["thinking_end"]
        right += good
        thinking.append(length)
        ends[end] += 1
        if result.get("mean_entropy") is not None:
            entropies.append(result["mean_entropy"])
        tally = by_steps.setdefault(problem["steps"], [0, 0])
        tally[0] += good
        tally[1] += 1
        if n < args.show:
            print(f"problem {number[1]}: {'right' if good else 'WRONG'}  says {answer}, is {problem['answer']}  "
                  f"({problem['steps']} steps, {length} thinking tokens, ended by {end})\n    {problem['question']}")
    done = len(results) - errors
    if not done:
        sys.exit("evaluate.py: no results to score")
    summary = {"problems": len(results), "errors": errors, "right": right, "accuracy": round(right / len(results), 4),
               "thinking_tokens": round(statistics.mean(thinking), 1), "cold_stop_share": round(ends["cold_stop"] / done, 4)}
    if args.json:
        print(json.dumps(summary))
        return
    print(f"accuracy          {100 * right / len(results):.1f} %  ({right} of {len(results)})")
    print("by steps          " + ", ".join(f"{k}: {a}/{b}" for k, (a, b) in sorted(by_steps.items())))
    print(f"thinking tokens   mean {statistics.mean(thinking):.1f}, median {statistics.median(thinking):.0f}, most {max(thinking)}")
    if entropies:
        print(f"mean entropy      {statistics.mean(entropies):.3f} nats")
    print("thinking ended by " + ", ".join(f"{k} {100 * v / done:.1f} %" for k, v in ends.most_common()))
    if errors:
        print(f"errors            {errors}")


def main():
    a = argparse.ArgumentParser(description="Accuracy of models/tiny with sfumato (see the head of this file).")
    commands = a.add_subparsers(required=True, metavar="prepare|score")
    p = commands.add_parser("prepare", help="problems -> input lines of sfumato generate")
    p.add_argument("--problems", required=True, help="problems_dev.jsonl or problems_test.jsonl")
    p.add_argument("--n", type=int, default=10 ** 9, help="only the first N")
    p.add_argument("--max-tokens", type=int)
    p.add_argument("--output", default="-")
    p.set_defaults(run=prepare)
    p = commands.add_parser("score", help="output lines of sfumato generate -> accuracy")
    p.add_argument("--problems", required=True, help="the file that prepare read")
    p.add_argument("--results", default="-")
    p.add_argument("--show", type=int, default=5, help="print the first few problems one by one")
    p.add_argument("--json", action="store_true", help="the summary as one JSON line")
    p.set_defaults(run=score)
    args = a.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
