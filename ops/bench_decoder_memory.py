"""Memory of a training step, for `dwell bench decoder`: measured in a process of its own for each architecture.

On the CPU by the high-water mark of resident memory, which Linux lets a process set back; elsewhere it is not told.
On CUDA by what torch's allocator had handed out at most.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from learner.presets import Preset
from ops.bench_decoder_parts import ARCHITECTURES, Architecture, Setting, Step
from ops.errors import UserError

MEMORY_REQUESTS: Final = 4
"""Requests of the step whose memory is measured, whatever the architecture."""
Memory = dict[str, int] | None


def memory_of(
    setting: Setting, architecture: Architecture, cells: list[tuple[int, int]]
) -> list[Memory]:
    """Bytes of a training step per (positions, targets), in a process of its own."""
    spec = json.dumps([asdict(setting), architecture.name, cells])
    # What is freed goes back to the system at once, so that the high-water mark is that of live tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "ops.bench_decoder_memory", spec],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the memory of {architecture.name} could not be measured: {last}")
    found: list[Memory] = json.loads(done.stdout)
    return found


def memory_here(
    setting: Setting, architecture: Architecture, positions: int, targets: int
) -> Memory:
    """`peak_bytes` of the step with weights and gradients, above what the process had before the model was built;
    `activation_bytes` above weights and gradients. None where the system does not tell."""
    empty = _resident(setting.device)
    model = setting.model(architecture, positions)
    Step(setting, model, 1, targets)()
    step = Step(setting, model, MEMORY_REQUESTS, targets)
    before = _resident(setting.device)
    step.add_gradients()
    high = _high_water(setting.device)
    if empty is None or before is None or high is None:
        return None
    return {"peak_bytes": high - empty, "activation_bytes": high - before}


def _resident(device: str) -> int | None:
    """Bytes in use; the high-water mark starts again from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _high_water(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return 1024 * int(found[0]) if found else None


def _child(spec: str) -> None:
    given, name, cells = json.loads(spec)
    setting = Setting(**{**given, "preset": Preset(**given["preset"])})
    torch.set_num_threads(setting.threads)
    architecture = next(each for each in ARCHITECTURES if each.name == name)
    found = [memory_here(setting, architecture, *cell) for cell in cells]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _child(sys.argv[1])
