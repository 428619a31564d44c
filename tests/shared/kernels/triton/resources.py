"""Compile every Triton kernel for GPUs that need not be there; print what each one takes.

    python tests/shared/kernels/triton/resources.py            # prints JSON
    python tests/shared/kernels/triton/resources.py --update   # rewrites resources.json

Walks shared/kernels/gpu.py and shared/kernels/*/triton.py and takes from each `compiled_forms()`:
a list of (kernel, signature, constexprs, options), what is launched at typical sizes. signature:
argument name -> triton's type ("*fp32", "i32"); pointers count as aligned to 16 bytes, as torch's
tensors are, and "i32:16" is a number that is a multiple of 16, as the launcher would notice.
constexprs are not in it. Compiles in a process of its own: what this one imported does not matter.

Triton's launcher turns a number that is 1 (a batch of one, say) into a constant, of which the
kernel cannot ask what it asks of tensors. "fails_at_one" names the forms that do not compile with
all their numbers 1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[4]
COMMITTED = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 90, 100)
# Without line numbers it is a sixth quicker, and a register more or less at most.
ENVIRONMENT = {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_DISABLE_LINE_INFO": "1"}


def folders() -> list[str]:
    """Operations that have a Triton path."""
    return sorted(path.parent.name for path in (ROOT / "shared/kernels").glob("*/triton.py"))


def modules() -> dict[str, str]:
    """Name in resources.json -> module with kernels."""
    found = {op: f"shared.kernels.{op}.triton" for op in folders()}
    return {"gpu": "shared.kernels.gpu", **found}


def label(op: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any]) -> str:
    """op/kernel type [constexprs]: names a form in resources.json."""
    kinds = [v[1:] for v in signature.values() if v.startswith("*")]
    settings = ", ".join(f"{k}={v}" for k, v in sorted(constexprs.items()))
    return f"{op}/{kernel.fn.__name__} {kinds[0]} [{settings}]"


def source(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any]) -> Any:
    """The kernel as the launcher would specialise it."""
    from triton.compiler import ASTSource

    given = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    if set(given) != set(kernel.arg_names):
        raise ValueError(f"{kernel.fn.__name__}: {sorted(set(given) ^ set(kernel.arg_names))}")
    types = {name: given[name].removesuffix(":16") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if given[name].startswith("*") or given[name].endswith(":16")
    }
    return ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=aligned)


def compile_form(form: tuple[Any, ...], architecture: int) -> Any:
    """The kernel as the launcher would compile it for this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source(*form[:3]), target=target, options=form[3])


def read_at_one(form: tuple[Any, ...]) -> None:
    """Compile the form with all its numbers 1, up to Triton's IR: quick, and what can fail.

    Raises triton.CompilationError.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    kernel, signature, constexprs, options = form
    pointers = {name: kind for name, kind in signature.items() if kind.startswith("*")}
    ones = dict.fromkeys(signature.keys() - pointers.keys(), 1)
    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(options)
    source(kernel, pointers, constexprs | ones).make_ir(
        target,
        parsed,
        backend.get_codegen_implementation(parsed),
        backend.get_module_map(),
        context,
    )


def measure(binary: Any) -> dict[str, int]:
    """Registers a thread; bytes of shared memory a block; bytes of stack and local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "shared": max(usage["SHARED"], binary.metadata.shared),
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
    }


def main() -> None:
    import triton

    kernels: dict[str, dict[str, dict[str, int]]] = {}
    fails: dict[str, str] = {}
    for op, name in modules().items():
        for form in import_module(name).compiled_forms():
            called = label(op, *form[:3])
            try:
                read_at_one(form)
            except triton.CompilationError as e:
                fails[called] = str(e)
            kernels[called] = {f"sm_{cc}": measure(compile_form(form, cc)) for cc in ARCHITECTURES}
    found = {"triton": triton.__version__, "kernels": kernels}
    if "--update" in sys.argv:
        # One line a kernel and architecture: a change reads as one line.
        text = json.dumps(found, indent=2)
        inner = re.compile(r"\{([^{}]+)\}")
        COMMITTED.write_text(inner.sub(lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n")
    else:
        print(json.dumps(found | {"fails_at_one": fails}))


if __name__ == "__main__":
    if os.environ.get("LOWRES_COMPILES") != "1":  # the compiler reads these when it starts
        with tempfile.TemporaryDirectory() as cache:
            env = {**os.environ, **ENVIRONMENT, "LOWRES_COMPILES": "1", "TRITON_CACHE_DIR": cache}
            env["PYTHONPATH"] = os.pathsep.join((os.environ.get("PYTHONPATH", ""), str(ROOT)))
            env.pop("TRITON_INTERPRET", None)
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
    main()
