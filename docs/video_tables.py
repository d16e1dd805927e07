"""Tables of the small video model: what its clips lose (`gossamer eval-video`), and the papers' claims on it."""

from functools import partial
from pathlib import Path

from claim_tables import TABLES as CLAIMS
from claim_tables import Claims
from marked import markdown

from gossamer.evaluate.clips import clip_rows, clip_table
from gossamer.evaluate.summary import read_results

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."


def clips_table() -> str:
    """A row a setting, of each machine; profiles go by their name."""
    parts = []
    for path in sorted(RESULTS.glob("*/video_clips.jsonl")):
        header, *rows = clip_table(clip_rows(read_results(path)))
        named = [(f"`{named_shortly(row[0])}`", *row[1:]) for row in rows]
        parts.append(f"`{path.parent.name}`\n\n{markdown('', tuple(header), named)}")
    return "\n\n".join(parts) or NOT_MEASURED


def named_shortly(label: str) -> str:
    """A profile's name without its hash; without thresholds, which are the same for all."""
    return label.partition(".json(")[0].replace(",min_tokens=0", "").replace("(min_tokens=0)", "")


def claims_table(name: str) -> str:
    """Of each machine's file of `models/video_claims.py`."""
    files = sorted(RESULTS.glob("*/video_claims.jsonl"))
    return "\n\n".join(markdown(*CLAIMS[name](Claims(path))) for path in files) or NOT_MEASURED


TABLES = {"video_clips": clips_table, **{name: partial(claims_table, name) for name in CLAIMS}}
