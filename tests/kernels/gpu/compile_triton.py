"""Compile every Triton kernel for the given architectures, and print one line for each.

    python tests/kernels/gpu/compile_triton.py 75 86

No GPU is needed. This is a separate program, because the interpreter that the other tests use
replaces the compiler.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybrid.kernels.gpu import triton_attention, triton_kernels, triton_rows

HIDDEN, HEADS, KV_HEADS, DIM = 1536, 24, 8, 64  # MiniCPM-S-1B
F, H, B, I8, U8, I16, N, P = ["*fp32", "*fp16", "*i64", "*i8", "*u8", "*i16", "i32", "fp32"]
_HEADS = {"N_HEADS": HEADS, "DIM": DIM, "WIDTH": DIM}


def kernels() -> list[tuple[Any, list[str], dict[str, Any]]]:
    """Return each kernel, the types of its arguments, and its constants."""
    t, r, a = triton_kernels, triton_rows, triton_attention
    found: list[tuple[Any, list[str], dict[str, Any]]] = [
        (r.merge, [F, F, F, P], {"N": HIDDEN, "N_SPLITS": 16, "HAS_COLD": True, "WIDTH": 256}),
        (
            a.rope_and_cache,
            [F, F, F, B, F, H, H, P, N],
            {"N_HEADS": HEADS, "N_KV_HEADS": KV_HEADS, "HALF": DIM // 2, "WIDTH": DIM // 2},
        ),
        (
            a.attend_span,
            [F, H, H, B, F, F, F, N],
            {**_HEADS, "GROUP": 3, "GROUP_WIDTH": 4, "SPAN": triton_kernels.SPAN},
        ),
        (a.merge_spans, [F, F, F, F, N], {**_HEADS, "CHUNK": 32}),
    ]
    for format, values, scales, x, x_scales in (
        (t.BF16, I16, I16, I16, I16),
        (t.Q8, I8, H, I8, F),
        (t.Q4, U8, H, I8, F),
        (t.Q8, I8, F, I8, F),  # of a matrix with a scale of its own
        (t.Q4, U8, F, I8, F),
    ):
        is_bf16 = format == t.BF16
        norm = {"N": HIDDEN, "IS_BF16": is_bf16}
        found.append((r.quantize, [F, x, x_scales], {**norm, "N_BLOCKS": 8}))
        found.append((r.norm, [F, F, F, x, x_scales, P, P], {**norm, "N_BLOCKS": 16}))
        sizes = {"N": HIDDEN, "N_ROWS": t.ROWS, "N_BLOCKS": t.CHUNK_BLOCKS, "FORMAT": format}
        sizes["ACTIVATION"] = t.FATRELU
        for then in (t.STORE, t.ADD, t.GATE):
            types = [values, scales, x, x_scales, F, P, N]
            found.append((r.gemv, types, {**sizes, "THEN": then}))
        for has_gates in (False, True):
            types = [values, scales, values, scales, x, x_scales, F, F, B, P, N]
            found.append((r.up, types, {**sizes, "HAS_GATES": has_gates, "SKIPS": True}))
        constants = {"N": HIDDEN, "N_STORED": HIDDEN}
        constants |= {"N_ROWS": t.DOWN_ROWS, "N_COLS": t.DOWN_COLS}
        constants |= {"FORMAT": format, "SKIPS": True}
        found.append((r.down, [values, scales, F, F, N, N], constants))
    return found


def main(archs: list[str]) -> None:
    for arch in archs:
        for kernel, types, constants in kernels():
            names = kernel.arg_names
            given = iter(types)
            signature = {n: "constexpr" if n in constants else next(given) for n in names}
            assert next(given, None) is None, kernel.__name__
            source = ASTSource(
                kernel, signature, {(names.index(name),): v for name, v in constants.items()}
            )
            options = {"enable_fp_fusion": kernel not in (triton_rows.norm, triton_rows.quantize)}
            target = GPUTarget("cuda", int(arch), 32)
            compiled = triton.compile(source, target=target, options=options)
            assert compiled.asm["cubin"], kernel.__name__
            print(arch, kernel.__name__, len(compiled.asm["cubin"]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
