"""The Triton kernels in their interpreter, which must be on when Triton is imported: in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowformer import ops
from flowformer.core.backends import find_backend

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("interpreted_*.py"))
# Laws by the kernels: those that are quick, for the first variant of each mechanism. The whole takes hours:
#     TRITON_INTERPRET=1 pytest tests/laws.py -k triton
QUICK_LAWS = (
    "test_1_half_precision_is or test_2_gradients_in_half or test_4_token_by_token_in or test_5_masks or test_5_row or "
    "test_5_padding_anywhere or test_6_a_batch or test_6_tokens or test_8_bad"
)
FIRST_VARIANTS = "flow-core or linear-default or mobile-default or aft_simple-default or performer-default"
CANCELLING = (
    "test_2_gradients_in_half and flow-lra"  # gradients of queries under relu are small beside what they are of
)

STEPS = ("step", "linear_step", "mobile_step", "aft_step")


def run(*words: str, timeout: float = 850) -> str:
    """Run pytest where Triton interprets; return what it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *words]
    done = subprocess.run(
        command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    assert " passed" in run(str(HERE / file))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted_slowly(file: str) -> None:
    assert " passed" in run(str(HERE / file), "-m", "slow")


@pytest.mark.long
def test_laws_interpreted() -> None:
    laws = HERE.parents[1] / "laws.py"
    assert " passed" in run(str(laws), "-k", f"triton and (({QUICK_LAWS}) and ({FIRST_VARIANTS}) or {CANCELLING})")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_compiles_for_an_h100(dtype: str) -> None:
    """Few registers are spilled to memory, and products are in matrix units."""
    command = [sys.executable, str(HERE / "compiled.py"), "--target=90", f"--dtype={dtype}"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} >= {
        "sums",
        "carry",
        "flows",
        "memory",
        "attend",
        "gradient",
        "project",
        *STEPS,
    }
    for row in rows:
        allowed = {"gradient": 512, "flows": 256, **dict.fromkeys(STEPS, 0)}.get(row["kernel"], 128)
        assert row["spilled_bytes"] <= allowed, row
        assert row["matrix_units"] or row["kernel"] not in ("flows", "memory", "attend", "gradient"), row


def test_on_the_cpu_it_is_refused_unless_interpreted() -> None:
    q = torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError, match=r"'triton'.*cannot run here: the Triton kernels run on GPUs, not on cpu"):
        ops.flow_attention(q, q, q, backend="triton")


def test_it_runs_only_where_it_is_asked_for() -> None:
    row = find_backend("triton")
    assert "not been checked on a GPU" in row.by_request
    assert row.rank < find_backend("native").rank
