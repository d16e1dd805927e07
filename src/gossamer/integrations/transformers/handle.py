"""`enable` and its `Handle`: one policy for one model object, what it did, and the way back."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn

from gossamer import cache as caches
from gossamer import methods
from gossamer.attention import CallRecord
from gossamer.cache import CachePolicy
from gossamer.call import AttentionCall
from gossamer.integrations.policies import policy_of
from gossamer.integrations.stats import LayerStats, Stats
from gossamer.integrations.transformers.attention import BIDIRECTIONAL, register
from gossamer.integrations.transformers.configs import configs, implementations, path_to, request
from gossamer.integrations.transformers.context import Context
from gossamer.integrations.transformers.modalities import Modalities
from gossamer.integrations.transformers.owners import NAME, Observation, Owner, lend, owner_of, set_owner
from gossamer.integrations.transformers.reached import Reached
from gossamer.integrations.transformers.rotary import Positions, rotary_module, verified
from gossamer.integrations.transformers.sampling import Sampling
from gossamer.integrations.transformers.stores import Stores
from gossamer.integrations.transformers.supported import is_ours, refuse
from gossamer.methods import Method
from gossamer.methods.per_head import PerHead, needs_of
from gossamer.policy import Policy
from gossamer.profiles import Profile

__all__ = ["Handle", "enable"]

logger = logging.getLogger("gossamer")


class Handle:
    """An enabled model. `enable` makes it; as a context manager it disables the model on the way out.

    It holds the model weakly: a handle that is kept does not keep the model in memory.

    Attributes:
        context: reads prompts that the ranks of a group share, where ``context_parallel`` was given; else None.
        cache: what its caches keep, and how, where ``decode`` or ``cache`` was given; else None.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, lent: dict[int, tuple[Any, str]], cache: CachePolicy | None = None
    ) -> None:
        self.policy, self.cache = policy, cache
        self._model = weakref.ref(model)
        self._lent = lent
        self._layers: dict[int | None, LayerStats] = {}
        self._reached, self._modalities = Reached(model), Modalities(model)
        self._stores = None if cache is None else Stores(model, cache)
        self._positions: Positions | None = None
        self._hook: Any = None
        self._visit: Callable[[Observation], None] | None = None
        self._instead: Callable[[AttentionCall], Tensor] | None = None
        self._sampling: Sampling | None = None
        self.context: Context | None = None
        self._own(model, None)
        self._enabled = True
        for config, previous in lent.values():
            lend(config, previous, 1)
        self._given_back = weakref.finalize(model, _give_back, lent)
        self._given_back.atexit = False

    @property
    def enabled(self) -> bool:
        """Whether the model's attention comes here: not after `disable`, nor while the model was told otherwise."""
        return self._enabled and self._given_back.alive and any(is_ours(config) for config, _ in self._lent.values())

    def stats(self) -> Stats:
        """What each layer did until now. Layers that were not called are absent."""
        order = sorted(self._layers, key=lambda layer: (layer is None, layer or 0))
        return Stats(tuple(copy.deepcopy(self._layers[layer]) for layer in order))

    def reset(self) -> None:
        """Start counting anew."""
        self._layers.clear()

    def new_cache(self) -> Any:
        """An empty cache with stores, to pass as ``past_key_values`` and keep over several turns.

        ``generate`` without one gets the same by itself.

        Raises:
            ValueError: neither ``decode`` nor ``cache`` was given, or the handle is disabled.
        """
        model = self._model()
        if self.cache is None or not self._enabled or model is None:
            raise ValueError("there are no stores: call gossamer.enable(model, decode=...) or with cache=... first")
        return caches.new_cache(cast(Any, model).config, self.cache)

    def observe(self, visit: Callable[[Observation], None] | None, *, rotary: bool = False) -> None:
        """Show ``visit`` the tensors of every attention call with several queries and a plain mask; None ends it.

        It is called after the attention, in the order of the layers, and for dense calls too. What it keeps stays in
        memory.

        Args:
            rotary: have calls say how the model turned their q and k; two tokens are run to find it out.

        Raises:
            ValueError: the handle is disabled; or the model turns them in no way that can be undone.
        """
        model = self._model()
        if not self._enabled or model is None:
            raise ValueError("this handle is disabled; call gossamer.enable(model) again")
        if rotary:
            self.find_rotary(model)
        self._own(model, visit)

    def replace(self, attend: Callable[[AttentionCall], Tensor] | None) -> None:
        """Have ``attend`` make the output ``[B, H, S, Dv]`` of calls with several queries and a plain mask.

        For training what stands beside a model: gradients pass through it. None gives them back to the policy.

        Raises:
            ValueError: the handle is disabled.
        """
        model = self._model()
        if not self._enabled or model is None:
            raise ValueError("this handle is disabled; call gossamer.enable(model) again")
        self._instead = attend
        self._own(model, self._visit)

    @contextmanager
    def sampling(self, prompt: int | Sequence[int], steps: int) -> Iterator[Sampling]:
        """Tell calls of a diffusion language model which tokens are the prompt, and at which step they are.

        Methods such as ``sparsed`` need it; the model must be enabled with ``bidirectional=True``::

            with handle.sampling(prompt=input_ids.shape[1], steps=64) as sampling:
                for step in range(64):
                    sampling.begin(step)
                    logits = model(tokens).logits

        Args:
            prompt: tokens of the prompt, of each batch row or of all; padding on the left does not count.
            steps: of the whole sampling.

        Raises:
            ValueError: the handle is disabled, or a number is out of range.
        """
        model = self._model()
        if not self._enabled or model is None:
            raise ValueError("this handle is disabled; call gossamer.enable(model) again")
        self._sampling = Sampling(prompt, steps)
        self._own(model, self._visit)
        try:
            yield self._sampling
        finally:
            self._sampling = None
            if self._enabled:
                self._own(model, self._visit)

    def share(self, model: nn.Module, group: Any, kind: str) -> None:
        """Have the ranks of a group share each prompt; see `enable`.

        Raises:
            ValueError: a method or a model that ranks cannot share, or no process group. The handle is then disabled.
        """
        held = self._model
        try:
            self.context = Context(held, self.policy, group, kind)
        except ValueError:
            self.disable()
            raise
        self._own(model, None)

    def find_rotary(self, model: nn.Module) -> None:
        """Have calls say how the model turned their q and k, after a look at two tokens.

        Raises:
            ValueError: the model turns them in no way that can be undone.
        """
        if self._positions is not None:
            return
        module = rotary_module(model)
        positions = Positions(verified(model, module, lambda visit: self._own(model, visit)))
        self.reset()
        self._positions = positions
        self._hook = module.register_forward_pre_hook(positions, with_kwargs=True)
        self._own(model, None)

    def disable(self) -> None:
        """Give the model its previous attention implementation back. A second call does nothing.

        What the user has chosen since with ``set_attn_implementation`` stays. A config that other enabled models share
        is given back by the last of them. A model that is deleted gives its share back by itself.
        """
        model = self._model()
        if not self._enabled or model is None:
            self._enabled = False
            return
        self._enabled = False
        self._given_back.detach()
        self._reached.stop()
        self._modalities.stop()
        if self._stores is not None:
            self._stores.stop()
        if self._hook is not None:
            self._hook.remove()
        self._own(model, None, enabled=False)
        returned = {key: lend(config, previous, -1) for key, (config, previous) in self._lent.items()}
        wanted = {key: former for key, former in returned.items() if former and is_ours(self._lent[key][0])}
        if wanted:
            cast(Any, model).set_attn_implementation(implementations(cast(Any, model).config, wanted))

    def _own(self, model: nn.Module, visit: Callable[[Observation], None] | None, enabled: bool = True) -> None:
        rotary = None if self._positions is None else self._positions.of
        shared = None if self.context is None else self.context.attend
        self._visit = visit
        for part, counter in self._reached.counters(model):
            owner = Owner(self.policy, self._record, visit, counter, rotary, self._instead, shared) if enabled else None
            if owner is not None and part is model:
                owner = dataclasses.replace(owner, modalities=self._modalities.layout)
            if owner is not None and self._sampling is not None:
                owner = dataclasses.replace(owner, given=self._sampling.given)
            for module in part.modules():
                set_owner(module, owner)

    def _record(self, call: CallRecord) -> None:
        self._layers.setdefault(call.layer, LayerStats(call.layer)).add(call)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def __repr__(self) -> str:
        model = self._model()
        name = type(model).__name__ if model is not None else "a model that is gone"
        state = "enabled" if self.enabled else "disabled"
        if self._enabled and model is not None and not self.enabled:
            state = "switched off by set_attn_implementation"
        said = self.cache is None or self.cache.name == "keep" or self.policy.cache is not None
        kept = "" if said or self.cache is None else f", cache {self.cache.name}"
        return f"<gossamer {self.policy.name} on {name}{kept}, {state}>"


def _give_back(lent: Mapping[int, tuple[Any, str]]) -> None:
    """What `Handle.disable` does for configs, after a model that was never disabled."""
    for config, previous in lent.values():
        former = lend(config, previous, -1)
        if former and is_ours(config):
            config._attn_implementation = {"": former}  # its own, and none of its parts'


def enable(
    model: Any,
    method: str | Method | Policy = "minference",
    *,
    profile: str | os.PathLike[str] | Profile | None = None,
    decode: str | Method | None = None,
    cache: str | CachePolicy | None = None,
    min_tokens: int | None = None,
    max_density: float | None = None,
    bidirectional: bool = False,
    training: bool = False,
    keep_plans: bool = True,
    context_parallel: Any = None,
    context_layout: str = "striped",
    **fields: Any,
) -> Handle:
    """Run a transformers model's attention through gossamer: prefill by a sparse method, decoding dense or by another.

    Only this model object is affected, and of a composite model only its text part (with ``bidirectional``, all parts).
    Its weights, its config's other fields and the library stay as they are.

    Args:
        model: a transformers model whose attention goes through ``AttentionInterface``.
        method: a name from `gossamer.methods.available`, a method, or a whole policy.
        profile: methods per layer and head instead: a `Profile`, or the path of one. `method` may be left out, or name
            what the profile holds (``minference``, ``per_head``). A profile of another model is refused; of one whose
            config differs a little (`Profile.check_config`), the logger ``gossamer`` warns.
        decode: what each decode step reads of the cache: a method's name from `gossamer.methods.decoding`, or such a
            method. Without it, a step reads all of the cache.
        cache: what the cache keeps, and how: a name from `gossamer.cache.available`, or a `gossamer.cache.CachePolicy`.
            With it, or with `decode`, each cache that the model is called with gets stores for its layers of full
            attention; `Handle.new_cache` makes one for several turns.
        min_tokens, max_density: thresholds of the policy; see `Policy`.
        bidirectional: also run encoders and cross-attention sparse, where the method can; else they run dense. Of
            encoder-decoders, keys with left padding run dense all the same.
        training: run layers in ``model.train()``, and calls that need a gradient, sparse too; else they are dense.
        keep_plans: keep each layer's plan until its gradient is computed; False: make it again then. As `training`, in
            place of what a `Policy` says.
        context_parallel: a ``torch.distributed`` group (True: all processes) whose ranks share each prompt, for
            prompts larger than the memory of one; they are read by `Handle.context`, without gradients. The method is
            then ``dense``, ``a_shape`` or ``vertical_slash``, and `Handle.stats` counts nothing.
        context_layout: which rank has which tokens, see `gossamer.distributed.Layout`.
        **fields: hyperparameters of the method, where `method` is a name.

    Raises:
        TypeError: not a transformers model.
        ValueError: an unknown method or field, one that ranks cannot share, a profile of another model, a model that
            is enabled already, one with sliding windows where ranks share prompts, one that
            cannot switch its attention implementation, or one that shares its config with a model that is enabled
            otherwise; or a method that needs the rotary embedding of a model that has none, or one that cannot be
            undone.
        RuntimeError: later, after the first forward pass of the model, its base model or another part that reads text:
            some of its attention layers did not come here.
    """
    if profile is not None and not isinstance(profile, Profile):
        profile = Profile.load(profile)
    policy = policy_of(method, profile, min_tokens, max_density, fields)
    policy = dataclasses.replace(policy, training=training, keep_plans=keep_plans)
    if decode is not None:
        policy = dataclasses.replace(policy, decode=methods.create(decode) if isinstance(decode, str) else decode)
    kept = _cache_policy(cache, policy, context_parallel)
    modules = getattr(model, "modules", None)
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config") or modules is None:
        raise TypeError(
            f"gossamer.enable needs a transformers model (a PreTrainedModel), got {type(model).__name__}; "
            "for a pipeline, pass its .model"
        )
    _check_profile(policy.method, profile, model.config)
    if any(owner_of(module) is not None for module in modules()):
        raise ValueError(
            f"this {type(model).__name__}, or a part of it, is enabled already; call disable() on its handle first"
        )
    register()
    decoder = model.config.get_text_config(decoder=True)
    text = model.config if bidirectional else decoder
    name = BIDIRECTIONAL if bidirectional else NAME
    refuse(model, text, name)
    before = {id(config): (config, config._attn_implementation) for config in configs(model)}
    previous = implementations(model.config)
    model.set_attn_implementation(name if bidirectional else request(model.config, text))
    reached = text if path_to(model.config, text) is not None else model.config
    if reached._attn_implementation != name:
        model.set_attn_implementation(previous)
        raise ValueError(
            f"{type(model).__name__} does not let its attention implementation be changed: its modelling code does "
            "not go through transformers' AttentionInterface. gossamer cannot run it"
        )
    lent = {key: (config, former) for key, (config, former) in before.items() if is_ours(config)}
    handle = Handle(model, policy, lent, kept)
    if context_parallel is not None:
        handle.share(model, context_parallel, context_layout)
    moves = kept is not None and kept.needs_rotary()
    if moves or "rotary" in needs_of(policy.method):
        try:
            handle.find_rotary(model)
        except ValueError as error:
            handle.disable()
            what = "this cache turns keys by" if moves else f"{policy.method.name} looks at q and k before"
            raise ValueError(f"{what} their rotary embedding: {error}") from error
    return handle


def _cache_policy(cache: str | CachePolicy | None, policy: Policy, context_parallel: Any) -> CachePolicy | None:
    if cache is None and policy.cache is not None:
        cache = cast(CachePolicy, policy.cache)
    if cache is not None and not isinstance(cache, str | CachePolicy):
        raise TypeError(f"cache must be a name or a gossamer.cache.CachePolicy, got {type(cache).__name__}")
    if (cache is not None or policy.decode is not None) and context_parallel is not None:
        raise ValueError("ranks that share prompts decode dense: leave decode and cache out beside context_parallel")
    if cache is None:
        return None if policy.decode is None else caches.create("keep")
    return caches.create(cache) if isinstance(cache, str) else cache


def _check_profile(method: Method, profile: Profile | None, config: Any) -> None:
    """That methods per head are for this model, where its config and the profile say how that shows."""
    if profile is None and isinstance(method, PerHead) and method.layers:
        profile = Profile(method.layers)
    note = None if profile is None else profile.check_config(config)
    if note is not None:
        logger.warning("%s; it may fit this one less well", note)
