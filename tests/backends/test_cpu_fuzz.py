"""Plans that are written to after they were made never crash the process: 2,000 of them, in a process of their own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from cpu_checks import needs_kernels

FOLDER = Path(__file__).parent


@needs_kernels
def test_plans_that_are_written_to_never_crash() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(FOLDER)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "fuzz_plans.py"), "2000"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    lines = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"exit {done.returncode} after {lines[-1]}\n{done.stderr[-4000:]}"
    seen = ast.literal_eval(lines[-1])
    # That the fuzzer did something: each kind of outcome came about often.
    assert seen["plans"] >= 2000
    assert min(seen["invalid"], seen["errors"], seen["results"]) > 300, seen
