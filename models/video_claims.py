"""What the papers on sparse video diffusion claim, tried on the small video model.

`python models/video_claims.py models/video --out claims.jsonl --profiles models/video/profiles`

Clips of a few prompts and seeds are sampled densely, and the attention of some steps is looked at on the way: masses of
blocks, errors of modes and plans on what each layer was given, so that errors do not add up. Lines of results:

* ``recall``: the mass that a mask found at one step keeps at another, of the same clip and of others (AdaSpa)
* ``drift``: how far log-sum-exps of an earlier step are from those of a later one (AdaSpa)
* ``search``: errors with and without adapted heads, with a cached and with a fresh LSE (AdaSpa)
* ``tiles``: reference frames beside windows, random and best blocks of the same number of pairs (Efficient-vDiT)
* ``modes``: error and density of each mode of each head (Sparse-vDiT); ``orders``: recall of the best blocks in each
  order of axes, and what the calibration says of it (PAROAttention)
* ``stretch``: whole clips that are sparse in the first quarter of the steps alone, or in the last

``--profiles`` writes methods by layer and head that the first prompts chose. ``docs/claim_tables.py`` makes
figures with intervals of the lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer import backends
from gossamer.calibrate.denoising import ModeSearch, OrderSearch
from gossamer.call import AttentionCall
from gossamer.evaluate.video import VideoModel, header_of, load_video_model
from gossamer.evaluate.video_quality import feature_distance, psnr, ssim
from gossamer.integrations.diffusers import enable
from gossamer.integrations.stats import Observation
from gossamer.methods import PARO, AdaSpa, AttentionTile, Dense, Method, OracleBlocks, RandomBlocks, WindowBlocks
from gossamer.methods.denoising import ORDERS, axis_order, layout_of, mass_of_blocks, reordered, step_of
from gossamer.oracle import log_sum_exp
from gossamer.plan import Grid, SparsePlan
from gossamer.policy import Policy
from gossamer.profiles import Profile, Provenance
from gossamer.rules import top_k

Record = dict[str, Any]
STEPS = 20
LOOKED = (1, 4, 8, 12, 16, 19)  # steps; 4 and 12 are searched, as 10 and 30 of 50 are in AdaSpa's paper
SEARCH = (4, 12)
TRIED = (1, 8, 16)  # steps at which modes, tiles and bounds are
ORDERED = (4, 12)  # steps at which orders of axes are
BLOCK = 64
SPARSITY = 0.8
DENSITIES = (0.1, 0.2, 0.3)
TILES = (1, 2, 4)
QUARTER = STEPS // 4
# The first half chooses modes and orders, the others judge them.
PROMPTS = ("red circle left", "blue triangle down and yellow square right", "white square up")
MODES = {"modes-15": 0.15, "modes-25": 0.25, "modes-40": 0.4}  # profiles by their density
SCORED = 8  # step at which maps are scored for the order of axes


@dataclass(frozen=True)
class During(Method):
    """A method at some steps, and all pairs at the others."""

    name: ClassVar[str] = "during"
    needs: ClassVar[frozenset[str]] = frozenset({"layout", "step", "state"})
    inner: Method
    first: int
    stop: int

    def plan(self, call: AttentionCall) -> SparsePlan:
        if self.first <= step_of(call).number < self.stop:
            return self.inner.plan(call)
        return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)


def relative(out: Tensor, exact: Tensor) -> float:
    """L2 error over the norm, mean over batch rows and heads."""
    error = (out.float() - exact.float()).norm(dim=(2, 3)) / exact.float().norm(dim=(2, 3)).clamp(min=1e-30)
    return float(error.mean())


def kept_rows(mass: Tensor, density: float) -> Tensor:
    """The best key blocks of each query block ``[..., M, N]``, bool."""
    return top_k(mass, max(1, round(density * mass.shape[-1])))


def share(mass: Tensor, mask: Tensor) -> Tensor:
    """Of the mass ``[B, H, M, N]`` that lies in a mask, ``[B, H]``."""
    return (mass * mask).sum(dim=(2, 3)) / mass.sum(dim=(2, 3)).clamp(min=1e-30)


class Look:
    """What is taken from one dense sampling. ``masses[step][layer]`` are ``[B, H, M, N]``."""

    def __init__(self) -> None:
        self.masses: dict[int, dict[int, Tensor]] = {}
        self.rows: list[Record] = []
        self.modes = ModeSearch(block=BLOCK)
        self.recalls: dict[int, list[Tensor]] = {}
        self._lse: dict[int, Tensor] = {}
        self._states: dict[Any, list[dict[Any, Any]]] = {}

    def __call__(self, observed: Observation) -> None:
        call, layer = observed.call, observed.call.layer
        if layer is None or step_of(call).number not in LOOKED:
            return
        step, lse = step_of(call).number, log_sum_exp(call)
        grid = Grid(call.extent, BLOCK, BLOCK)
        mass = mass_of_blocks(call, grid, lse)
        self.masses.setdefault(step, {})[layer] = mass
        if step == SEARCH[0]:
            self._lse[layer] = lse
        elif step > SEARCH[0]:
            self._drift(call, grid, step, layer, lse)
        self._search(observed, step, layer)
        if step in TRIED:
            self._tiles(observed, step, layer, mass)
            self.modes(observed)
        if step in ORDERED:
            self._orders(call, layer, lse)

    def _drift(self, call: AttentionCall, grid: Grid, step: int, layer: int, lse: Tensor) -> None:
        change = (lse - self._lse[layer]).double()
        whole = mass_of_blocks(call, grid, self._lse[layer]).sum(dim=3) / BLOCK  # 1 with the LSE of this step
        row = {"what": "drift", "step": step, "layer": layer, "mean": float(change.abs().mean())}
        row |= {"sums": float((whole - 1).abs().mean()), "log_sums": float(whole.clamp(min=1e-30).log().abs().mean())}
        self.rows.append(row)

    def _search(self, observed: Observation, step: int, layer: int) -> None:
        for adaptive in (False, True):
            for cached in (False, True):
                method = AdaSpa(SPARSITY, search=SEARCH, block=BLOCK, adaptive=adaptive, cached=cached)
                if step < SEARCH[0]:
                    continue
                error, density = self._tried(method, observed, layer)
                if step > SEARCH[0]:  # the first search itself computes everything
                    row = {"what": "search", "step": step, "layer": layer, "adaptive": adaptive, "cached": cached}
                    self.rows.append(row | {"error": error, "density": density})

    def _tiles(self, observed: Observation, step: int, layer: int, mass: Tensor) -> None:
        for frames in TILES:
            tile = AttentionTile(frames, block=BLOCK)
            error, density = self._tried(tile, observed, layer)
            row = {"what": "tiles", "step": step, "layer": layer, "frames": frames}
            self.rows.append(row | {"method": tile.name, "error": error, "density": density})
            for bound in (WindowBlocks, RandomBlocks, OracleBlocks):
                # As many blocks, for each query block or, for the best ones, of a head.
                method = bound(density=density, block=BLOCK)
                if isinstance(method, OracleBlocks):
                    error, own = self._best(observed, mass, density)
                else:
                    error, own = self._tried(method, observed, layer)
                self.rows.append(row | {"method": method.name, "error": error, "density": own})

    def _best(self, observed: Observation, mass: Tensor, density: float) -> tuple[float, float]:
        """`OracleBlocks` by masses that are there already."""
        own = torch.eye(mass.shape[-1], dtype=torch.bool)
        worth = mass.masked_fill(own, float("inf")).flatten(2)
        mask = top_k(worth, -(-round(density * 1e6) * worth.shape[-1] // 10**6)).view(mass.shape)
        call = observed.call
        plan = SparsePlan.from_block_mask(
            mask, call.query_len, call.key_len, extent=call.extent, block_q=BLOCK, block_k=BLOCK
        )
        return relative(backends.attend(call, plan)[0], observed.out), plan.density()

    def _tried(self, method: Method, observed: Observation, layer: int) -> tuple[float, float]:
        """Error and density, with a state of the method's own through the sampling."""
        call = observed.call
        state = self._states.setdefault((method, layer), [{} for _ in range(call.batch)])
        plan = method.plan(replace(call, state=state))
        return relative(backends.attend(call, plan)[0], observed.out), plan.density()

    def _orders(self, call: AttentionCall, layer: int, lse: Tensor) -> None:
        """Recall ``[densities, H, orders]`` of the best blocks, mean over the batch rows."""
        found = []
        for axes in ORDERS:
            order = axis_order(call, axes)
            ranked = reordered(call, order)
            by_rank = lse.take_along_dim(order[:, None], dim=2)
            mass = mass_of_blocks(ranked, Grid(ranked.extent, BLOCK, BLOCK), by_rank)
            flat = mass.flatten(2)
            masks = [top_k(flat, round(d * flat.shape[-1])).view(mass.shape) for d in DENSITIES]
            found.append(torch.stack([share(mass, mask).mean(dim=0) for mask in masks]))
        self.recalls.setdefault(layer, []).append(torch.stack(found, dim=2))


def sample(
    model: VideoModel, policy: Policy, prompt: str, seed: int, look: Sequence[Callable[[Observation], None]] = ()
) -> tuple[Tensor, float]:
    """A clip, and the mean density of its steps and layers."""

    def visit(observed: Observation) -> None:
        for one in look:
            one(observed)

    with enable(model.enabled, policy, steps=STEPS) as handle:
        handle.observe(visit if look else None)
        clip = model.sample(prompt, seed, STEPS)
        layers = [row for row in handle.stats() if row.layer is not None]
    return clip, sum(row.density for row in layers) / len(layers)


def recalls(looks: dict[tuple[str, int], Look]) -> list[Record]:
    """Of masks of `SPARSITY`, row by row, on masses of other steps and clips; means over layers and heads."""
    rows: list[Record] = []
    layers = sorted(next(iter(looks.values())).masses[LOOKED[0]])
    for (prompt, seed), look in looks.items():
        others = {
            "seed": [other for (p, s), other in looks.items() if p == prompt and s != seed],
            "prompt": [other for (p, s), other in looks.items() if p != prompt and s == seed],
        }

        def mean(masks: dict[int, Tensor], at: int, look: Look = look) -> float:
            return sum(float(share(look.masses[at][layer], masks[layer]).mean()) for layer in layers) / len(layers)

        def masks_of(other: Look, step: int) -> dict[int, Tensor]:
            return {layer: kept_rows(other.masses[step][layer], 1 - SPARSITY) for layer in layers}

        for at in LOOKED:
            row = {"what": "recall", "prompt": prompt, "seed": seed, "at": at}
            for found_at in (step for step in LOOKED if step <= at):
                rows.append(row | {"from": "own", "step": found_at, "recall": mean(masks_of(look, found_at), at)})
            for kind, some in others.items():
                for other in some:
                    rows.append(row | {"from": kind, "step": at, "recall": mean(masks_of(other, at), at)})
            shape = look.masses[at][layers[0]].shape
            near = -(torch.arange(shape[2])[:, None] - torch.arange(shape[3])).abs().float()
            drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
            for kind, worth in (("window", near.expand(shape)), ("random", drawn)):
                masks = dict.fromkeys(layers, kept_rows(worth, 1 - SPARSITY))
                rows.append(row | {"from": kind, "step": at, "recall": mean(masks, at)})
    return rows


def stretches(model: VideoModel, prompt: str, seed: int, dense: Tensor) -> list[Record]:
    """Clips that are sparse in a quarter of the steps alone."""
    rows = []
    for part, first in (("first", 0), ("last", STEPS - QUARTER)):
        policy = Policy(During(WindowBlocks(density=0.2), first, first + QUARTER), min_tokens=0, max_density=2.0)
        clip, density = sample(model, policy, prompt, seed)
        row = {"what": "stretch", "prompt": prompt, "seed": seed, "method": WindowBlocks.name, "part": part}
        quality = {"psnr": psnr(clip, dense), "ssim": ssim(clip, dense), "distance": feature_distance(clip, dense)}
        rows.append(row | {"density": density} | quality)
    return rows


def profiles(modes: Sequence[ModeSearch], orders: OrderSearch, about: Provenance) -> dict[str, Profile]:
    """By name: modes by the density that they come to, orders with each of `DENSITIES`."""
    figures = [torch.stack(each).mean(dim=0) for each in zip(*(search.means() for search in modes), strict=True)]
    found = {}
    for name, density in MODES.items():
        low, high = 1e-6, 1e3
        for _ in range(60):  # the density falls with the weight
            weight = (low * high) ** 0.5
            mean = float(torch.stack([chosen(layer, weight)[1] for layer in figures]).mean())
            low, high = (weight, high) if mean > density else (low, weight)
        picked = [chosen(layer, high) for layer in figures]
        kinds = [[modes[0].modes[n] for n in best.tolist()] for best, _, _ in picked]
        errors, costs = ([part[n].tolist() for part in picked] for n in (2, 1))
        found[name] = Profile(kinds, errors=errors, costs=costs, provenance=about)
    plain = orders.profile()
    for density in DENSITIES:
        layers = [
            [replace(head, density=density) for head in layer if isinstance(head, PARO)] for layer in plain.layers
        ]
        found[f"orders-{round(100 * density)}"] = Profile(layers, scores=plain.scores, provenance=about)
    return found


def chosen(figures: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of one layer's ``[error and density, H, modes]`` the mode of each head, its density and its error."""
    error, density = figures
    best = (error + weight * density).argmin(dim=1)
    return best, density.gather(1, best[:, None])[:, 0], error.gather(1, best[:, None])[:, 0]


def scored(observed: Observation, orders: OrderSearch) -> None:
    """Show a search one step's calls, of the half of the batch that has the sentence: whole maps take long."""
    call, one = observed.call, slice(0, 1)
    if call.layer is not None and call.layout is not None and step_of(call).number == SCORED:
        layout, extent = replace(layout_of(call), before=layout_of(call).before[one]), call.extent.of_rows(one)
        given: dict[str, Any] = {"q": call.q[one], "k": call.k[one], "v": None, "state": None}
        orders(Observation(replace(call, extent=extent, layout=layout, **given), observed.out[one]))


def rounded(values: Any, digits: int = 5) -> Any:
    if isinstance(values, list | tuple):
        return [rounded(value, digits) for value in values]
    return round(values, digits) if isinstance(values, float) else values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profiles", type=Path, help="folder")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, help="of the prompts, so many")
    arguments = parser.parse_args()
    model = load_video_model(arguments.model, dtype=torch.bfloat16)
    prompts = PROMPTS[: arguments.limit]
    dense = Policy(Dense("gossamer"), min_tokens=0)
    looks: dict[tuple[str, int], Look] = {}
    orders = OrderSearch(block=BLOCK)
    setting = {"steps": STEPS, "looked": LOOKED, "search": SEARCH, "block": BLOCK, "sparsity": SPARSITY}
    setting |= {"densities": DENSITIES, "orders": ORDERS, "modes": [mode.to_dict() for mode in ModeSearch().modes]}
    lines: list[Record] = [header_of(model) | {"setting": setting}]
    chose = prompts[: max(1, len(prompts) // 2)]
    for prompt in prompts:
        for seed in range(arguments.seeds):
            look = looks[prompt, seed] = Look()
            visits: list[Callable[[Observation], None]] = [look]
            if prompt in chose and seed == 0:
                visits.append(lambda seen: scored(seen, orders))
            clip, _ = sample(model, dense, prompt, seed, visits)
            own = {"prompt": prompt, "seed": seed, "chose": prompt in chose}
            lines += [own | row for row in look.rows]
            errors, densities = torch.stack(look.modes.means()).unbind(1)
            recall = torch.stack([torch.stack(some).mean(dim=0) for _, some in sorted(look.recalls.items())], dim=1)
            lines.append(own | {"what": "modes", "error": errors.tolist(), "density": densities.tolist()})
            lines.append(own | {"what": "orders", "recall": recall.tolist()})
            if seed == 0:
                lines += stretches(model, prompt, seed, clip)
            print(f"{prompt}, {seed}", flush=True)
    lines += recalls(looks)
    about = Provenance(
        model=arguments.model.name,
        architecture=type(model.enabled).__name__,
        samples="; ".join(chose),
        metric="relative mean square of what changes in a head's output",
    )
    made = profiles([look.modes for (p, _), look in looks.items() if p in chose], orders, about)
    scores = [[ORDERS.index(head.order) for head in layer] for layer in made["orders-20"].layers]  # type: ignore[attr-defined]
    lines.append({"what": "chosen", "orders": scores})
    with arguments.out.open("w", encoding="utf-8") as out:
        for line in lines:
            out.write(json.dumps({name: rounded(value) for name, value in line.items()}) + "\n")
    if arguments.profiles is not None:
        arguments.profiles.mkdir(parents=True, exist_ok=True)
        for name, profile in made.items():
            profile.save(arguments.profiles / f"{name}.json")


if __name__ == "__main__":
    main()
