"""Write the video model's card and its curve: `python models/video_card.py models/video`.

What clips show comes from `models/video_fidelity.py`, the rest from the model's folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from card import COLOURS, Panel, smooth, write_svg
from video_fidelity import CHECKS, FRAMES, RESULTS, SHOWN

TEMPLATE = Path(__file__).parent / "video_card_template.md"
COMMAND = "python models/train_video.py --out models/video"


def write_curve(folder: Path, training: dict[str, Any]) -> None:
    """curve.svg: the loss of each phase."""
    log = training["log"]
    losses = [row["loss"] for row in log[len(log) // 20 :]]
    last = training["steps"]
    panel = Panel(0, "loss of a step (running mean)", "steps", (0, last), (0, 1.3 * max(losses)))
    for tick in range(0, last + 1, max(1, last // 5)):
        panel.tick(tick, str(tick))
    sizes = list(dict.fromkeys(row["tokens"] for row in log))
    for n, tokens in enumerate(sizes):
        points = [(row["step"], row["loss"]) for row in log if row["tokens"] == tokens]
        panel.line(smooth(points), COLOURS[n])
        panel.note(len(sizes) - n, f"{tokens:,} tokens", COLOURS[n])
    write_svg(folder / "curve.svg", [panel])


def card(folder: Path, found: dict[str, Any]) -> str:
    """The text of the card."""
    training = json.loads((folder / "training_log.json").read_text())
    config = json.loads((folder / "transformer" / "config.json").read_text())
    words = json.loads((folder / "words.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    _, frames, height, width = words["size"]
    names = {"colour": "colours", "motion": "motions", "shape": "shapes", "all": "all"}
    count = len(found["clips"])
    right = {name: sum(clip[name] for clip in found["clips"]) for name in CHECKS}
    table = [f"| {names[name]} right | {right[name]} of {count} | {found['of_drawn'][name]:.3f} |" for name in CHECKS]
    schedule = [
        f"| {p['frames']} | {p['size']} x {p['size']} | {p['tokens']:,} | {p['rows']} | {p['steps']} "
        f"| {p['first']:g} to {p['last']:g} of the highest |"
        for p in training["schedule"]
    ]
    shown = [f"*{clip['prompt']}*" for clip in found["clips"][:SHOWN]]
    return TEMPLATE.read_text().format(
        parameters=f"{training['parameters'] / 1e6:.2f}",
        frames=frames,
        height=height,
        width=width,
        tokens=f"{training['schedule'][-1]['tokens']:,}",
        words=len([word for word in words["words"] if word]),
        picture="frames.png",
        shown=", ".join(shown),
        shown_frames=min(FRAMES, frames),
        steps=found["steps"],
        clips=count,
        drawn_clips=found["of_drawn"]["clips"],
        guidance=f"{words['guidance']:g}",
        dtype=found["model"]["dtype"],
        table="\n".join(table),
        layers=config["num_layers"],
        heads=config["num_attention_heads"],
        dim=config["attention_head_dim"],
        ffn=config["ffn_dim"],
        megabytes=f"{weights.stat().st_size / 1e6:.1f}",
        shift=scheduler["shift"],
        command=COMMAND,
        seed=training["seed"],
        trained=f"{training['steps']:,}",
        schedule="\n".join(schedule),
        wall=f"{training['wall_s'] / 60:.0f}",
        threads=training["threads"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = json.loads(arguments.results.read_text())
    write_curve(arguments.model, json.loads((arguments.model / "training_log.json").read_text()))
    (arguments.model / "README.md").write_text(card(arguments.model, found))


if __name__ == "__main__":
    main()
