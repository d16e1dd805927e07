"""``gossamer run``: a model reads a prompt with a sparse method and answers greedily."""

from __future__ import annotations

import argparse
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json, table
from gossamer.cli.inputs import (
    check_environment,
    check_made_for,
    check_profile,
    read_model,
    read_profile,
    read_prompt,
    require_transformers,
    text_config,
)
from gossamer.cli.machine import add_dtype
from gossamer.cli.media import load_processor, prepare, read_media
from gossamer.cli.pretrained import model_folder
from gossamer.cli.specs import make_policy, parse_cache, parse_method
from gossamer.policy import Policy
from gossamer.profiles import Profile

if typing.TYPE_CHECKING:
    from gossamer.cache import CachePolicy
    from gossamer.cli.generation import Generation

__all__ = ["add_parser"]

_COLUMNS: tuple[str, ...] = (
    "method",
    "prefill s",
    "attention s",
    "density",
    "tokens/s",
    "top-1 as dense",
    "same tokens",
)


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "run", execute, "let a model read a long prompt and stream its answer")
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument("prompt", nargs="?", default="-", help="text file; - or nothing reads standard input")
    parser.add_argument("--method", default="minference", help="see `gossamer methods` (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the method")
    parser.add_argument("--profile", type=Path, help="a method for each head, in place of minference or per_head")
    parser.add_argument(
        "--decode", metavar="SPEC", help="what each new token reads of the cache, such as quest(budget=1024); else all"
    )
    parser.add_argument("--cache", metavar="SPEC", help="what the cache keeps, such as keep(sinks=4); else all")
    parser.add_argument("--min-tokens", type=int, help="shorter prompts run dense (default: as `gossamer doctor` says)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument(
        "--image", action="append", default=[], type=Path, metavar="FILE", help="a picture to read; may be repeated"
    )
    parser.add_argument(
        "--video", action="append", default=[], type=Path, metavar="FOLDER", help="a folder of frames to read"
    )
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    parser.add_argument(
        "--filter", metavar="LAYER:KEEP", help="drop all but the KEEP tokens that the last one looks at most in a layer"
    )
    parser.add_argument("--compare", action="store_true", help="also run dense, and print both as a table")


def execute(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    filtering = _parse_filter(arguments.filter)
    if filtering and (arguments.image or arguments.video):
        raise BadInput("--filter takes prompts of text alone; leave --image and --video out")
    check_environment()
    profile = read_profile(arguments.profile)
    policy, cache = _make_policy(arguments, profile), _make_cache(arguments.cache)
    arguments.model = model_folder(arguments.model)
    config = read_model(arguments.model)
    check_profile([policy], profile, config)
    media = read_media(arguments.image, arguments.video)
    text = read_prompt(arguments.prompt)
    require_transformers("run")
    from gossamer.cli.generation import (
        compare_top1,
        filtered,
        generate,
        layer_progress,
        load_checked,
        load_tokenizer,
        tokenize,
    )

    if media:
        processor = load_processor(arguments.model)
        tokenizer, inputs = processor.tokenizer, prepare(processor, text, media, arguments.chat)
    else:
        tokenizer = load_tokenizer(arguments.model)
        inputs = {"input_ids": tokenize(tokenizer, text, arguments.chat)}
    prompt = inputs.pop("input_ids")
    _check_length(config, prompt.shape[1], arguments.max_new_tokens)
    model = load_checked(arguments.model, arguments.dtype, shown=bool(media))
    check_made_for(profile, model)

    contenders = [policy]
    short = filtered(model, prompt, policy, *filtering) if filtering else None
    if arguments.compare:
        # Pages the weights in, so that neither contender pays.
        _generated(generate, model, tokenizer, prompt[:, -1:] if media else prompt[:, :64], policy, 1)
        contenders.append(Policy.of("dense"))
    results: list[Generation] = []
    for contender in contenders:
        stream = sys.stdout if not (arguments.json or results) else None
        read = prompt if short is None or results else short.prompt
        top1 = arguments.compare and short is None  # positions of two prompts are not comparable
        with layer_progress(model, f"{contender.name}: prefill"):
            given = model, tokenizer, read, contender, arguments.max_new_tokens, stream
            kept = None if contender is not policy else cache
            results.append(_generated(generate, *given, keep_top1=top1, cache=kept, shown=inputs))
    answer, dense = results[0], results[-1]
    if short is not None:
        answer.prefill_seconds += short.seconds
    agreement = compare_top1(answer, dense) if arguments.compare and short is None else None
    if arguments.json:
        data = {"model": str(arguments.model), "prompt_tokens": prompt.shape[1], "method": policy.method.to_dict()}
        if policy.decode is not None:
            data["decode"] = policy.decode.to_dict()
        if cache is not None:
            data["cache"] = cache.to_dict()
        if policy.profile:
            data["profile"] = policy.profile
        data |= answer.to_dict()
        if short is not None:
            data["filter"] = short.to_dict()
        if arguments.compare:
            data["dense"] = dense.to_dict()
            data["top1_agreement"] = agreement
        print_json(data)
        return 0
    if arguments.compare:
        names = [contender.name for contender in contenders]
        print(_comparison(names, results, agreement), file=sys.stderr)
    print(*filter(None, (short and short.summary(), answer.summary())), sep="\n", file=sys.stderr)
    return 0


def _parse_filter(text: str | None) -> tuple[int, int] | None:
    """A layer, and how many tokens it keeps."""
    if text is None:
        return None
    numbers = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", text)
    if numbers is None or int(numbers[2]) == 0:
        raise BadInput(
            f"--filter takes LAYER:KEEP, the number of a layer and of tokens, as in 13:1024; got {text!r:.40}"
        )
    return int(numbers[1]), int(numbers[2])


def _generated(generate: typing.Any, *given: typing.Any, **options: typing.Any) -> Generation:
    try:
        return generate(*given, **options)
    except ValueError as error:  # a method that cannot serve this model, or a file of another's
        raise BadInput(first_line(error)) from error


def _make_policy(arguments: argparse.Namespace, profile: Profile | None) -> Policy:
    try:
        policy = make_policy(arguments.method, arguments.set, profile, arguments.min_tokens)
        if arguments.decode is None:
            return policy
        return replace(policy, decode=None if arguments.decode == "none" else parse_method(arguments.decode))
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error


def _make_cache(spec: str | None) -> CachePolicy | None:
    if spec is None:
        return None
    require_transformers("run --cache")
    try:
        return parse_cache(spec)
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error


def _check_length(config: dict[str, Any], tokens: int, new_tokens: int) -> None:
    limit = text_config(config).get("max_position_embeddings")
    if limit is not None and tokens + new_tokens > limit:
        raise BadInput(
            f"the prompt is too long: {tokens} tokens and {new_tokens} new ones, but this model takes {limit}; "
            f"shorten it to {max(0, limit - new_tokens)} tokens or lower --max-new-tokens"
        )


def _comparison(names: Sequence[str], results: Sequence[Generation], agreement: float | None) -> str:
    dense = results[-1]
    rows = [_COLUMNS]
    for name, result in zip(names, results, strict=True):
        same = sum(a == b for a, b in zip(result.tokens, dense.tokens, strict=False))
        rows.append(
            (
                name,
                f"{result.prefill_seconds:.2f}",
                f"{result.plan_seconds + result.attention_seconds:.2f}",
                f"{result.density:.3f}",
                f"{result.tokens_per_second:.1f}",
                "-" if agreement is None or result is dense else f"{agreement:.2%}",
                "-" if result is dense else f"{same}/{len(dense.tokens)}",
            )
        )
    return table(rows)
