"""The table that a demo prints, from what it wrote."""

from typing import Any

Cells = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


def demo_rows(data: dict[str, Any]) -> Cells:
    """The rows of a demo, with their KL where it was measured."""
    rows = data["rows"]
    with_kl = all("kl" in row for row in rows.values())
    return (
        f"{data['machine']['model']}, {data['machine']['usable_cores']} cores, {data['dtype']}, prompts of "
        f"{min(data['prompt_tokens']):,} tokens.",
        ("method", "prefill s", "attention s", "density", "right", "top-1 as dense", *(["KL"] if with_kl else [])),
        [
            (
                name,
                f"{row['prefill_seconds']:.2f}",
                f"{row['attention_seconds']:.2f}",
                f"{row['density']:.3f}",
                f"{row['right']}/{row['asked']}",
                f"{row['top1_agreement']:.1%}",
                *([f"{row['kl']:.3f}"] if with_kl else []),
            )
            for name, row in rows.items()
        ],
    )
