"""Which tokens of a forward pass are text, and which an image's or a video's, by what the model is called with."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from gossamer.integrations.transformers.configs import children, parts_of
from gossamer.integrations.transformers.supported import towers_of
from gossamer.layout import IMAGE, TEXT, VIDEO, ModalityLayout
from gossamer.plan import Extent

__all__ = ["Modalities", "tokens_of"]

_AUDIO = VIDEO + 1
_NAMES = {
    name + end: kind
    for name, kind in (("image_token", IMAGE), ("video_token", VIDEO), ("audio_token", _AUDIO))
    for end in ("_id", "_index")
}
_MOST_STRIDES, _MOST_SIZES = 8, 2


def tokens_of(config: Any) -> dict[int, int]:
    """The modality of each token that stands for a part of an image, a video or a sound, as a config names them.

    Configs of composite models have them as ``image_token_id``, ``image_token_index`` and the like.
    """
    found = {getattr(config, name, None): kind for name, kind in _NAMES.items()}
    return {token: kind for token, kind in found.items() if isinstance(token, int)}


class Modalities:
    """Hooks on a model and on those of its parts that read text, which hold on to what a pass says of its tokens.

    From the first that is there: ``mm_token_type_ids`` (Qwen-VL, GLM-V, Gemma 4), which count as transformers'
    processors do; the tokens themselves, by the numbers that the config has for them (LLaVA, InternVL, Gemma 3); and
    ``token_type_ids``, all but 0 being an image's. A pass that is given embeddings alone says nothing. Whichever part
    is called from outside is asked first.

    Strides are those of frames and of their rows, by ``video_grid_thw`` and ``image_grid_thw``, and the distances at
    which runs of an image or a video begin, the most frequent ones.
    """

    def __init__(self, model: Any) -> None:
        self._tokens, self._merge = tokens_of(model.config), _merge_of(model.config)
        self._given: dict[str, Any] = {}
        self._kinds: Tensor | None = None
        self._depth = 0
        self._hooks: list[Any] = []
        if self._tokens:
            towers = {id(module) for tower in towers_of(model) for module in tower.modules()}
            for part in parts_of(model):
                if id(part) not in towers:
                    names = tuple(inspect.signature(part.forward).parameters)
                    self._hooks += [
                        part.register_forward_pre_hook(_Enter(self, names), with_kwargs=True),
                        part.register_forward_hook(_Leave(self), always_call=True),
                    ]

    def stop(self) -> None:
        """Read no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._given = [], {}

    def enter(self, arguments: dict[str, Any]) -> None:
        if self._depth == 0:
            self._given, self._kinds = {}, None
        self._depth += 1
        for name in ("mm_token_type_ids", "input_ids", "token_type_ids", "video_grid_thw", "image_grid_thw"):
            if isinstance(arguments.get(name), Tensor):
                self._given.setdefault(name, arguments[name])

    def leave(self) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0 and not torch.is_grad_enabled():  # else layers may run again for a gradient
            self._given, self._kinds = {}, None

    def layout(self, extent: Extent, queries: int) -> ModalityLayout | None:
        """Of a causal call of so many query rows in this pass; None where nothing says.

        Tokens that were cached before it count as text.
        """
        kinds = self._read()
        if kinds is None or not extent.causal or kinds.shape != (extent.batch, queries):
            return None
        by_position = torch.full((extent.batch, extent.longest), TEXT, dtype=torch.int8, device="cpu")
        strides = []
        for row in range(extent.batch):
            first, count, at = (int(x[row]) for x in (extent.first_query, extent.query_count, extent.first_position))
            own = kinds[row, first : first + count]
            by_position[row, at : at + count] = own[: max(0, extent.longest - at)]
            strides.append(self._strides(own))
        return ModalityLayout(by_position, tuple(strides))

    def _read(self) -> Tensor | None:
        """Modalities of the pass's tokens, int8 ``[B, S]``; it waits for their device, once."""
        if self._kinds is None and self._given:
            types, ids = self._given.get("mm_token_type_ids"), self._given.get("input_ids")
            if types is not None and types.ndim == 2:
                self._kinds = types.to("cpu", torch.int8)
            elif ids is not None and ids.ndim == 2:
                ids = ids.cpu()
                self._kinds = torch.full_like(ids, TEXT, dtype=torch.int8)
                for token, kind in self._tokens.items():
                    self._kinds.masked_fill_(ids == token, kind)
            elif (types := self._given.get("token_type_ids")) is not None and types.ndim == 2:
                self._kinds = (types.cpu() != 0).to(torch.int8) * IMAGE
        return self._kinds

    def _strides(self, kinds: Tensor) -> tuple[int, ...]:
        """Of one row's tokens: of the most frequent sizes of videos and images, then distances between runs."""
        found: list[int] = []
        for name in ("video_grid_thw", "image_grid_thw"):
            grid = self._given.get(name)
            if grid is not None and grid.ndim == 2 and grid.shape[1] == 3:
                for (height, width), _ in Counter(map(tuple, grid[:, 1:].tolist())).most_common(_MOST_SIZES):
                    found += [height * width // self._merge**2, width // self._merge]
        seen = kinds != TEXT
        starts = (seen & ~torch.nn.functional.pad(seen, (1, 0))[:-1]).nonzero().flatten()
        found += [stride for stride, _ in Counter(starts.diff().tolist()).most_common(_MOST_STRIDES)]
        return tuple(sorted([stride for stride in dict.fromkeys(found) if stride > 1][:_MOST_STRIDES]))


def _merge_of(config: Any) -> int:
    """Patches a side that become one token."""
    for part in (config, *children(config).values()):
        merge = getattr(part, "spatial_merge_size", None)
        if isinstance(merge, int) and merge > 0:
            return merge
    return 1


class _Enter:
    """A hook of a part. Copies of the model have one that does nothing."""

    def __init__(self, modalities: Modalities | None = None, names: tuple[str, ...] = ()) -> None:
        self._modalities, self._names = modalities, names

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._modalities is not None and not (torch.compiler.is_compiling() or is_tracing()):
            self._modalities.enter(dict(zip(self._names, args, strict=False)) | kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class _Leave:
    """The hook behind it."""

    def __init__(self, modalities: Modalities | None = None) -> None:
        self._modalities = modalities

    def __call__(self, part: nn.Module, inputs: Any, outputs: Any = None) -> None:
        if self._modalities is not None and not (torch.compiler.is_compiling() or is_tracing()):
            self._modalities.leave()

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()
