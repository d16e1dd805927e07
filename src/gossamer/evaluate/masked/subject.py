"""A masked language model with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.evaluate.subject import Subject

__all__ = ["MaskedSubject", "load_masked_model"]


class MaskedSubject(Subject):
    """A model of transformers that predicts masked tokens from both sides, with its tokenizer.

    Attributes:
        mask_token: its number.

    Raises:
        ValueError: neither config nor tokenizer say which token a mask is.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name, self.chat = model.eval(), tokenizer, name, False
        self.config = model.config.get_text_config()
        mask = getattr(self.config, "mask_token_id", None)
        mask = getattr(tokenizer, "mask_token_id", None) if mask is None else mask
        if mask is None:
            raise ValueError(f"neither the config nor the tokenizer of {name} says which token a mask is")
        self.mask_token = int(mask)

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, S, V]`` of tokens ``[B, S]``."""
        return self.model(input_ids=tokens).logits

    def text_tokens(self, text: str) -> Tensor:
        """int64 ``[n]``, without special ones."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], device=self.device)


def load_masked_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> MaskedSubject:
    """A folder of transformers with a masked language model and its tokenizer; nothing is downloaded.

    Raises:
        ValueError: it cannot be loaded as one.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder of a model: it has no config.json")
    try:
        model: Any = AutoModelForMaskedLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{folder} cannot be loaded as a masked language model: {reason}") from error
    tokenizer.model_max_length = 1 << 40  # texts are cut here
    return MaskedSubject(model, tokenizer, folder.name)
