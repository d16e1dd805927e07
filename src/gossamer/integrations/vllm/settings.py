"""What a vLLM server was asked for: ``--additional-config '{"gossamer": {...}}'`` or ``GOSSAMER_VLLM``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gossamer.integrations.vllm.decoding import check_decode
from gossamer.integrations.vllm.rows import NEVER
from gossamer.methods import Dense, Method, from_dict
from gossamer.methods.registry import class_of
from gossamer.policy import FEW_QUERIES, Policy
from gossamer.profiles import Profile, read_table
from gossamer.profiles.files import parse_json, shown
from gossamer.profiles.heads import check_heads

__all__ = ["VARIABLE", "Settings", "check_model"]

VARIABLE = "GOSSAMER_VLLM"
MIN_QUERIES = 64
MIN_CONTEXT = 8192
_THRESHOLDS = ("min_tokens", "max_density")
_OURS = ("profile", "policies", "min_queries", "min_context")
_MOST = 100_000  # characters of a request's own policy


@dataclass(frozen=True)
class Settings:
    """A server's policy, and those that a request may name.

    Fields:
        policy: of requests that name none.
        profile: the file that it came from, checked against the model by `for_model`; None without one.
        min_queries: rows with fewer queries in a step run on vLLM's own kernel: decoding, the drafts of speculative
            decoding, short chunks. At least 32.
        min_context: sequences of fewer tokens decode on vLLM's own kernel, whatever a policy's ``decode`` says.
        policies: by name, for requests (see `of_request`).
        part: the tensor-parallel rank that it is for, as `of_rank` takes it; None for all heads.
    """

    policy: Policy
    profile: Profile | None = None
    min_queries: int = MIN_QUERIES
    policies: Mapping[str, Policy] = field(default_factory=dict)
    min_context: int = MIN_CONTEXT
    part: tuple[int, int, int, int] | None = None

    @classmethod
    def read(cls, additional: Any) -> Settings | None:
        """From ``additional_config``, else from the environment; None if neither asks for anything.

        Raises:
            ValueError, TypeError: what is wrong, where, and what was expected.
        """
        given: Any = additional.get("gossamer") if isinstance(additional, Mapping) else None
        source = 'additional_config["gossamer"]'
        if given is None:
            text, source = os.environ.get(VARIABLE, "").strip(), VARIABLE
            if not text:
                return None
            given = text
        try:
            return cls.of(given)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def of(cls, given: Any) -> Settings:
        """From a method's name, JSON text, or an object.

        An object has ``method`` with its fields beside it, or ``profile``, a file; and, where they should be others
        than by default, ``min_tokens`` and ``max_density`` (see `gossamer.Policy`), ``min_queries``, ``min_context``
        and ``policies`` (objects of a method and thresholds by name, for requests). Its ``decode``, a method's name or
        an object, chooses what decoding reads; without a method beside it vLLM's kernel runs all prompts.

        Raises:
            ValueError, TypeError: something else.
            OSError: a file that cannot be read.
        """
        given = _object(given)
        policies = given.get("policies", {})
        if not isinstance(policies, Mapping) or not all(isinstance(name, str) and name for name in policies):
            raise ValueError(f"policies must be an object of policies by name, got {shown(policies)}")
        least = given.get("min_queries", MIN_QUERIES)
        if not isinstance(least, int) or isinstance(least, bool) or least < FEW_QUERIES:
            raise ValueError(f"min_queries must be an integer of at least {FEW_QUERIES}, got {shown(least)}")
        context = given.get("min_context", MIN_CONTEXT)
        if not isinstance(context, int) or isinstance(context, bool) or context < 0:
            raise ValueError(f"min_context must be an integer, 0 or more, got {shown(context)}")
        named: dict[str, Policy] = {}
        for name, one in policies.items():
            try:
                named[name] = _policy(_object(one), files=True)
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"policies, {shown(name)}: {error}") from error
        fields = {name: value for name, value in given.items() if name not in _OURS}
        if "profile" not in given:
            return cls(_policy(fields, files=True), None, least, named, context)
        decode = fields.pop("decode", None)
        if set(fields) - set(_THRESHOLDS):
            others = ", ".join(sorted(set(fields) - set(_THRESHOLDS)))
            raise ValueError(f"a profile names a method for each head; leave {others} out")
        if not isinstance(given["profile"], (str, os.PathLike)):
            raise ValueError(f"profile must be the path of a file, got {shown(given['profile'])}")
        profile = Profile.load(given["profile"])
        steps = profile.decode if "decode" not in given else None if decode is None else _decode(decode, files=True)
        check_decode(steps)
        return cls(Policy(profile.method, profile=profile.name, decode=steps, **fields), profile, least, named, context)

    @property
    def text(self) -> str:
        """Of the server's policy, as `of_request` has it."""
        return _text(self.policy)

    def of_request(self, given: Any) -> tuple[str, Policy]:
        """The policy that a request names, and a text that is the same for equal policies and no others.

        The policy has the heads of the rank that these settings are for.

        Args:
            given: a name of `policies`; or a method as an object, as JSON text or, with its defaults, by its name.
                A request names no files.

        Raises:
            ValueError, TypeError: something else.
        """
        if isinstance(given, str) and given in self.policies:
            policy = self.policies[given]
            return _text(policy), policy
        if isinstance(given, str) and len(given) > _MOST:
            raise ValueError(f"a policy of {len(given)} characters; at most {_MOST} are read")
        try:
            policy = _policy(_object(given), files=False)
        except ValueError as error:
            known = f" or one of this server's policies: {', '.join(self.policies)}" if self.policies else ""
            raise ValueError(f"{error}; give a method's name, or an object with method and fields{known}") from error
        return _text(policy), policy if self.part is None else _of_rank(policy, self.part)

    def for_model(self, config: Any) -> str | None:
        """That the profile and the policies are for the model of a transformers config; see `Profile.check_config`.

        Raises:
            ValueError: one is for another model.
        """
        remark = None if self.profile is None else self.profile.check_config(config)
        check_model(self.policy, config)
        for name, policy in self.policies.items():
            try:
                check_model(policy, config)
            except ValueError as error:
                raise ValueError(f"policies, {shown(name)}: {error}") from error
        return remark

    def of_rank(self, rank: int, ranks: int, heads: int, groups: int) -> Settings:
        """The same for the heads of one tensor-parallel rank.

        Args:
            heads, groups: query heads and key/value heads of the whole model.

        Raises:
            ValueError: numbers that do not divide.
        """
        if ranks == 1:
            return self
        part = rank, ranks, heads, groups
        policies = {name: _of_rank(one, part) for name, one in self.policies.items()}
        return replace(self, policy=_of_rank(self.policy, part), policies=policies, part=part)


def check_model(policy: Policy, config: Any) -> None:
    """That what a policy holds by layer and head is there, and for the model of a transformers config.

    Raises:
        ValueError: it is not.
    """
    text = config.get_text_config(decoder=True)
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = [getattr(text, name, None) for name in sizes]
    check_heads(policy.method, *numbers)
    decode = policy.decode
    if decode is not None and any(getattr(decode, name) for name in decode.tables):  # without them all heads are alike
        check_heads(decode, *numbers)


def _of_rank(policy: Policy, part: tuple[int, int, int, int]) -> Policy:
    decode = None if policy.decode is None else policy.decode.of_rank(*part)
    return replace(policy, method=policy.method.of_rank(*part), decode=decode)


def _text(policy: Policy) -> str:
    fields: dict[str, Any] = {"min_tokens": policy.min_tokens, "max_density": policy.max_density}
    if policy.decode is not None:
        fields["decode"] = policy.decode.to_dict()
    return json.dumps(_plain(policy.method.to_dict() | fields), sort_keys=True)


def _plain(value: Any) -> Any:
    """Equal numbers as equal texts."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _object(given: Any) -> Mapping[str, Any]:
    """An object from itself, from its JSON, or from a method's name."""
    if isinstance(given, str):
        text = given.strip()
        given = parse_json(text) if text.startswith("{") else {"method": text}
    if not isinstance(given, Mapping):
        raise ValueError(f"expected a method's name or an object with method and fields, got {shown(given)}")
    return given


def _policy(given: Mapping[str, Any], files: bool) -> Policy:
    """A method with its fields, and thresholds; and what decoding reads, which may stand alone."""
    thresholds = {name: given[name] for name in _THRESHOLDS if name in given}
    fields = {name: value for name, value in given.items() if name not in (*_THRESHOLDS, "decode")}
    decode = None if given.get("decode") is None else _decode(given["decode"], files)
    if fields or decode is None:
        method = _method(fields, files)
    elif "min_tokens" in thresholds:
        raise ValueError("min_tokens is of prompts, for which no method is named; leave it out, or give a method")
    else:
        method, thresholds["min_tokens"] = Dense(), NEVER
    try:
        return Policy(method, decode=decode, **thresholds)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _decode(given: Any, files: bool) -> Method:
    """A method that chooses what decoding reads, of a cache that keeps what vLLM's keeps."""
    try:
        method = _method(_object(given), files)
        check_decode(method)
    except (ValueError, TypeError) as error:
        raise ValueError(f"decode: {error}") from error
    return method


def _method(given: Mapping[str, Any], files: bool) -> Method:
    """A method by its name, with its fields."""
    fields = dict(given)
    if files and isinstance(fields.get("method"), str):
        for name in class_of(fields["method"]).tables:
            if isinstance(fields.get(name), str):
                fields[name] = read_table(fields[name], name)
    try:
        method = from_dict(fields)
    except TypeError as error:
        raise ValueError(str(error)) from error
    named = [f"{part.name}.{name}" for part in method.parts() for name in part.files if getattr(part, name)]
    if named and not files:
        raise ValueError(f"{named[0]} names a file, which a request must not; have the server's policies name it")
    return method
