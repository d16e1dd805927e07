"""Write the masked model's card and its picture: `python models/card_masked.py models/masked RESULTS.json`.

The measurements come from `models/evaluate_masked.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from card import COLOURS, Panel, smooth, write_svg


def loss_picture(out: Path, training: dict[str, Any]) -> None:
    """loss.svg: the loss against steps, a colour a length."""
    log, schedule = training["log"], training["schedule"]
    last = log[-1]["step"]
    panel = Panel(0, "loss in training (nats per token)", "steps", (0, last), (2, 7))
    for tick in range(0, last + 1, max(1, last // 5)):
        panel.tick(tick, str(tick))
    for n, length in enumerate(dict.fromkeys(row["tokens"] for row in log)):
        rows = [row for row in log if row["tokens"] == length]
        panel.line(smooth([(row["step"], row["loss"]) for row in rows]), COLOURS[n])
        panel.note(len(schedule) - n, f"{length} tokens", COLOURS[n])
    write_svg(out / "loss.svg", [panel])


def table(cells: list[dict[str, Any]]) -> str:
    """Accuracy by length and share of masks, in Markdown."""
    names = {"said_once": "elsewhere", "said_twice": "said twice", "masked_twice": "masked twice"}
    lines = [f"| tokens | masked | texts | {' | '.join(names.values())} | copyable | nats |", "|---" * 8 + "|"]
    for cell in cells:
        shown = [_with_interval(cell[name]) if name in cell else "" for name in names]
        own = f"| {cell['length']:,} | {cell['share']:.0%} | {cell['texts']} + {cell['texts']} | {' | '.join(shown)} "
        lines.append(f"{own}| {cell['copyable']:.2f} | {cell['nats'][0]:.2f} |")
    return "\n".join(lines)


def _with_interval(figure: list[float]) -> str:
    return f"{figure[0]:.3f} ({figure[1]:.3f} to {figure[2]:.3f})"


def verdict(cells: list[dict[str, Any]]) -> str:
    """Whether it looks things up: where what is said twice is right more often than what is masked twice."""
    does, lines = [], []
    for cell in cells:
        twice, hidden = cell["said_twice"], cell["masked_twice"]
        does.append(twice[1] > hidden[2])
        copied = (twice[0] - hidden[0]) / (1 - hidden[0])
        what = f"{twice[0]:.0%} beside {hidden[0]:.0%}"
        where = f"{cell['length']:,} tokens with {cell['share']:.0%} masked"
        lines.append(
            f"{where}: {what}, {copied:.0%} of what a copy would add" if does[-1] else f"{where}: {what}, nothing"
        )
    looks = "It looks things up" if all(does) else "It looks some things up" if any(does) else "It looks nothing up"
    return (
        f"**{looks}.** Right, of tokens that stand visibly elsewhere, beside those that are masked there as well; "
        f"*nothing* where the intervals overlap: {'; '.join(lines)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    training = json.loads((arguments.model / "training_log.json").read_text())
    config = json.loads((arguments.model / "config.json").read_text())
    results = json.loads(arguments.results.read_text())
    loss_picture(arguments.model, training)
    schedule = training["schedule"]
    words = {
        "parameters": f"{training['parameters'] / 1e6:.1f}",
        "megabytes": f"{(arguments.model / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "cores": "one CPU core" if training["threads"] == 1 else f"{training['threads']} CPU cores",
        "tokens": f"{sum(phase['steps'] * phase['rows'] * phase['length'] for phase in schedule) / 1e6:.1f}",
        "table": table(results["cells"]),
        "verdict": verdict(results["cells"]),
        "unigram": results["unigram"]["accuracy"],
        "unigram_nats": results["unigram"]["nats"],
        "steps": f"{training['steps']:,}",
        "seed": training["seed"],
        "phases": ", then ".join(f"{p['steps']:,} of {p['rows']} x {p['length']:,}" for p in schedule),
        "minutes": f"{training['wall_s'] / 60:.0f}",
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "head_dim": config["head_dim"],
        "inner": config["intermediate_size"],
        "mask": config["mask_token_id"],
    }
    template = (Path(__file__).parent / "card_masked_template.md").read_text()
    (arguments.model / "README.md").write_text(template.format(**words))


if __name__ == "__main__":
    main()
