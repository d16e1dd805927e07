"""The model under evaluation: greedy answers with timed prefill, and hidden states without logits of a whole prompt."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import gossamer
from gossamer.cache import nbytes, peak_nbytes
from gossamer.evaluate.tasks import Sample
from gossamer.integrations.transformers import Handle, Stats
from gossamer.methods import Method
from gossamer.policy import Policy

__all__ = ["Answers", "Cost", "Subject"]

# Rows of logits that are held at once.
_HEAD_ROWS = 512
# What the user says before the text in a chat.
_INTRODUCTION = "Read this text. After it there is a question about it.\n\n"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one prefill. Seconds on the clock; of a batch, per row. Density is the mean over layers."""

    density: float
    prefill_s: float
    plan_s: float
    attention_s: float
    dense_because: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Answers:
    """The texts that a model gave to the turns of one sample, and what they cost.

    ``read`` is the share of the cache that tokens after the context read, where a method chose it. ``cache_bytes`` is
    what the cache holds of keys and values at the end, where it was one of ours, and ``cache_peak_bytes`` the most that
    it has held. ``decode_s`` are the seconds after the
    first token, or of questions and answers where the context was read before; ``decode_tokens`` how many single
    tokens took them, None where a question was read at once.
    """

    texts: tuple[str, ...]
    cost: Cost
    decode_s: float
    read: float | None = None
    cache_bytes: int | None = None
    cache_peak_bytes: int | None = None
    decode_tokens: int | None = None


class Subject:
    """A transformers model with its tokenizer.

    Args:
        chat: wrap prompts in the tokenizer's chat template, as one turn of the user.

    Raises:
        TypeError: not a transformers model.
        ValueError: `chat`, and the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, *, chat: bool = False) -> None:
        if not hasattr(model, "generate") or not hasattr(model, "config"):
            raise TypeError(f"evaluation needs a transformers language model, got {type(model).__name__}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.chat = chat
        self._read: tuple[Any, Any, Cost] | None = None
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"the tokenizer of {name} has no chat template; leave chat out")
        self.config = model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_length(self) -> int | None:
        """Tokens that the model takes, as far as its config says."""
        return getattr(self.config, "max_position_embeddings", None)

    def to_dict(self) -> dict[str, Any]:
        """What the results file says of the model."""
        named = {"name": self.name, "architecture": type(self.model).__name__, "fingerprint": self.fingerprint()}
        return named | self.shape() | {"dtype": str(self.model.dtype).removeprefix("torch.")}

    def query(self) -> Tensor:
        """One query of one head, as the model's attention sees it: what says which kernel runs."""
        return torch.empty(1, 1, 1, self.shape()["head_dim"], dtype=self.model.dtype, device=self.device)

    def shape(self) -> dict[str, int]:
        """Layers, heads and parameters."""
        heads = self.config.num_attention_heads
        return {
            "layers": self.config.num_hidden_layers,
            "heads": heads,
            "kv_heads": getattr(self.config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(self.config, "head_dim", None) or self.config.hidden_size // heads,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def fingerprint(self) -> str:
        """Hash of the config and of a strided sample of every weight: changes with the model, not with its path."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name != "_name_or_path"}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, weight in self.model.named_parameters():
            flat = weight.detach().reshape(-1)
            part = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            digest.update(name.encode() + part.numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def answer(
        self, samples: Sequence[Sample], policy: Policy, max_new_tokens: int, *, one_line: bool = True
    ) -> list[Answers]:
        """Greedy answers; several samples are one batch, padded on the left where their lengths differ.

        An answer ends at the model's end token, after ``max_new_tokens``, or, with ``one_line``, at a line end after
        some text. A sample of several turns is read without its questions first (see `Task.turns`) and cannot be
        batched. Where the policy has a method for decoding, any sample is, one by one, and its questions are read token
        by token as well, as Quest's authors have it: what is asked is no part of what was read before. Policies that
        read a context alike, one after the other, read it once; each has the cost of that.

        Raises:
            ValueError: a batch of samples with several turns.
        """
        if any(len(sample.turns) > 1 for sample in samples) and len(samples) > 1:
            raise ValueError(f"samples with several turns are run one by one, got a batch of {len(samples)}")
        if policy.decode is not None or len(samples[0].turns) > 1:
            return [self._converse(sample, policy, max_new_tokens, one_line) for sample in samples]
        self._read = None
        prompts = [self.prompt_tokens(sample) for sample in samples]
        with gossamer.enable(self.model, policy) as handle:
            held = None if handle.cache is None else handle.new_cache()
            out, stop, decode = self._generate(prompts, max_new_tokens, one_line, held, handle)
            cost = _cost(stop.layers, stop.prefill / len(samples), len(samples))
        size = None if held is None else nbytes(held) // len(samples)
        peak = None if held is None else peak_nbytes(held) // len(samples)
        more = {"cache_bytes": size, "cache_peak_bytes": peak, "decode_tokens": max(map(len, out)) - 1}
        return [Answers((self.text(row),), cost, decode / len(samples), **more) for row in out]

    def _converse(self, sample: Sample, policy: Policy, max_new_tokens: int, one_line: bool) -> Answers:
        prompts = [self.prompt_tokens(sample, i) for i in range(len(sample.turns))]
        # A tokenizer may join the context's end with a question's start: what all prompts share is read once.
        shared = 0
        while shared < min(map(len, prompts)) - 1 and len({prompt[shared] for prompt in prompts}) == 1:
            shared += 1
        if policy.decode is not None:
            read_first = self._chat_tokens(sample.context, "") if self.chat else self.tokens(sample.context)
            alike = [a == b for a, b in zip(read_first, prompts[0][:shared], strict=False)]
            shared = alike.index(False) if False in alike else min(shared, len(alike))
        context = torch.tensor([prompts[0][:shared]], device=self.device)
        texts, spent, steps, tokens = [], 0.0, [], 0
        with gossamer.enable(self.model, policy) as handle:
            stores = handle.cache is not None
            read, cost = self._context(context, policy, handle)
            held = None
            for prompt in prompts:
                cache = held = copy.deepcopy(read)
                if policy.decode is not None:
                    handle.reset()
                    spent += self._read_on(prompt[shared:-1], cache)
                out, stop, decode = self._generate([prompt], max_new_tokens, one_line, cache, handle)
                spent += stop.prefill + decode
                tokens += len(prompt) - shared + len(out[0]) - 1
                texts.append(self.text(out[0]))
                steps += [layer.step_density for layer in handle.stats()]
        size, peak = (None, None) if not stores or held is None else (nbytes(held), peak_nbytes(held))
        share = sum(steps) / len(steps) if policy.decode is not None else None
        return Answers(tuple(texts), cost, spent, share, size, peak, tokens if policy.decode is not None else None)

    def _context(self, tokens: Tensor, policy: Policy, handle: Handle) -> tuple[Any, Cost]:
        """A cache that has read tokens, to be copied and not to be added to, and what reading them cost.

        Of policies that differ in their methods for decoding alone, and if these do not watch prompts, the first reads.
        """
        decode = policy.decode
        looks = decode is not None and type(decode).watches is not Method.watches
        key = tokens.tolist(), replace(policy, decode=decode if looks else None), handle.cache
        if self._read is None or self._read[0] != key:
            self._read = None
            handle.reset()
            started = time.perf_counter()
            held = None if handle.cache is None else handle.new_cache()
            read = self.model(input_ids=tokens, past_key_values=held, use_cache=True, logits_to_keep=1)
            self.wait()
            cost = _cost(handle.stats(), time.perf_counter() - started, 1)
            self._read = key, read.past_key_values, cost
        return self._read[1:]

    def _read_on(self, tokens: Sequence[int], cache: Any) -> float:
        """Read tokens one by one; seconds."""
        started = time.perf_counter()
        for token in tokens:
            one = torch.tensor([[token]], device=self.device)
            self.model(input_ids=one, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.wait()
        return time.perf_counter() - started

    def _generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, one_line: bool, cache: Any, handle: Handle
    ) -> tuple[list[list[int]], _Stop, float]:
        """New tokens of each prompt, what was noted at the first of them, and the seconds after it."""
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.tokenizer.eos_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        stop = _Stop(self, longest, handle, one_line)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        self.wait()
        ended = time.perf_counter()
        return out[:, longest:].tolist(), stop, ended - stop.first

    @torch.inference_mode()
    def hidden_states(
        self, tokens: Tensor, policy: Policy, observe: Any = None, *, rotary: bool = False
    ) -> tuple[Tensor, Cost]:
        """What the head reads at every position, ``[S, width]``, and the cost.

        ``observe``, ``rotary``: see `Handle.observe`.
        """
        kept: list[Tensor] = []
        self._read = None
        with gossamer.enable(self.model, policy) as handle:
            handle.observe(observe, rotary=rotary)
            hook = self.model.base_model.register_forward_hook(lambda *call: kept.append(call[-1][0]))
            try:
                started = time.perf_counter()
                out = self.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
                self.wait()
                cost = _cost(handle.stats(), time.perf_counter() - started, 1)
            finally:
                hook.remove()
        hidden = kept[0][0]
        self._check_head(hidden[-1:], out.logits[0, -1:])
        return hidden, cost

    def logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First row and fp32 logits ``[rows, vocabulary]`` of `hidden_states`, in chunks."""
        for start in range(0, hidden.shape[0], _HEAD_ROWS):
            yield start, self._head(hidden[start : start + _HEAD_ROWS])

    @torch.inference_mode()
    def _head(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        scale = getattr(self.config, "logit_scale", None)
        if isinstance(scale, int | float):
            logits = logits * scale
        divisor = getattr(self.config, "logits_scaling", None)
        if isinstance(divisor, int | float):
            logits = logits / divisor
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def _check_head(self, hidden: Tensor, expected: Tensor) -> None:
        """Logits are formed here in chunks; a model that does more to them than we know must not pass unseen."""
        mine = self._head(hidden)
        if not torch.allclose(
            mine, expected.float(), rtol=2e-2, atol=2e-2 * float(expected.float().abs().max() + 1e-6)
        ):
            raise ValueError(
                f"{type(self.model).__name__} does more to its logits than its head, its scale and its soft-cap; "
                "leave out fidelity and perplexity for it, and report it"
            )

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def prompt_tokens(self, sample: Sample, turn: int = 0) -> list[int]:
        """Of a prompt as the model reads it.

        In a chat the user says in front that a question comes, and how the answer begins stands in the assistant's
        turn: models that were trained on answers then go on with it, as those that were trained on text do.
        """
        if not self.chat:
            return self.tokens(sample.prompt(turn))
        asked = sample.turns[turn]
        return self._chat_tokens(sample.context + asked.asked, asked.cue)

    def _chat_tokens(self, text: str, cue: str) -> list[int]:
        turns = [{"role": "user", "content": f"{_INTRODUCTION}{text}"}]
        asked = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        return [*asked, *(self.tokenizer(cue, add_special_tokens=False)["input_ids"] if cue else ())]

    @cached_property
    def chat_tokens(self) -> int:
        """Tokens that the chat template adds to a prompt; 0 without."""
        return len(self._chat_tokens("Hello?", "Hello")) - len(self.tokens("Hello? Hello")) if self.chat else 0

    @torch.inference_mode()
    def warm_up(self, tokens: list[int], policy: Policy) -> None:
        """One prefill whose time nobody takes: pages weights in, builds kernels, fills caches of memory."""
        with gossamer.enable(self.model, policy):
            self.model(input_ids=torch.tensor([tokens], device=self.device), use_cache=True, logits_to_keep=1)
        self.wait()

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class _Stop(StoppingCriteria):
    """Ends a row at a line end that follows some text, if asked to; notes what the prefill cost at the first token."""

    def __init__(self, subject: Subject, prompt: int, handle: Handle, one_line: bool) -> None:
        self.subject = subject
        self.prompt = prompt
        self.handle = handle
        self.one_line = one_line
        self.layers = Stats(())
        self.started = time.perf_counter()
        self.first = 0.0

    @property
    def prefill(self) -> float:
        """Seconds until the first token."""
        return self.first - self.started

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.first:
            self.subject.wait()
            self.first = time.perf_counter()
            self.layers = self.handle.stats()
        if not self.one_line:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        texts = [self.subject.text(row) for row in input_ids[:, self.prompt :].tolist()]
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


def _cost(layers: Stats, seconds: float, rows: int) -> Cost:
    return Cost(
        density=sum(layer.density for layer in layers) / max(1, len(layers)),
        prefill_s=seconds,
        plan_s=sum(layer.plan_seconds for layer in layers) / rows,
        attention_s=sum(layer.attention_seconds for layer in layers) / rows,
        dense_because=layers.fallbacks(),
    )
