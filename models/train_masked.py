"""Train the small masked diffusion language model on a CPU: `python models/train_masked.py --out models/masked`.

A bidirectional transformer (transformers' EuroBERT) on the corpus and with the tokenizer of the reference model, by the
objective of LLaDA (2502.09992, equation 3): of each sequence a share of the tokens, drawn evenly from 0 to 1, becomes
masks, and the loss of these is weighed by one over the share. A third of the sequences say a passage twice, so that
there is something to look up. Steps, not seconds, define the schedule, and each step draws its data from a generator
seeded with (seed, step).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import load_corpus
from runs import Run, asked, trained
from tokenizer import BOS, EOS, PAD, encode_all
from torch import Tensor
from transformers import EuroBertConfig, EuroBertForMaskedLM, PreTrainedTokenizerFast

REFERENCE = Path(__file__).parent / "reference"
REPEATS = 1 / 3  # share of the sequences that say a passage twice
LEAST = 0.02  # share of masks, so that no weight is beyond 50
CONFIG: dict[str, Any] = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Phase:
    """A stretch of training: ``steps`` of ``rows`` sequences of ``length`` tokens.

    first, last: learning-rate multipliers at its ends.
    """

    length: int
    rows: int
    steps: int
    first: float
    last: float

    @property
    def tokens(self) -> int:
        return self.length


SCHEDULE = (
    Phase(128, 32, 1200, 1.0, 1.0),
    Phase(512, 8, 900, 1.0, 0.6),
    Phase(2048, 2, 500, 0.6, 0.02),
)


class Trainer(Run):
    """One run: the weights, and what they are trained on.

    Args:
        tokens: of the corpus, int ``[n]``.
        vocabulary: of the tokenizer; masks are one token more.
    """

    def __init__(
        self,
        seed: int,
        schedule: tuple[Phase, ...],
        config: dict[str, Any],
        tokens: np.ndarray,
        vocabulary: int,
        bfloat16: bool,
    ) -> None:
        torch.manual_seed(seed)
        self.tokens, self.mask = tokens, vocabulary
        ids = dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, mask_token_id=vocabulary)
        model = EuroBertForMaskedLM(EuroBertConfig(vocab_size=vocabulary + 1, **ids, **config))
        super().__init__(seed, schedule, model, 3e-3, bfloat16)

    def batch(self, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[B, S]``, which of them are masked, and the share that was drawn ``[B]``, of the current step."""
        generator = self.generator()

        def number(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        rows = []
        for _ in range(phase.rows):
            start = number(len(self.tokens) - phase.length)
            row = torch.from_numpy(self.tokens[start : start + phase.length].astype(np.int64))
            if float(torch.rand((), generator=generator)) < REPEATS:
                size = phase.length // 4
                first, second = number(size), phase.length - size - number(size)
                row[second : second + size] = row[first : first + size].clone()
            rows.append(row)
        tokens = torch.stack(rows)
        # One of each part of the range, so that batches differ less.
        even = (torch.arange(phase.rows) + torch.rand(phase.rows, generator=generator)) / phase.rows
        share = LEAST + (1 - LEAST) * even
        return tokens, torch.rand(tokens.shape, generator=generator) < share[:, None], share

    def loss(self, phase: Phase) -> Tensor:
        """Nats of a token, in the mean over shares."""
        tokens, masked, share = self.batch(phase)
        with self.products():
            hidden = self.model.model(tokens.masked_fill(masked, self.mask)).last_hidden_state
            logits = self.model.lm_head(hidden[masked])
        losses = F.cross_entropy(logits.float(), tokens[masked], reduction="none")
        weights = (1 / share)[:, None].expand(tokens.shape)[masked]
        return (losses * weights).sum() / tokens.numel()

    def export(self, out: Path, tokenizer: PreTrainedTokenizerFast, corpus: str) -> None:
        """Write the averaged weights in bfloat16, the tokenizer and the training log."""
        self.take_average()
        shipped: Any = EuroBertForMaskedLM(self.model.config).bfloat16()
        shipped.load_state_dict(self.model.state_dict())
        shipped.save_pretrained(out)
        tokenizer.save_pretrained(out)
        self.write_log(out, corpus=corpus)


def main() -> int:
    arguments = asked(__doc__, Path(__file__).parent / "masked")
    tokenizer, corpus = PreTrainedTokenizerFast.from_pretrained(REFERENCE), load_corpus()
    tokens = encode_all(tokenizer, corpus.train)
    trainer = Trainer(arguments.seed, SCHEDULE, CONFIG, tokens, len(tokenizer), not arguments.float32)
    if not trained(trainer, arguments, bidirectional=True):
        return 1
    trainer.export(arguments.out, tokenizer, corpus.sha256)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
