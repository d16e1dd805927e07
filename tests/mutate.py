"""Mutation testing: small faults are put into the package, one at a time, and the tests of that part must notice.

    python tests/mutate.py                      the whole sample, as `make mutants` does
    python tests/mutate.py --parts plan call    these parts alone
    python tests/mutate.py --limit 10           at most 10 new mutants of each part
    python tests/mutate.py --seconds 600        stop after so many seconds; the next run goes on

Every mutant is tested in a copy of the tree, by a process that is forked from one that has torch loaded (Linux and
macOS), on the torch backend: the copy has no built kernels. Outcomes are kept in build/mutants.jsonl while the mutated
file and the tests of its part stay as they are. The result is tests/mutants.json, in which a person explains the
survivors; a rerun keeps what they wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutated_parts import PARTS, Part

if TYPE_CHECKING:
    from mutation_points import Mutant

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "tests" / "mutants.json"
OUTCOMES = ROOT / "build" / "mutants.jsonl"
SEED = 20
SAMPLE = 340
LEAST = 15
MEMORY_BYTES = 8 << 30
# What the forked processes should not load again and again. Nothing of gossamer: it is what changes.
PRELOADED = ("transformers", "tokenizers", "numpy", "hypothesis")


def shares(possible: dict[str, int], total: int, least: int) -> dict[str, int]:
    """How many of a sample each part gets: by its number of mutants, but at least ``least`` where there are as many."""
    everything = sum(possible.values())
    return {
        name: min(count, max(least, round(total * count / everything))) if everything else 0
        for name, count in possible.items()
    }


def sample_of(mutants: list[Mutant], number: int) -> list[Mutant]:
    return sorted(mutants, key=lambda mutant: mutant.rank(SEED))[:number]


def mutants_by_part(parts: list[Part]) -> dict[str, list[Mutant]]:
    from mutation_points import mutants_of

    files = {
        part.name: sorted(
            path.relative_to(ROOT) for pattern in part.sources for path in (ROOT / "src/gossamer").glob(pattern)
        )
        for part in parts
    }
    return {name: [m for file in group for m in mutants_of(name, ROOT, file)] for name, group in files.items()}


class OneOfEachFirst:
    """A pytest plugin: the first case of every test, then the second of each. Most mutants fail soon then."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        seen: Counter[str] = Counter()
        rounds: dict[str, int] = {}
        for item in items:
            test = item.nodeid.partition("[")[0]
            rounds[item.nodeid] = seen[test]
            seen[test] += 1
        items.sort(key=lambda item: rounds[item.nodeid])


class Copy:
    """A copy of the tree in which mutants stand, and processes that run tests in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = git("ls-files", "-co", "--exclude-standard", "src", "tests", "pyproject.toml")
        for name in listed.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)

    def run(self, part: Part, timeout: float | None, loaded: Path | None = None) -> tuple[int | None, str]:
        """Exit status of the tests of a part, None past the timeout; and what they printed.

        ``loaded`` gets the names of the modules that the tests have loaded.
        """
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                self._test(part, output.fileno(), loaded)
            end = None if timeout is None else time.monotonic() + timeout
            while True:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                if end is not None and time.monotonic() > end:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    status = None
                    break
                time.sleep(0.02)
            output.seek(0)
            text = output.read().decode(errors="replace")
        return None if status is None else os.waitstatus_to_exitcode(status), text

    def _test(self, part: Part, output: int, loaded: Path | None) -> None:
        """Run the tests in this process, which then ends."""
        import resource

        import pytest

        status = 70
        try:
            os.setpgid(0, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
            os.chdir(self.folder)
            # An editable install would find the checkout before the copy. Of a file that changes within a second,
            # cached bytecode could be that of the last mutant.
            sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
            # The torch backend alone: what Triton interprets takes long.
            sys.modules["triton"] = None  # type: ignore[assignment]
            sys.path[:0] = [str(self.folder / "src"), str(self.folder / "tests")]
            sys.dont_write_bytecode = True
            options = "-x -q -n 0 -p no:cacheprovider --tb=no -rfE --hypothesis-seed=0 -W ignore::pytest.PytestWarning"
            status = int(pytest.main([*options.split(), *part.tests], plugins=[OneOfEachFirst()]))
            if loaded is not None:
                loaded.write_text("\n".join(sorted(sys.modules)))
                package = sys.modules["gossamer"].__file__ or ""
                if not package.startswith(str(self.folder)):
                    print(f"the tests ran on {package}, not on the copy")
                    status = 71
        finally:
            sys.stdout.flush()
            os._exit(status)


class Outcomes:
    """What became of each mutant, one line each; a run that was stopped goes on after the last whole line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self.known = {row["key"]: row for row in map(json.loads, whole.splitlines())}

    def of(self, mutant: Mutant, tests: str, *, keep_killed: bool = False) -> dict[str, Any] | None:
        """The outcome, if the mutated file and the tests are those of now; a kill by other tests on request."""
        row = self.known.get(self.key(mutant))
        return row if row and (row["tests"] == tests or (keep_killed and row["outcome"] == "killed")) else None

    def add(self, mutant: Mutant, row: dict[str, Any]) -> None:
        row = {"key": self.key(mutant), **row}
        self.known[row["key"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def key(mutant: Mutant) -> str:
        return digest((ROOT / mutant.file).read_bytes(), mutant.operator.encode(), str(mutant.occurrence).encode())


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def digest_of_tests(part: Part) -> str:
    """Of the files that the tests of a part are in, with what they import from beside them."""
    named = [ROOT / test.partition("::")[0] for test in part.tests if test.startswith("tests/")]
    chosen = [path for path in named if path.exists()]
    files = {file for path in chosen for file in (path.rglob("*.py") if path.is_dir() else [path])}
    folders = {path.parent for path in files} | {ROOT / "tests"}
    files |= {file for folder in folders for file in folder.glob("*.py") if not file.name.startswith(("test_", "muta"))}
    return digest(*(file.read_bytes() for file in sorted(files)), *map(str.encode, part.tests))


class Stopped(Exception):
    """The given time is over."""


def test_part(
    part: Part, sample: list[Mutant], outcomes: Outcomes, copy: Copy, *, limit: int, end: float, keep_killed: bool
) -> None:
    """Test the mutants of a part that have no outcome yet.

    Raises:
        SystemExit: the tests fail without any mutant.
        Stopped: the time is over.
    """
    tests = digest_of_tests(part)
    left = [m for m in sample if outcomes.of(m, tests, keep_killed=keep_killed) is None][:limit]
    if not left:
        return
    start, loaded = time.monotonic(), copy.folder / "loaded.txt"
    status, output = copy.run(part, None, loaded)
    seconds = time.monotonic() - start
    if status != 0:
        raise SystemExit(f"the tests of {part.name} fail as they are (status {status}):\n{output[-4000:]}")
    print(f"{part.name}: {len(left)} mutants; the tests take {seconds:.1f} s", flush=True)
    preload(loaded.read_text().splitlines())
    for mutant in left:
        if time.monotonic() > end:
            raise Stopped
        outcomes.add(mutant, {"part": part.name, "tests": tests, **outcome_of(mutant, part, copy, 20 + 4 * seconds)})


def outcome_of(mutant: Mutant, part: Part, copy: Copy, timeout: float) -> dict[str, Any]:
    from mutation_points import changed_lines

    file = copy.folder / mutant.file
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    mutated = mutant.mutated(source)
    file.write_text(mutated, encoding="utf-8")
    start = time.monotonic()
    try:
        status, output = copy.run(part, timeout)
    finally:
        file.write_text(source, encoding="utf-8")
    outcome = "timed out" if status is None else "killed" if status else "survived"
    was, now = changed_lines(source, mutated)
    seconds = round(time.monotonic() - start, 1)
    print(f"  {outcome:9} {seconds:6.1f} s  {mutant.file}:{mutant.line}  {now}", flush=True)
    failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    by = failed[0][:300] if failed else output[-300:] if status else ""
    return {"outcome": outcome, "seconds": seconds, "was": was, "now": now, "by": by}


def preload(names: list[str]) -> None:
    """Load for all later processes what the tests load from other packages."""
    for name in names:
        if name.split(".")[0] in PRELOADED and name not in sys.modules:
            try:
                __import__(name)
            except Exception as error:  # some modules load from inside others alone; the tests load them then
                print(f"  {name} is not preloaded: {error}", flush=True)


def result_of(
    possible: dict[str, list[Mutant]], samples: dict[str, list[Mutant]], outcomes: Outcomes, *, keep_killed: bool
) -> dict[str, Any]:
    """What tests/mutants.json holds: counts by part, and the survivors with the explanations of the last result.

    An explanation waits aside while its mutant is not tested again.
    """
    before = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"survivors": [], "waiting": []}
    explained = {
        (s["file"], s["was"], s["now"]): s["explanation"]
        for s in [*before["waiting"], *before["survivors"]]
        if s["explanation"]
    }
    parts, survivors = {}, []
    for part in PARTS:
        tests = digest_of_tests(part)
        rows = [(m, outcomes.of(m, tests, keep_killed=keep_killed)) for m in samples[part.name]]
        done = [(mutant, row) for mutant, row in rows if row is not None]
        counts = Counter(row["outcome"] for _, row in done)
        parts[part.name] = {
            "possible": len(possible[part.name]),
            "sampled": len(done),
            "killed": counts["killed"],
            "timed_out": counts["timed out"],
            "survived": counts["survived"],
        }
        survivors += [
            {
                "part": part.name,
                "file": mutant.file,
                "line": mutant.line,
                "was": row["was"],
                "now": row["now"],
                "explanation": explained.pop((mutant.file, row["was"], row["now"]), ""),
            }
            for mutant, row in done
            if row["outcome"] == "survived"
        ]
        for mutant, row in done:
            explained.pop((mutant.file, row["was"], row["now"]), "")
    return {
        "tool": "cosmic-ray",
        "version": importlib.metadata.version("cosmic-ray"),
        "seed": SEED,
        "commit": git("rev-parse", "HEAD").strip(),
        "parts": parts,
        "survivors": sorted(survivors, key=lambda s: (s["part"], s["file"], s["line"])),
        "waiting": [
            {"file": file, "was": was, "now": now, "explanation": text}
            for (file, was, now), text in sorted(explained.items())
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--limit", type=int, default=10**6, help="new mutants of each part")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--keep-killed", action="store_true", help="let a kill stand though the tests have changed")
    parser.add_argument("--fresh", action="store_true", help="forget all outcomes")
    options = parser.parse_args()
    # Before torch is loaded: a fork has one thread, and would wait for the others of a pool.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    import pytest  # noqa: F401
    import torch  # noqa: F401

    if options.fresh:
        OUTCOMES.unlink(missing_ok=True)
    outcomes = Outcomes(OUTCOMES)
    possible = mutants_by_part(PARTS)
    numbers = shares({name: len(mutants) for name, mutants in possible.items()}, SAMPLE, LEAST)
    samples = {part.name: sample_of(possible[part.name], numbers[part.name]) for part in PARTS}
    end = time.monotonic() + options.seconds
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            copy = Copy(Path(folder))
            for part in PARTS:
                if not options.parts or part.name in options.parts:
                    keep = {"limit": options.limit, "end": end, "keep_killed": options.keep_killed}
                    test_part(part, samples[part.name], outcomes, copy, **keep)
    except (KeyboardInterrupt, Stopped):
        print("stopped; the next run goes on from here")
    result = result_of(possible, samples, outcomes, keep_killed=options.keep_killed)
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, counts in result["parts"].items():
        print(f"{name:13}" + "".join(f" {count:5} {what.replace('_', ' ')}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
