#!/usr/bin/env python3
"""Make tests/data/golden/{tokenizer,decode,chat}.jsonl with Hugging Face tokenizers and transformers.

    python make_tokenizer.py [--only qwen3,...]        (run anywhere; paths are relative to this file)

Three tokenizers: llama3_1 (digits in groups of three, ignore_merges, a begin token), qwen3 (single
digits, NFC) and tiny (models/tiny).  One JSON object a line:

    tokenizer.jsonl  {"tokenizer","text","add_special","ids","decoded"}
                     ids = Tokenizer.encode(text, add_special_tokens=add_special)
                     decoded = Tokenizer.decode(ids, skip_special_tokens=False)
    decode.jsonl     {"tokenizer","ids","skip_special","decoded"}
                     ids that no text encodes to: cut characters, invalid UTF-8
    chat.jsonl       {"tokenizer","messages","add_generation_prompt","kwargs","text","ids"}
                     text = apply_chat_template(messages, **kwargs); ids = encode(text, no special tokens)

Texts hold only characters assigned in Unicode 14, so that PCRE2 10.42, utf8proc 2.8 and Hugging Face agree
on what a letter is, and no NUL.
"""
import argparse
import io
import json
import lzma
import os
import random
import tempfile
import unicodedata

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.normpath(f"{HERE}/../data")
TINY = os.path.normpath(f"{HERE}/../../models/tiny")

ENGLISH = [
    "", " ", "a", "Hello", "Hello, world!", " Hello", "Hello ", "  Hello  ", "The quick brown fox jumps over the lazy dog.",
    "I'm sure you've heard they'll say it's fine, but he'd rather we don't.",
    "I'M SURE YOU'VE HEARD THEY'LL SAY IT'S FINE, BUT HE'D RATHER WE DON'T.",
    "Rock 'n' roll, the '90s, o'clock, y'all'd've", "'s't're've'm'll'd", "'S'T'RE'VE'M'LL'D", "'Re'vE'Ll", "x'sy't",
    "it\u2019s a typographic apostrophe", "he'\u017f long s", "'\u017f", "a'\u017fb", "\u017f\u017f 'S'\u017f",
    "Mr. Smith-Jones (b. 1970) owes $1,234.56 to A&B Co.; 50% is due!", "e-mail: someone@example.org, see http://example.org/a?b=c#d",
    "ALLCAPS MixedCase camelCase snake_case kebab-case", "antidisestablishmentarianism pneumonoultramicroscopic",
    "Okay, let me think. First, 12+5=17. So the answer is 17.", "So, the number becomes 6.\n</think>\n\nThere are \\boxed{6} boxes.",
    "wait... what?! no -- really?? yes!!!", "\"Quoted,\" she said. 'Single.' \u201cCurly\u201d \u2018curly\u2019", "A.B.C. a.m. p.m. i.e. e.g.",
    "Let $x^2 + y^2 = z^2$ and \\frac{a}{b} \\leq \\sqrt{2}.", "tab\tseparated\tvalues", "trailing newline\n", "\nleading newline",
    "a\n\n\nb", "a\r\nb\r\n", "a\rb", "line one\nline two\n\nline four", "end with spaces   \n   start with spaces", "x \n y", "x  \n\n  y",
]
WHITESPACE = [
    "  ", "   ", "    ", " " * 7, " " * 16, " " * 33, " " * 100, "\t", "\t\t", "\t \t", " \t ", "\n", "\n\n", "\n\n\n", "\n" * 10, "\r\n", "\r\n\r\n",
    " \n", "\n ", " \n ", "  \n  \n  ", "\t\n\t", "a  b", "a   b", "a    b", "a \n b", "a\n b", "a \nb", "a\n\n  b", "a\t\tb", "a \t b", "  a", "   a",
    "\n  a", "\n\n   a\n", "a  ", "a   \n", " ,", "  ,", "   ,", " \n,", ",\n", ",\n\n", ", \n", ".\r\n", "!\n\n\n!", "1  2", "1 \n 2", "  1", "   12",
    "\u00a0", "a\u00a0b", "a\u00a0\u00a0b", "\u2003wide", "a\u3000b", "\u2028line\u2029para", "\u000b\u000c", "a\u000bb", "\u0085next", "\u200bzero\u200bwidth",
    "\ufeffbom", "a\u202fb", "\u1680ogham", "soft\u00adhyphen",
]
NUMBERS = [
    "0", "7", "42", "123", "1234", "12345", "123456", "1234567", "12345678901234567890", "3.14159", "-1", "+1", "1e-10", "0x1F", "1,000,000", "1/2", "50%",
    "2024-01-31T12:34:56Z", "a1b2c3", "1a2b", "v1.2.3", "1st 2nd 3rd", "x1234y", " 1234", "  1234", "\u00bd \u00b2 \u2163 \u2460", "\u0661\u0662\u0663\u0664",
    "\u0967\u0968\u0969\u096a\u096b", "\uff11\uff12\uff13\uff14", "\U0001d7d8\U0001d7d9\U0001d7da", "12\u00b3", "\u4e00\u4e8c\u4e09", "1 2 3 4", "12+34=46",
    "007", "1.", ".5", "#1", "100\u00b0C", "999999999999999999999999",
]
CODE = [
    "def f(x):\n    return x**2  # square\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }", "if(x){\n\ty();\n}\nelse\n{\n\tz();\n}\n",
    "#include <stdio.h>\n\nint main(void)\n{\n    printf(\"hi\\n\");\n    return 0;\n}\n", "SELECT * FROM t WHERE a='b' AND c<>1;", "<div class=\"a\">text</div>",
    "{\"k\": [1, 2, null], \"s\": \"\\u00e9\"}", "x = y if y else z; w = not x", "lambda x: (x, *xs, **kw)", "a->b.c::d<e>(f)", "!==", "=>", ">>>", "<<=", "&&||", "!!", "//", "/* */",
    "# Title\n\n- item\n- item\n\n```c\nint x;\n```\n", "\\begin{align}a&=b\\\\c&=d\\end{align}", "git commit -m 'fix: x'", "$HOME/.config/*.{json,yml}", "C:\\Users\\x", "__init__", "______",
    "----------", "==========", "**********", "~~~~", "....", "?!?!", "(((())))", "[[[]]]", "{{{}}}", "a_b_c", "_a", "a_", "@x #y $z %w ^v &u *t", "100%|\u2588\u2588\u2588|", "\x1b[31mred\x1b[0m",
    "\x01\x02\x7f", "fn main() -> Result<(), Box<dyn Error>> {", "x\u2212y \u00d7 z \u00f7 w \u2264 \u221e", "0b1010 0o17 0xff", "'''doc'''", "\"\"\"doc\"\"\"", "`a` ``b``",
]
SCRIPTS = [
    "Les \u00e9l\u00e8ves fran\u00e7ais ont d\u00e9j\u00e0 mang\u00e9 \u00e0 No\u00ebl.", "Gr\u00fc\u00dfe aus M\u00fcnchen, \u00c4rger, \u00d6l, STRASSE, stra\u00dfe", "El ni\u00f1o comi\u00f3 \u00bfqu\u00e9? \u00a1S\u00ed!",
    "Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 ja\u017a\u0144", "P\u0159\u00edli\u0161 \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148", "\u0130stanbul'da \u0131\u015f\u0131k", "Ti\u1ebfng Vi\u1ec7t c\u00f3 d\u1ea5u", "\u00cdslenska \u00fe\u00f0\u00e6\u00f6",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430? \u0421\u044a\u0435\u0448\u044c \u0435\u0449\u0451", "\u0423\u043a\u0440\u0430\u0457\u043d\u0441\u044c\u043a\u0430 \u043c\u043e\u0432\u0430 \u0457\u0454\u0456\u0491", "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac: \u03b1\u03b2\u03b3 \u03ac\u03ad\u03ae \u03c3\u03c2",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u0645\u064e\u0631\u0652\u062d\u064e\u0628\u064b\u0627", "\u0641\u0627\u0631\u0633\u06cc \u0645\u06cc\u200c\u062e\u0648\u0627\u0646\u0645",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", "\u0995\u09c7\u09ae\u09a8 \u0986\u099b\u09cb", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bb5\u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd", "\u0c24\u0c46\u0c32\u0c41\u0c17\u0c41", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01", "\u1019\u103c\u1014\u103a\u1019\u102c",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01", "\u6211\u4eec\u6765\u601d\u8003\u4e00\u4e0b\uff1a\u7b54\u6848\u662f42\u3002", "\u7e41\u9ad4\u4e2d\u6587\u5b57", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c", "\u30ab\u30bf\u30ab\u30ca\u3068\u3072\u3089\u304c\u306a\u3001\u6f22\u5b57\u3002", "\uff76\uff80\uff76\uff85 \uff28\uff25\uff2c\uff2c\uff2f",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4", "\u10e5\u10d0\u10e0\u10d7\u10e3\u10da\u10d8", "\u0540\u0561\u0575\u0565\u0580\u0565\u0576", "\u12a0\u121b\u122d\u129b", "\u1200\u1201 \u1203", "\U00010330\U00010331 Gothic", "\U00020000\U0002a6d6 CJK ext", "\u1e9e \ufb01 \ufb02 \u0149",
    "mixed \u4e2d\u6587and\u65e5\u672c\u8a9ewords", "\u0410bc\u0414ef", "na\u00efve caf\u00e9 r\u00e9sum\u00e9", "\u2126 \u212b \u212a", "\u2160\u2161\u2162 \u24d0\u24d1",
]
EMOJI = [
    "\U0001f600", "\U0001f600\U0001f601\U0001f602", "hi \U0001f44b there", "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", "\u2764\ufe0f \u2764", "1\ufe0f\u20e3", "\u2705 done \u274c no",
    "\U0001f914 thinking\u2026", "\u2192 \u21d2 \u2194", "\u2660\u2665\u2666\u2663", "\u2200x\u2208\u211d: \u2203y", "\u00a9\u00ae\u2122", "\u20ac100 \u00a350 \u00a5", "\u2014 dash \u2013 dash", "\u2022 bullet", "\u266b music",
]
COMBINING = [  # NFC matters: base + mark, several marks out of order, Hangul jamo, singletons, exclusions
    "e\u0301", "cafe\u0301", "A\u030a \u212b \u00c5", "n\u0303o", "u\u0308ber", "a\u0323\u0302", "a\u0302\u0323", "o\u031b\u0309", "s\u0323\u0307 s\u0307\u0323", "\u1100\u1161\u11a8", "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "\uac00\u11a8", "\u0915\u093c", "\u0958", "\u03b1\u0301\u0345", "\u0387 \u037e", "\u2126\u0301", "\ufb1d \u05d9\u05b4", "\u0344", "x\u0301\u0302\u0303\u0304", "\u0301alone", " \u0301", "1\u0301", "\U0001d15e", "\uf900 \u8c48", "\u1e69 s\u0323\u0307",
    "e\u0301\n\u0301e", "I\u0307stanbul", "\u30ab\u3099 \u304b\u3099", "\u0929 \u0928\u093c",
]
ADDED = [  # added tokens of all three models inside text: only the model's own become ids
    "<think>", "</think>", "<think>\n", "a<think>b</think>c", "<think>\n\n</think>\n\n", " <think> ", "<<think>>", "<think", "think>", "</think></think>", "<THINK>", "< think>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>", "<|im_end|><|im_end|>", "<|endoftext|>", "x<|endoftext|>y", "<|im_start|", "<tool_call>\n{}\n</tool_call>", "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
    "<|begin_of_text|>", "<|begin_of_text|>a", "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "<|eot_id|>", "<|reserved_special_token_0|>", "<|reserved_special_token_247|>", "<|reserved_special_token_248|>", "<|end_of_text|> x",
    "<|begin|><|user|>How many?<|assistant|><think>\n", "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "a <|end|> b", "<|end|", "e\u0301<think>e\u0301", "'s<think>'s", "  <|im_end|>  ", "\n<|eot_id|>\n", "<|vision_start|><|image_pad|><|vision_end|>",
]


def assigned(lo, hi):
    return [c for c in range(lo, hi) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co", "Cc")]


def random_texts(count, seed=20):
    rng = random.Random(seed)
    ranges = [assigned(0x20, 0x7f)] * 3 + [assigned(0xa0, 0x250), assigned(0x300, 0x370), assigned(0x370, 0x600), assigned(0x600, 0x1000),
              assigned(0x1000, 0x2000), assigned(0x2000, 0x2c00), assigned(0x3000, 0x3400), assigned(0x4e00, 0x5200), assigned(0xac00, 0xb000), assigned(0xf900, 0x10000),
              assigned(0x10000, 0x10500), assigned(0x1d100, 0x1d800), assigned(0x1f300, 0x1fa00), [0x20, 0x0a, 0x09, 0x0d], [0x20]]
    words = "the of and 's 't ll 12 3 7x \n \t , . ! ( ) think answer so".split(" ")
    for n in range(count):
        if n % 4 == 3:
            yield "".join(rng.choice(words) + rng.choice(["", " ", "  ", "\n"]) for _ in range(rng.randint(3, 14)))
        elif n % 4 == 2:
            chosen = rng.sample(ranges, 2) + [[0x20]]
            yield "".join(chr(rng.choice(rng.choice(chosen))) for _ in range(rng.randint(4, 16)))
        else:
            yield "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randint(1, 14)))


def all_texts():
    fixed = ENGLISH + WHITESPACE + NUMBERS + CODE + SCRIPTS + EMOJI + COMBINING + ADDED
    long = " ".join(ENGLISH[8:30])
    return list(dict.fromkeys(fixed + [long] + list(random_texts(80))))


def load(name, folder):
    """Unpack one tokenizer into a folder that transformers can read; returns (Tokenizer, folder)."""
    from tokenizers import Tokenizer
    if name == "tiny":
        return Tokenizer.from_file(f"{TINY}/tokenizer.json"), TINY
    os.makedirs(f"{folder}/{name}")
    for part in ("tokenizer", "tokenizer_config"):
        with lzma.open(f"{DATA}/tokenizers/{name}.{part}.json.xz") as f, open(f"{folder}/{name}/{part}.json", "wb") as g:
            g.write(f.read())
    return Tokenizer.from_file(f"{folder}/{name}/tokenizer.json"), f"{folder}/{name}"


U = dict(role="user", content="How many pens does Mia have?")
S = dict(role="system", content="You are terse.")
CHATS = [  # (messages, kwargs)
    ([U], {}), ([S, U], {}), ([U], {"add_generation_prompt": False}), ([U], {"enable_thinking": False}), ([U], {"enable_thinking": True}),
    ([S, U], {"enable_thinking": False}), ([U, dict(role="assistant", content="She has 3.")], {"add_generation_prompt": False}),
    ([U, dict(role="assistant", content="<think>\n1+2=3\n</think>\n\nShe has 3.")], {"add_generation_prompt": False}),
    ([U, dict(role="assistant", content="<think>\n1+2=3\n</think>\n\nShe has 3."), dict(role="user", content="Sure?")], {}),
    ([U, dict(role="assistant", content="She has 3.", reasoning_content="1+2=3"), dict(role="user", content="Sure?")], {}),
    ([U, dict(role="assistant", content="She has 3.", reasoning_content="1+2=3")], {"add_generation_prompt": False}),
    ([U, dict(role="assistant", content="a</think>b</think>c"), dict(role="user", content="and?")], {"enable_thinking": False}),
    ([S, U, dict(role="assistant", content="3"), dict(role="user", content="  spaces \n around  "), dict(role="assistant", content="ok\n"), dict(role="user", content="bye")], {}),
    ([dict(role="user", content="")], {}), ([dict(role="user", content="caf\u00e9 \U0001f600 \u4f60\u597d e\u0301")], {}),
    ([dict(role="user", content="a <think> b </think> c")], {}), ([dict(role="user", content="quote \" \\ {{ x }} {% y %} 'z'")], {}),
    ([dict(role="user", content="<tool_response>\n42\n</tool_response>")], {}), ([S], {}), ([dict(role="user", content="one"), dict(role="user", content="two")], {}),
    ([U, dict(role="system", content="Be kind."), dict(role="user", content="x")], {}),
    ([U, dict(role="assistant", content="calling"), dict(role="tool", content="42"), dict(role="tool", content="43")], {}),
    ([dict(role="user", content="Tom has 8 pens. Tom buys 4 more. Then Tom loses 2 pens. How many pens does Tom have now?")], {}),
]


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--only", default="llama3_1,qwen3,tiny")
    names = a.parse_args().only.split(",")
    from transformers import AutoTokenizer
    out = {k: io.StringIO() for k in ("tokenizer", "decode", "chat")}

    def emit(kind, **row):
        out[kind].write(json.dumps(row, separators=(",", ":")) + "\n")

    texts = all_texts()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            tok, path = load(name, folder)
            for n, text in enumerate(texts):
                for special in (False, True) if n % 10 == 0 or text in ADDED else (False,):
                    ids = tok.encode(text, add_special_tokens=special).ids
                    emit("tokenizer", tokenizer=name, text=text, add_special=special, ids=ids, decoded=tok.decode(ids, skip_special_tokens=False))
            rng = random.Random(name)
            for n in range(40):
                ids = tok.encode(rng.choice(SCRIPTS + EMOJI + ADDED + COMBINING), add_special_tokens=n % 3 == 0).ids if n % 2 else []
                ids = ids[rng.randint(0, 2):max(3, len(ids) - rng.randint(0, 2))] + [rng.randrange(tok.get_vocab_size()) for _ in range(rng.randint(0, 6))]
                for skip in (False, True):
                    emit("decode", tokenizer=name, ids=ids, skip_special=skip, decoded=tok.decode(ids, skip_special_tokens=skip))
            hf = AutoTokenizer.from_pretrained(path)
            for messages, options in CHATS:
                options = dict(options)
                generation = options.pop("add_generation_prompt", True)
                text = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **options)
                emit("chat", tokenizer=name, messages=messages, add_generation_prompt=generation, kwargs=options, text=text,
                     ids=tok.encode(text, add_special_tokens=False).ids)
    for kind, text in out.items():
        with open(f"{DATA}/golden/{kind}.jsonl", "w") as f:
            f.write(text.getvalue())
        print(kind, text.getvalue().count("\n"), "lines", len(text.getvalue()), "bytes")
    print(len(texts), "texts")


if __name__ == "__main__":
    main()
