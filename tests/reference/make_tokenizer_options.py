#!/usr/bin/env python3
"""Make tests/data/golden/tokenizer_options.jsonl with Hugging Face tokenizers: what each option of a
tokenizer.json does, on variations of tests/data/tokenizers/small.

    python make_tokenizer_options.py

One variation a line: {"name", "set": {top-level members that replace the file's}, "model": {members of "model"
that are set}, "drop": tokens taken out of the vocabulary (with their merges), "add": entries appended to
"added_tokens", "cases": [[text, ids, ids with special tokens, decoded], ...]}.
"""
import copy
import json
import lzma
import os

from tokenizers import Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.normpath(f"{HERE}/../data/golden/tokenizer_options.jsonl")
BASE = os.path.normpath(f"{HERE}/../data/tokenizers/small.tokenizer.json.xz")

TEXTS = [
    "", " ", "Mia has 12 pens, 3456 cups.", " two  spaces\n\nand\tlines  ", "the-final--countdown--", "--a-b", "don't SHE'LL x'\u017f",
    "caf\u00e9 cafe\u0301 \u212b \ufb01 \u2460\u00bd", "\u4f60\u597d\u3002\u3053\u3093 \uff01x", "a<think>b </think>  c<|end|> d", "1234567 \u0661\u0662\u0663x9",
    "  MASK  MASK xMASK MASKx \u2003MASK\u3000.", "[sep]a[SEP]\n\n[sep]", "$5+5=10^1 `~|<>", "!foo ?bar #42 (x)_y", "\r\n\r\n a\r", "\x04\x00z", "a_b __init__ \U0001f600\U0001f468\u200d\U0001f469",
]


def byte_level(prefix=False, regex=False):
    return dict(type="ByteLevel", add_prefix_space=prefix, trim_offsets=True, use_regex=regex)


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return dict(type="Split", pattern={kind: pattern}, behavior=behavior, invert=invert)


def sequence(*steps):
    return dict(type="Sequence", pretokenizers=list(steps))


def token(content, id, **flags):
    return dict(dict(id=id, content=content, single_word=False, lstrip=False, rstrip=False, normalized=False, special=False), **flags)


def template(single, ids):
    return dict(type="TemplateProcessing", single=[{"Sequence": dict(id="A", type_id=0)} if s == "$A" else {"SpecialToken": dict(id=s, type_id=0)} for s in single],
                pair=[{"Sequence": dict(id="A", type_id=0)}, {"Sequence": dict(id="B", type_id=1)}], special_tokens={s: dict(id=s, ids=i, tokens=[s] * len(i)) for s, i in ids.items()})


DEEPSEEK_V3 = sequence(
    split("\\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
    split("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"), byte_level())
O200K = ("[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
NFC = dict(type="NFC")


def variations():
    yield "as is", {}
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            yield f"split - {behavior} {invert}", dict(set=dict(pre_tokenizer=sequence(split("-", behavior, invert, "String"), byte_level())))
            yield f"split \\s|\\d {behavior} {invert}", dict(set=dict(pre_tokenizer=sequence(split("\\s|\\d", behavior, invert), byte_level())))
    yield "split empty matches", dict(set=dict(pre_tokenizer=sequence(split("x*"), byte_level())))
    yield "split empty matches, previous", dict(set=dict(pre_tokenizer=sequence(split("(?=[A-Z])", "MergedWithPrevious"), byte_level())))
    yield "split string of specials", dict(set=dict(pre_tokenizer=sequence(split("+5", "Isolated", False, "String"), byte_level())))
    yield "lines", dict(set=dict(pre_tokenizer=sequence(split("^.|.$", "Removed"), byte_level())))
    yield "words", dict(set=dict(pre_tokenizer=sequence(split("\\w+|\\W", "Isolated"), byte_level())))
    yield "not spaces", dict(set=dict(pre_tokenizer=sequence(split("[^\\S\\n]+|\\S|\\h", "Removed"), byte_level())))
    yield "scripts", dict(set=dict(pre_tokenizer=sequence(split("[\\p{Han}\\p{Hiragana}]+|\\P{L}|\\p{^Lu}", "Contiguous"), byte_level())))
    yield "gpt2", dict(set=dict(pre_tokenizer=byte_level(False, True)))
    yield "gpt2 prefix", dict(set=dict(pre_tokenizer=byte_level(True, True)))
    yield "prefix space of every piece", dict(set=dict(pre_tokenizer=sequence(split("\\d"), byte_level(True, False))))
    yield "smollm", dict(set=dict(pre_tokenizer=sequence(dict(type="Digits", individual_digits=True), byte_level(False, True))))
    yield "digits together", dict(set=dict(pre_tokenizer=sequence(dict(type="Digits", individual_digits=False), byte_level(False, True))))
    yield "punctuation", dict(set=dict(pre_tokenizer=sequence(dict(type="Punctuation", behavior="Isolated"), byte_level())))
    yield "falcon", dict(set=dict(pre_tokenizer=sequence(dict(type="Punctuation", behavior="Contiguous"), byte_level(False, True), dict(type="Digits", individual_digits=False), split("[0-9][0-9][0-9]"))))
    yield "deepseek-v3", dict(set=dict(pre_tokenizer=DEEPSEEK_V3, normalizer=dict(type="Sequence", normalizers=[])))
    yield "o200k", dict(set=dict(pre_tokenizer=sequence(split(O200K), byte_level())))
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        yield form, dict(set=dict(normalizer=dict(type=form)))
    yield "prepend", dict(set=dict(normalizer=dict(type="Prepend", prepend="_ ")))
    yield "replace string", dict(set=dict(normalizer=dict(type="Sequence", normalizers=[dict(type="Replace", pattern={"String": "a"}, content="bb"), NFC])))
    yield "replace regex", dict(set=dict(normalizer=dict(type="Replace", pattern={"Regex": " {2,}|\\d+"}, content="")))
    flags = [dict(), dict(lstrip=True), dict(rstrip=True), dict(lstrip=True, rstrip=True), dict(single_word=True), dict(single_word=True, lstrip=True, rstrip=True), dict(normalized=True), dict(special=True, normalized=True)]
    for f in flags:
        yield f"added {f}", dict(add=[token("MASK", 768, **f), token("[sep]", 769, **f), token("\u00e9x", 770, **f)], set=dict(normalizer=NFC))
    yield "added, normalized form", dict(add=[token("[SEP]", 768, normalized=True), token("cafe\u0301", 769, normalized=True)], set=dict(normalizer=NFC))
    yield "added, longest", dict(add=[token("<thi", 768), token("k>b", 769), token("a<", 770), token("\n\n", 771), token("  ", 772)])
    yield "added, in the vocabulary", dict(add=[token("he", -1), token("\u00e9", -1), token("\u0120t", -1)])
    yield "added twice", dict(add=[token("MASK", 768), token("MASK", 768, lstrip=True), token("[sep]", 769, rstrip=True), token("[sep]", 769)])
    yield "added twice, special", dict(add=[token("MASK", 768, special=True), token("MASK", 768, single_word=True), token("[sep]", 769), token("[sep]", 769, lstrip=True, special=True)])
    yield "added twice, normalized", dict(add=[token("[SEP]", 768, normalized=True, special=True), token("[SEP]", 768)], set=dict(normalizer=dict(type="Replace", pattern={"String": "[s"}, content="[S")))
    yield "post: around", dict(set=dict(post_processor=template(["<|begin|>", "$A", "<|end|>"], {"<|begin|>": [0], "<|end|>": [3, 5]})))
    yield "post: sequence", dict(set=dict(post_processor=dict(type="Sequence", processors=[byte_level(), template(["$A", "<|end|>"], {"<|end|>": [3]}), byte_level()])))
    yield "post: roberta", dict(set=dict(post_processor=dict(type="RobertaProcessing", sep=["<|end|>", 3], cls=["<|begin|>", 0], trim_offsets=True, add_prefix_space=False)))
    yield "ignore merges", dict(model=dict(ignore_merges=True))
    drop = ["z", "\u010a", "\u00a9", "x"]
    yield "characters without token", dict(drop=drop)
    yield "unk", dict(drop=drop, model=dict(unk_token="<|user|>"), add=[])
    yield "unk fused", dict(drop=drop, model=dict(unk_token="<|user|>", fuse_unk=True))
    yield "byte fallback without tokens", dict(drop=drop, model=dict(unk_token="<|user|>", byte_fallback=True))
    yield "decoder sequence", dict(set=dict(decoder=dict(type="Sequence", decoders=[byte_level(), dict(type="Fuse")])))


def build(base, change):
    """The tokenizer.json of one variation; tests/c_tokenizer.c does the same."""
    j = copy.deepcopy(base)
    j.update(change.get("set", {}))
    j["model"].update(change.get("model", {}))
    drop = set(change.get("drop", []))
    if drop:
        j["model"]["vocab"] = {t: i for t, i in j["model"]["vocab"].items() if not drop & set(t)}
        j["model"]["merges"] = [m for m in j["model"]["merges"] if not drop & set("".join(m))]
    for entry in change.get("add", []):
        if entry["id"] < 0:
            entry["id"] = j["model"]["vocab"][entry["content"]]
        j["added_tokens"].append(entry)
    return j


def main():
    with lzma.open(BASE) as f:
        base = json.load(f)
    count = 0
    with open(OUT, "w") as out:
        for name, change in variations():
            tok = Tokenizer.from_str(json.dumps(build(base, change)))
            cases = []
            for text in TEXTS:
                ids = tok.encode(text, add_special_tokens=False).ids
                cases.append([text, ids, tok.encode(text, add_special_tokens=True).ids, tok.decode(ids, skip_special_tokens=False)])
            count += len(cases)
            out.write(json.dumps(dict(name=name, **change, cases=cases), ensure_ascii=False, separators=(",", ":")) + "\n")
    print(count, "cases")


if __name__ == "__main__":
    main()
