"""`blocks` with what lies between its products in C: one pass over memory where torch takes six to twelve.

The kernels (compiled.c) are compiled for this machine when this module is imported, in about a second, and kept in moeprune's
cache folder. For float32 and bfloat16 on the CPU; everything else runs as `blocks`. Their exponential differs from torch's in the
last bit, so results equal those of `blocks` up to rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moeprune.errors import UserError
from moeprune.files import cache_folder
from moeprune.model.blocks import Between, in_blocks

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def built() -> ctypes.CDLL:
    """The kernels, from the cache or compiled into it.

    Raises:
        UserError: no C compiler, or it fails.
    """
    source, compiler = Path(__file__).with_suffix(".c"), shlex.split(os.environ.get("CC", "cc"))
    cpu = Path("/proc/cpuinfo")
    try:
        about = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        first = cpu.read_bytes().split(b"\n\n")[0].splitlines() if cpu.exists() else []
        kind = [line for line in first if line.startswith((b"model name", b"flags", b"Features"))]
        key = hashlib.sha256(
            b"\n".join((source.read_bytes(), about, *kind, " ".join(FLAGS).encode(), torch.__file__.encode()))
        )
        library = cache_folder() / "kernels" / f"{key.hexdigest()[:20]}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                _compile(compiler, source, Path(folder) / library.name).replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        raise UserError(
            f"expert_backend 'compiled' could not be built with {shlex.join(compiler)!r}: {said[0] if said else error}; install a "
            f"C compiler, name one in CC, or use expert_backend=blocks"
        ) from error


def _compile(compiler: list[str], source: Path, made: Path) -> Path:
    """`made`, running on torch's own threads where torch brings GNU's OpenMP library; else on one."""
    code = str(made.with_suffix(".o"))
    for runtime in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        compiled = [*compiler, *FLAGS, "-fopenmp", "-c", str(source), "-o", code]
        linked = [*compiler, "-shared", code, str(runtime), "-o", str(made)]
        if all(subprocess.run(step, capture_output=True).returncode == 0 for step in (compiled, linked)):
            return made
    command = [*compiler, *FLAGS, "-fopenmp-simd", "-shared", str(source), "-o", str(made)]
    subprocess.run(command, capture_output=True, check=True)
    return made


class Compiled(Between):
    """See `Between`."""

    def __init__(self) -> None:
        self.library = built()

    def _run(self, name: str, *args: Tensor | int) -> None:
        function = getattr(self.library, name)
        function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in args))

    def take(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """See `Between.take`."""
        if _plain(x, out):
            self._run("take_rows", out, x, rows, len(out), out.shape[1] * out.element_size(), torch.get_num_threads())
        else:
            super().take(x, rows, out)

    def add(self, total: Tensor, rows: Tensor, values: Tensor) -> None:
        """See `Between.add`."""
        if _plain(total, values):
            name = f"add_rows_{SUFFIXES[values.dtype]}"
            self._run(name, total, values, rows, *values.shape, torch.get_num_threads())
        else:
            super().add(total, rows, values)

    def swiglu(self, gate_up: Tensor, w: Tensor | None, h: Tensor) -> None:
        """See `Between.swiglu`."""
        if w is not None and _plain(gate_up, w, h):
            self._run(f"swiglu_{SUFFIXES[h.dtype]}", gate_up, w, h, *h.shape, torch.get_num_threads())
        else:
            super().swiglu(gate_up, w, h)

    def swiglu_backward(self, gate_up: Tensor, dh: Tensor, w: Tensor, h: Tensor, d_gate_up: Tensor, dw: Tensor) -> None:
        """See `Between.swiglu_backward`."""
        if _plain(gate_up, dh, w, h, d_gate_up, dw):
            name = f"swiglu_backward_{SUFFIXES[h.dtype]}"
            self._run(name, gate_up, dh, w, h, d_gate_up, dw, *h.shape, torch.get_num_threads())
        else:
            super().swiglu_backward(gate_up, dh, w, h, d_gate_up, dw)


def _plain(*tensors: Tensor) -> bool:
    """Whether the kernels can read all of these."""
    return all(
        t.device.type == "cpu" and t.dtype in SUFFIXES and t.is_contiguous() and type(t) in (Tensor, nn.Parameter)
        for t in tensors
    )


compiled_swiglu = partial(in_blocks, between=Compiled())
