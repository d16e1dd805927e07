"""Whether a model of your own answers as with vLLM's kernel when plans have all pairs.

    python tests/integrations/vllm_plugin/equal.py MODEL [--dtype float32] [--longest 6000] [--tokens 16]

Texts of the repository, of mixed lengths, in chunks of 2,048 tokens and then with prefixes that the cache has: greedy
tokens of the stock engine beside those with a plan of all pairs for every row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from integrations.vllm_plugin.serving import FULL, counted, run, tokens
from transformers import AutoTokenizer

from gossamer.evaluate.haystack import load_haystack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--longest", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    longest = arguments.longest
    text = load_haystack().text
    ids: list[int] = AutoTokenizer.from_pretrained(arguments.model)(text[: 16 * longest])["input_ids"]
    first = [ids[3 * n : 3 * n + longest * share // 100] for n, share in enumerate((1, 10, 30, 60, 100))]
    second = [first[4][: longest // 2] + ids[-300:], first[3], first[2][: longest // 5] + ids[-90:]]
    args = {"dtype": arguments.dtype, "max_num_batched_tokens": 2048, "max_num_seqs": 8}
    args["max_model_len"] = longest + arguments.tokens + 300
    job = {"model": str(arguments.model), "waves": [first, second], "max_tokens": arguments.tokens, "args": args}
    stock, ours = run(job | {"gossamer": None}), run(job | {"gossamer": FULL})
    pairs = list(zip(tokens(ours), tokens(stock), strict=True))
    equal = sum(a == b for a, b in pairs)
    print(f"{counted(ours, path='sparse'):.0f} rows by a plan; {equal} of {len(pairs)} requests have the same tokens")
    if equal < len(pairs) or not counted(ours, path="sparse"):
        sys.exit(1)


if __name__ == "__main__":
    main()
