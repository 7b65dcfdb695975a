"""Compiles the Triton kernels for GPUs that need not be there, and reads off what the machine code uses.

    python benchmarks/compile_kernels.py

Compiles every variant that a run launches, for compute capability 8.0, 9.0 and 10.0, prints registers, spills and the
widths of loads and stores, stores them in results/kernels-compiled.json and renews the table in this folder's README.
The variants are not listed here: they are recorded from calls of kernels/ with meta tensors, which have no data.
"""

import contextlib
import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from bench import FOLDER, current_commit, renew_section, write_whole
from torch import Tensor

from kernels import logprobs, tiles, triton_attention, triton_rows
from model import HEAD_MULTIPLE

PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H100, B200, by compute capability: they decide the tiles
WIDTHS = (768, 2048, 2560)
VOCABULARIES = (50257, 50304)
ROWS = (128, 2048, 8192)
KINDS = ("scoring", "frozen head", "trained head", "from logits")
MODULES = {
    "_logprobs_kernel": triton_rows, "_gradient_kernel": triton_rows, "_hidden_gradient_kernel": triton_rows,
    "_decode_kernel": triton_attention,
}  # fmt: skip
HEADS = ((12, 64), (16, 128), (20, 128), (32, 80))  # number and size: GPT-Neo 125M, 1.3B and 2.7B; not a power of 2
ENTRIES = (611, 256)  # of the cache: a global layer's number may be odd, a local layer's is the window
TYPED = ("logits", "terms", "grad", "weight", "k")  # parameters whose dtype a variant is told by
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as Triton would compile it at a launch."""

    kernel: str  # name in MODULES
    signature: tuple[tuple[str, str], ...]  # parameter -> type
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # parameters that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, and others of the compiler

    def __str__(self) -> str:
        types = [f"{name} {kind[1:]}" for name, kind in self.signature if name in TYPED]
        shown = ("C", "WIDTH", "D", "SHIFTED", "WITH_TERMS", "K")
        values = [f"{k} {v}" for k, v in self.constants if k in shown]
        return f"{self.kernel.strip('_')}: {', '.join(types + values)}"


@dataclass
class Compiled:
    """What the machine code of a variant uses."""

    registers: int  # per thread
    stack: int  # bytes per thread, of which spills are a part
    spills: int  # load and store instructions of that stack
    loads: dict[int, int] = field(default_factory=dict)  # bits of a global load -> number of instructions
    stores: dict[int, int] = field(default_factory=dict)


def recorded(capability: int, calls: Callable[[], None]) -> set[Variant]:
    """The variants that `calls`, on meta tensors, would launch on a GPU of this capability."""
    variants: set[Variant] = set()
    gpu = SimpleNamespace(multi_processor_count=PROCESSORS[capability])
    shape_of = tiles.tile_shape
    with contextlib.ExitStack() as patches:

        def patch(module: Any, **values: Any) -> None:
            for name, value in values.items():
                patches.enter_context(mock.patch.object(module, name, value))

        for name, module in MODULES.items():
            patch(module, **{name: Recorder(name, getattr(module, name).arg_names, variants)})
        patch(torch.cuda, device_of=lambda _: contextlib.nullcontext(), get_device_properties=lambda _: gpu)
        # What kernels/ does differently on CUDA; checks and products of numbers are left out.
        patch(logprobs, _backend=lambda _: triton_rows, _check_range=lambda *_: None, add_product=lambda *_, **__: None)
        patch(tiles, tile_shape=lambda _, *sizes: shape_of(torch.device("cuda"), *sizes))
        patch(tiles, _as_factor=lambda matrix: matrix, add_product=lambda *_, **__: None)
        with torch.no_grad():
            calls()
    return variants


class Recorder:
    """Stands in for a kernel: a launch adds its variant and does nothing else."""

    def __init__(self, name: str, parameters: list[str], variants: set[Variant]) -> None:
        self.name, self.parameters, self.variants = name, parameters, variants

    def __getitem__(self, grid: object) -> Callable:
        return self.launch

    def launch(self, *args: Any, **keywords: Any) -> None:
        constants = {name: value for name, value in keywords.items() if name in self.parameters}
        options = tuple(sorted(keywords.items() - constants.items()))
        signature, divisible = {}, []
        for name, value in zip(self.parameters, args):
            if isinstance(value, Tensor):  # torch aligns storages to more than 16 bytes
                signature[name] = POINTERS[value.dtype]
                address = value.storage_offset() * value.element_size()
            elif value == 1:  # Triton makes it a constant
                constants[name] = value
                continue
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                address = value
            if address % 16 == 0:
                divisible.append(name)
        ordered = tuple(sorted(constants.items()))
        self.variants.add(Variant(self.name, tuple(signature.items()), ordered, tuple(divisible), options))


def calls_of(kind: str, N: int, D: int, V: int, dtype: torch.dtype) -> None:
    """Forward, and backward where there is one, on meta tensors."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    targets, upstream = new(N, dtype=torch.int64), new(N, dtype=torch.float32)
    if kind == "from logits":
        logits = new(N, V)
        statistics = logprobs._token_forward(logits, targets, -100)
        logprobs._token_backward(logits, targets, *statistics, upstream, -100)
        return
    hidden, padded = new(N, D), new(V + -V % HEAD_MULTIPLE, D)
    for weight in {V: padded[:V], len(padded): padded}.values():  # without padding rows and with them
        *statistics, _ = logprobs._linear_forward(hidden, weight, V, targets, -100, kind == "frozen head")
        if kind == "trained head":
            logprobs._linear_backward(hidden, weight, V, targets, *statistics, upstream, -100, True)


def decode_calls(dtype: torch.dtype) -> None:
    """Attention of a new token, with keys and values as the cache passes them."""
    lengths = torch.empty(64, dtype=torch.int64, device="meta")
    for H, K in HEADS:
        for S in ENTRIES:
            q = torch.empty(64, 1, H, K, dtype=dtype, device="meta").transpose(1, 2)
            cache = torch.empty(64, H, S, K, dtype=dtype, device="meta")
            triton_attention.decode_attention(q, cache, cache, lengths)


def variants_of_a_run(capability: int) -> list[Variant]:
    """Every variant for the sizes above in bf16 and fp32, sorted by kernel."""
    variants: set[Variant] = set()
    for dtype in (torch.bfloat16, torch.float32):
        variants |= recorded(capability, lambda dtype=dtype: decode_calls(dtype))
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float32):
            for V in VOCABULARIES:
                for D in WIDTHS[: 1 if kind == "from logits" else None]:
                    for N in ROWS:
                        variants |= recorded(capability, lambda s=(kind, N, D, V, dtype): calls_of(*s))
    return sorted(variants, key=str)


def default_variants(capability: int = 90) -> list[Variant]:
    """Those of 8192 rows at D = 2560 and V = 50257 in bf16: of the main sizes of the benchmarks."""

    def calls() -> None:
        for kind in KINDS:
            calls_of(kind, 8192, 2560, 50257, torch.bfloat16)
        decode_calls(torch.bfloat16)

    return sorted(recorded(capability, calls), key=str)


def compiled(variant: Variant, capability: int) -> Compiled:
    """Compiles the variant. Raises: OSError without Triton's cuobjdump; what Triton raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(MODULES[variant.kernel], variant.kernel)
    names, signature = kernel.arg_names, dict(variant.signature)
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    return inspected(result.asm["cubin"])


def inspected(cubin: bytes) -> Compiled:
    """Reads machine code with the disassembler that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([disassembler(), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        loads=by_width(code, "LDG"),
        stores=by_width(code, "STG"),
    )


def disassembler() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def by_width(code: str, instruction: str) -> dict[int, int]:
    """Bits -> the number of these instructions, the widest first."""
    counts: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        bits = [int(m) for m in re.findall(r"\.[US]?(8|16|64|128|256)\b", modifiers)]
        counts[bits[-1] if bits else 32] += 1
    return dict(sorted(counts.items(), reverse=True))


def lines_of(results: dict[str, Any]) -> Iterator[str]:
    """A Markdown table: for each kernel and capability the extremes over its variants."""
    yield f"Triton {results['triton']}, commit {results['commit']}; {len(results['variants'])} variants."
    yield ""
    yield "| kernel, types | GPU | variants | registers per thread | threads per multiprocessor | spills | widest load / store, bits |"  # noqa: E501
    yield "|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for row in results["variants"]:
        groups.setdefault((row["kernel"], row["types"], row["capability"]), []).append(row)
    for (kernel, types, capability), rows in sorted(groups.items()):
        registers = sorted({row["registers"] for row in rows})
        threads = sorted({row["threads"] for row in rows})
        spills = sum(row["spills"] > 0 or row["stack"] > 0 for row in rows)
        loads, stores = (sorted({int(max(row[k], key=int, default=0)) for row in rows}) for k in ("loads", "stores"))
        yield (
            f"| {kernel}, {types} | sm_{capability} | {len(rows)} | {span(registers)} | {span(threads)} "
            f"| {f'in {spills} of them' if spills else 'none'} | {span(loads)} / {span(stores)} |"
        )


def span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def resident_threads(registers: int, warps: int) -> int:
    """The threads that fit on a multiprocessor with 65536 registers and room for 2048 threads, in whole blocks."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out to a warp in units of 256
    return min(65536 // per_warp // warps, 2048 // (32 * warps)) * 32 * warps


def main() -> None:
    import triton

    results: dict[str, Any] = {"triton": triton.__version__, "commit": current_commit(), "variants": []}
    path = FOLDER / "results/kernels-compiled.json"
    for capability in PROCESSORS:
        for variant in variants_of_a_run(capability):
            code = compiled(variant, capability)
            constants, signature = dict(variant.constants), dict(variant.signature)
            kinds = [f"{name} {signature[name][1:]}" for name in TYPED if name in signature]
            if variant.kernel == "_logprobs_kernel" and not constants["WITH_TERMS"]:
                kinds = [kinds[0] + ", no terms"]
            row = {
                "kernel": variant.kernel.strip("_"),
                "types": ", ".join(kinds)
                + (", shifted" if constants.get("SHIFTED") else "")
                + (f", head size {constants['K']}" if "K" in constants else ""),
                "capability": capability,
                "constants": constants,
                "unaligned": sorted(signature.keys() - set(variant.divisible)),
                "threads": resident_threads(code.registers, dict(variant.options)["num_warps"]),
                **vars(code),
            }
            results["variants"].append(row)
            spilled = f", SPILLS: {code.spills} instructions, {code.stack} bytes" if code.spills or code.stack else ""
            print(f"sm_{capability} {variant}: {code.registers} registers{spilled}, loads {code.loads}", flush=True)
    write_whole(path, json.dumps(results, indent=1) + "\n")
    renew_section("compiled kernels", list(lines_of(results)))
    print("\n".join(["", *lines_of(results)]))


if __name__ == "__main__":
    main()
