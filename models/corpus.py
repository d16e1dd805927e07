"""Text that is on any machine with Python: the standard library and the packages that torch and transformers bring.

The text is read at training time only. Files are visited in sorted order, exact duplicates of paragraphs are
dropped, and one file in twelve (chosen by the hash of its relative path) is held out for evaluation, so that
the same versions of Python and of the packages always give the same corpus; `Corpus.sha256` says whether they
did.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import io
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("huggingface_hub", "jinja2", "mpmath", "networkx", "numpy", "sympy", "torch", "transformers")
HELD_OUT_ONE_IN = 12
MAX_FILE_BYTES = 400_000
MIN_DOCUMENT_CHARS = 400


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for evaluation, and what identifies them.

    train, held_out: texts, one per source file.
    sha256: hash of all texts in order.
    versions: Python and package versions that the texts come from.
    """

    train: list[str]
    held_out: list[str]
    sha256: str
    versions: dict[str, str]


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 60:
                line = node.body[0].lineno
                name = getattr(node, "name", "")
                yield line, f"{name}\n{text}" if name else text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Blocks of full-line comments of at least two lines."""
    block: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            if not block:
                start = token.start[0]
            block.append(token.string.lstrip("#!: ").rstrip())
        elif token.type not in (tokenize.NL, tokenize.COMMENT) and block:
            if len(block) > 1:
                yield start, "\n".join(block)
            block = []


def _prose(source: str) -> list[str]:
    """Docstrings and comment blocks of Python source, in the order of their lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    return [text for _, text in sorted([*_docstrings(tree), *_comments(source)])]


def _roots() -> list[tuple[str, Path]]:
    roots = [("stdlib", Path(sysconfig.get_paths()["stdlib"]))]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"the corpus needs the package {name!r}; install torch and transformers")
        roots.append((name, Path(next(iter(spec.submodule_search_locations)))))
    return roots


def _python_files(root: Path) -> list[Path]:
    skip = {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "_vendor", "ensurepip"}
    files = [p for p in root.rglob("*.py") if not skip.intersection(p.relative_to(root).parts)]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def _documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every source file: its prose and, for one file in four, the source itself."""
    seen: set[int] = set()
    for label, root in _roots():
        for path in _python_files(root):
            if path.stat().st_size > MAX_FILE_BYTES and path.name != "topics.py":
                continue
            name = f"{label}/{path.relative_to(root).as_posix()}"
            try:
                source = path.read_text(encoding="utf-8")
                parts = _prose(source)
            except (SyntaxError, UnicodeDecodeError, ValueError, tokenize.TokenError):
                continue
            paragraphs = []
            for part in parts:
                for paragraph in part.split("\n\n"):
                    key = hash_text(paragraph)
                    if key not in seen and paragraph.strip():
                        seen.add(key)
                        paragraphs.append(paragraph.rstrip())
            text = "\n\n".join(paragraphs)
            if len(text) >= MIN_DOCUMENT_CHARS:
                yield name, text + "\n"
            if hash_text(name) % 4 == 1 and 2000 <= len(source) <= 60_000:
                yield name, source
    from pydoc_data import topics

    for topic, text in sorted(topics.topics.items()):
        yield f"pydoc/{topic}", text


def hash_text(text: str) -> int:
    """A 64-bit hash of text that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def load_corpus() -> Corpus:
    """Read the corpus of this Python environment (about half a minute).

    Raises ValueError if one of PACKAGES is not installed.
    """
    train: list[str] = []
    held_out: list[str] = []
    digest = hashlib.sha256()
    for name, text in _documents():
        digest.update(text.encode())
        (held_out if hash_text(name) % HELD_OUT_ONE_IN == 0 else train).append(text)
    versions = {"python": platform.python_version()}
    versions.update({name: importlib.metadata.version(name) for name in PACKAGES})
    return Corpus(train, held_out, digest.hexdigest(), versions)
