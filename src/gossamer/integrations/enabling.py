"""One verb for models of transformers and of diffusers."""

from __future__ import annotations

from typing import Any

__all__ = ["enable"]


def enable(model: Any, *args: Any, **options: Any) -> Any:
    """Run a model's attention through gossamer; a handle says what it did, and gives the model back.

    For a pipeline or a model of diffusers this is `gossamer.integrations.diffusers.enable`, for every other one
    `gossamer.integrations.transformers.enable`; what they take stands there.

    Args:
        model: unmodified.
        method: a method's name, a method or a policy; the second argument.
        **options: of the integration, and fields of the method.
    """
    kinds = type(getattr(model, "_orig_mod", model)).__mro__  # of a compiled model, what was compiled
    if any(kind.__module__.partition(".")[0] == "diffusers" for kind in kinds):
        from gossamer.integrations import diffusers

        return diffusers.enable(model, *args, **options)
    from gossamer.integrations import transformers

    return transformers.enable(model, *args, **options)
