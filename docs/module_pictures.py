"""Pictures of what the trainable layers attend, from their own plans and masks: ``python docs/module_pictures.py``."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from gossamer.modules import links, plan_of_connections, plan_of_scores
from gossamer.modules.combiner import plans_of_spans
from gossamer.modules.routing import members
from gossamer.modules.seqboat import compacted, plan_of_window
from gossamer.modules.sparsifiner import ConnectivityPredictor
from gossamer.modules.tokens import Tokens
from gossamer.plan import Extent, SparsePlan
from gossamer.report.svg import PALETTE, Panel, svg_file

PICTURES = Path(__file__).resolve().parent / "images" / "modules"
TOKENS = 40
_CELL, _TOP, _GAP = 6, 20, 24


@dataclass(frozen=True)
class Map:
    """Which query (row) attends which key (column), one kind a colour; a pair has the colour of the first that has it.

    Fields:
        kinds: bool ``[T, T]`` by what they are called.
    """

    title: str
    kinds: dict[str, Tensor]


def picture(maps: list[Map]) -> Panel:
    """Maps side by side, with the names of their colours below."""
    size = max(len(mask) for one in maps for mask in one.kinds.values()) * _CELL
    width = len(maps) * size + (len(maps) - 1) * _GAP + 2
    lines = max(len(one.kinds) for one in maps)
    panel = Panel(width, _TOP + size + 8 + 16 * lines, "; ".join(one.title for one in maps))
    for n, one in enumerate(maps):
        left = 1 + n * (size + _GAP)
        panel.text(left + size / 2, 13, one.title)
        panel.rect(left, _TOP, size, size, "#f4f4f4", stroke="#bbb")
        kind = torch.zeros(size // _CELL, size // _CELL, dtype=torch.int64)
        for number, mask in reversed(list(enumerate(one.kinds.values(), 1))):
            kind[: len(mask), : len(mask)][mask] = number
        for i, row in enumerate(kind.tolist()):
            start = 0
            for number, run in groupby(row):
                length = len(list(run))
                if number:
                    x, y = left + start * _CELL, _TOP + i * _CELL
                    panel.rect(x, y, length * _CELL - 0.5, _CELL - 0.5, PALETTE[number - 1])
                start += length
        for number, name in enumerate(one.kinds):
            y = _TOP + size + 16 + 16 * number
            panel.rect(left, y - 8, 10, 10, PALETTE[number])
            panel.text(left + 15, y + 1, name, "start")
    return panel


def _pairs(plan: SparsePlan) -> Tensor:
    return plan.to_mask()[0, 0]


def combiner(span: int = 8) -> list[Map]:
    near, far = plans_of_spans(Tokens.of(torch.zeros(1, TOKENS, 1)), 1, span, causal=True)
    spans = _pairs(far).repeat_interleave(span, 1)[:, :TOKENS]
    return [Map("Combiner, spans of 8", {"a key by itself": _pairs(near), "a span by its summary": spans})]


def routing(window: int = 10) -> list[Map]:
    extent = Extent.full(1, TOKENS, TOKENS)
    local = SparsePlan(heads=1, query_len=TOKENS, key_len=TOKENS, extent=extent, window=window)
    place = torch.arange(TOKENS)
    # What each token is about changes from one to the next.
    scores = torch.stack([torch.cos((place * 7 % 12) / 12 * 6.28 - 1.57 * c) for c in range(4)], -1)
    chosen = members(scores[None, None], torch.ones(1, TOKENS, dtype=torch.bool), window)[0, 0]
    clusters = {}
    for n, tokens in enumerate(chosen):
        mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
        mask[tokens[:, None], tokens] = tokens[:, None] >= tokens
        clusters[f"cluster {n + 1}"] = mask
    return [Map("Routing, a local head", {"a window": _pairs(local)}), Map("Routing, clusters", clusters)]


def seqboat(window: int = 4) -> list[Map]:
    active = (torch.arange(TOKENS) * 11 % 13 < 5)[None]
    at, counts = compacted(active)
    pairs = _pairs(plan_of_window(counts, at.shape[1], window, causal=True))
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    mask[at[0][:, None], at[0]] = pairs
    short = {"the four before, and itself": pairs}
    return [Map("SeqBoat, activated tokens", short), Map("SeqBoat, where they lie", {"attended": mask})]


def sparsifiner(side: int = 6) -> list[Map]:
    tokens = side * side + 1
    spot = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1).float()
    # As if each patch were predicted to look at its like: its neighbours, and the same ones on the other side.
    near = torch.exp(-torch.cdist(spot, spot)) + 0.6 * torch.exp(-torch.cdist(spot, side - 1 - spot))
    predicted = torch.nn.functional.pad(near, (1, 0), value=0.5)[None, None]
    chosen = ConnectivityPredictor(tokens, 1, 4).choose(predicted)
    mask = _pairs(plan_of_connections(chosen))
    first = torch.zeros_like(mask)
    first[0] = True
    return [Map("Sparsifiner, 36 patches", {"the class token, all": first, "the best quarter": mask})]


def orion_msp(special: int = 8) -> list[Map]:
    def kinds(window: int | None) -> dict[str, Tensor]:
        without = {random: links(TOKENS, special, window, random) for random in (0, 2)}
        near = links(TOKENS, 0, window, 0)
        return {
            "special tokens": (torch.arange(TOKENS) < special)[:, None] | (torch.arange(TOKENS) < special),
            "itself" if window is None else "a window, and itself": near,
            "random links": without[2] & ~without[0],
        }

    return [Map("Orion-MSP, as meant", kinds(8)), Map("Orion-MSP, as released", kinds(None))]


def dynamic_mask(keep: int = 8) -> list[Map]:
    scores = (torch.arange(TOKENS) * 17 % 23).float()[None, None]
    plans = {
        per: plan_of_scores(scores, Extent.full(1, TOKENS, TOKENS), TOKENS, keep=keep, per=per, shared=1)
        for per in ("query", "sequence")
    }
    titles = {"query": "Dynamic mask, by query", "sequence": "Dynamic mask, by sequence"}
    return [Map(titles[per], {f"the best {keep} keys": _pairs(plan)}) for per, plan in plans.items()]


DRAWN = {
    "combiner": combiner,
    "dynamic_mask": dynamic_mask,
    "orion_msp": orion_msp,
    "routing": routing,
    "seqboat": seqboat,
    "sparsifiner": sparsifiner,
}


def draw(name: str) -> str:
    """A picture as SVG."""
    return svg_file(picture(DRAWN[name]()))


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name in DRAWN:
        (PICTURES / f"{name}.svg").write_text(draw(name), encoding="utf-8")
