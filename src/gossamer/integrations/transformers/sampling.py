"""Steps of a diffusion language model, which fills in what follows a prompt by reading all of it again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gossamer.integrations.steps import Steps
from gossamer.layout import TokenLayout
from gossamer.plan import Extent

__all__ = ["Sampling"]


class Sampling:
    """What the calls of one sampling are told of it: which tokens are the prompt, and the step. See `Handle.sampling`.

    Args:
        prompt: tokens of the prompt, of each batch row or of all; padding on the left does not count.
        steps: of the whole sampling.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, prompt: int | Sequence[int], steps: int) -> None:
        if steps < 1:
            raise ValueError(f"a sampling has at least 1 step, got {steps}")
        self._prompt = prompt if isinstance(prompt, int) else tuple(prompt)
        TokenLayout((prompt,) if isinstance(prompt, int) else tuple(prompt))
        self._steps, self._total = Steps(), steps

    def begin(self, step: int, branch: int = 0) -> None:
        """The calls that follow belong to this step, from 0 on. Step 0 forgets what methods keep.

        Args:
            branch: of guidance without a classifier, where it runs the model more than once a step.

        Raises:
            ValueError: there is no such step.
        """
        if not 0 <= step < self._total:
            raise ValueError(f"step must be 0 to {self._total - 1}, got {step}")
        self._steps.at(step, self._total, branch)

    def given(self, layer: int | None, extent: Extent) -> dict[str, Any]:
        """What a call says of itself besides its tensors."""
        rows = extent.batch
        before = (self._prompt,) * rows if isinstance(self._prompt, int) else self._prompt
        if self._steps.now is None or layer is None or len(before) != rows:
            return {}
        sizes = (rows, *extent.query_count.tolist(), *extent.key_count.tolist())
        state = self._steps.state(layer, sizes)
        return {"layout": TokenLayout(before), "step": self._steps.now, "state": state}
