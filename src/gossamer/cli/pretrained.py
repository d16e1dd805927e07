"""MODEL as a folder or as a GGUF file, which is converted into a folder once.

A GGUF file holds quantised weights, a config, a tokenizer and its chat template. transformers' loader unpacks it to
float32, which takes a minute or more; what comes out is kept in a cache, under the hash of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from gossamer.cli.common import BadInput, first_line

__all__ = ["cache_folder", "file_hash", "model_folder"]

_SOURCE = "source.json"
_CHUNK = 1 << 24


def cache_folder() -> Path:
    """Of converted models: ``$GOSSAMER_CACHE``, else ``gossamer`` in the user's cache folder."""
    named = os.environ.get("GOSSAMER_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gossamer"


def model_folder(path: Path) -> Path:
    """The folder of a transformers model: ``path`` itself, or, of a GGUF file, what it was converted into.

    The hash of the file decides whether it was converted before. A file ``<name>.gguf.sha256`` beside it, as sha256sum
    writes them, is compared with that hash.

    Raises:
        BadInput: the file is cut off, damaged, of an unknown architecture or not the one that its hash names; what
            reads it is not installed; or the cache cannot be written.
    """
    if path.suffix.lower() != ".gguf" or not os.path.isfile(path):
        return path
    _check_file(path)
    try:
        found = file_hash(path)
        _check_hash(path, found)
        cache = cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot convert {path}: {error.filename}: {error.strerror}") from error
    known = _converted(cache, found)
    return known if known is not None else _convert(path, found, cache)


def file_hash(path: Path) -> str:
    """SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise BadInput(f"{path} is no GGUF file: it begins with {magic!r} instead of b'GGUF'; get it again")
    part = re.search(r"-\d{5}-of-(\d{5})\.gguf$", path.name, re.IGNORECASE)
    if part and int(part[1]) > 1:
        raise BadInput(f"{path} is one of {int(part[1])} parts; join them first: llama-gguf-split --merge")


def _check_hash(path: Path, found: str) -> None:
    beside = path.with_name(path.name + ".sha256")
    if not beside.is_file():
        return
    words = beside.read_bytes()[:1000].decode(errors="replace").split()
    expected = words[0].lower() if words else ""
    if expected != found:
        raise BadInput(f"{path} has the SHA-256 {found}, but {beside.name} says {expected!r}; get the file again")


def _converted(cache: Path, digest: str) -> Path | None:
    """The folder of a file that was converted before, whatever the file was called then."""
    for folder in sorted(cache.glob(f"*-{digest[:16]}")):
        try:
            source = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(source, dict) and source.get("sha256") == digest:
            return folder
    return None


def _convert(path: Path, digest: str, cache: Path) -> Path:
    """The folder gets its name when it is whole; what an interrupted conversion leaves, the next one removes."""
    _require_packages(path)
    from filelock import FileLock

    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)[:100].lstrip(".") or "model"
    folder = cache / f"{name}-{digest[:16]}"
    with FileLock(cache / f".{digest[:16]}.lock"):
        known = _converted(cache, digest)
        if known is not None:  # another process was faster
            return known
        begun = cache / f".{digest[:16]}.partial"
        shutil.rmtree(begun, ignore_errors=True)
        try:
            source = {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}
            _write_model(path, begun, folder)
            (begun / _SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # one without a source, by somebody else
            os.replace(begun, folder)
        except OSError as error:
            raise BadInput(f"cannot write {folder}: {error.strerror or first_line(error)}") from error
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    return folder


def _require_packages(path: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import accelerate  # noqa: F401  # pyright: ignore[reportMissingImports]
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports]
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput(f"reading {path} needs {error.name}: pip install 'gossamer[gguf]'") from error


def _write_model(path: Path, begun: Path, folder: Path) -> None:
    """Unpack a GGUF file into the folder ``begun``, which is to become ``folder``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    given: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        try:
            AutoConfig.from_pretrained(path.parent, **given)
        except Exception as error:  # whatever the parsers do
            raise _unreadable(path, error) from error
        print(f"converting {path} into {folder}, once; this takes a minute or more", file=sys.stderr, flush=True)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                **given,
            )
            model, report = loaded
        except Exception as error:  # likewise
            raise _unreadable(path, error) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise BadInput(f"{path} lacks {len(missing)} of the model's weights, {missing[0]} first; get the file again")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(begun)
    tokenizer.save_pretrained(begun)


def _unreadable(path: Path, error: Exception) -> BadInput:
    said = first_line(error)
    if "architecture" in said or "not supported" in said:
        return BadInput(f"{path} cannot be converted: transformers says {said!r}; give the model as a folder instead")
    return BadInput(f"{path} is cut off or damaged, or no language model ({said}); get the file again")
