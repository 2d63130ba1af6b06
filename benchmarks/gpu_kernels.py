"""Parts of the checklist that need no model: how fast the GPU is, attention, adapters, decode
attention over the paged cache.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.gpu_models import Bench, copied_bytes_per_s
from mint_core.lora.algorithms import (
    GROUPED,
    KERNELS,
    LOOP,
    Adapted,
    Algorithm,
    Gradients,
)
from mint_core.lora.bank import AdapterBank, Part
from mint_core.lora.float8 import MOST_KERNEL_ROWS, quantized
from mint_core.lora.groups import LinearShape, complete
from mint_core.lora.segments import Segment
from mint_core.lora.spec import AdapterSpec
from mint_core.model.attention import PackedAttention
from mint_core.model.attention_kernels import Scores, causal_attention
from sampler_service.engine.cache.blocks import BLOCK_TOKENS, blocks_for
from sampler_service.engine.cache.paged_attention import plain_attention

BF16 = torch.bfloat16


def ceilings(bench: Bench) -> None:
    """What a copy and a matrix product reach."""
    copied = copied_bytes_per_s(bench)
    bench.note("device-to-device copy, read and written", copied / 1e12, "TB/s")
    n = bench.size(8192, 64)
    square = torch.randn(n, n, device=bench.device, dtype=BF16)
    seconds = bench.seconds(lambda: square @ square, 10)
    bench.note(f"bf16 product of {n} x {n}", 2 * n**3 / seconds / 1e12, "TFLOP/s")


def float8(bench: Bench) -> None:
    """Products with float8 weights, forward and back, beside those with what they stand for."""
    out, inner = bench.size(12_288, 64), bench.size(4096, 32)
    own = quantized(torch.randn(out, inner, device=bench.device) / 64)
    weight = own.weight(BF16)
    for rows in (1, 32, 256, MOST_KERNEL_ROWS, 4096) if not bench.tiny else (4096,):
        x = torch.randn(rows, inner, device=bench.device, dtype=BF16)
        dy = torch.randn(rows, out, device=bench.device, dtype=BF16)
        ways = (
            ("x W", partial(own.product, x, None), partial(functional.linear, x, weight)),
            ("dy W", partial(own.back, [dy]), partial(torch.mm, dy, weight)),
        )
        for name, ours, plain in ways:
            error = (ours() - plain()).norm() / plain().norm()
            seconds, plain_s = bench.seconds(ours, 10), bench.seconds(plain, 10)
            title = f"float8 {name} of {rows} rows, {out} x {inner}"
            share = f"{plain_s / seconds:.2f} of bfloat16's speed, differs by {error.item():.1e}"
            bench.note(title, out * inner / seconds / 1e12, "TB/s", share)


def attention(bench: Bench) -> None:
    """Forward and backward of packed documents of one length, against the kernels for one."""
    heads, key_heads, size = (16, 8, 128) if not bench.tiny else (4, 2, 16)
    total = bench.size(16_384, 64)
    for length in (512, 2048, 8192) if not bench.tiny else (16, 32):
        parts = [
            torch.randn(count, total, size, device=bench.device, dtype=BF16).requires_grad_()
            for count in (heads, key_heads, key_heads)
        ]
        upstream = torch.randn(heads, total, size, device=bench.device, dtype=BF16)
        bounds = list(range(0, total + 1, length))
        flops = 3.5 * 2 * total * length * heads * size  # causal: forward 1, backward 2.5
        ways = _ways(parts, bounds, bench.tiny)
        expected = ways["as the trainer does"]().detach()
        for name, way in ways.items():
            try:
                output = way()
                error = ((output - expected).norm() / expected.norm()).item()
                seconds = bench.seconds(
                    lambda w=way: torch.autograd.grad(w(), parts, upstream)  # noqa: B023
                )
            except Exception as problem:
                print(f"attention of {length}, {name}: {type(problem).__name__}: {problem}"[:300])
                continue
            title = f"attention of {length} tokens, {name}"
            bench.note(title, flops / seconds / 1e12, "TFLOP/s", f"differs by {error:.1e}")


def _ways(parts: list[Tensor], bounds: list[int], tiny: bool) -> dict[str, Callable[[], Tensor]]:
    scores = Scores(parts[0].shape[2] ** -0.5)
    ways: dict[str, Callable[[], Tensor]] = {
        "as the trainer does": lambda: PackedAttention(bounds).attend(0, *parts, scores=scores),
    }
    if tiny:
        return ways
    ways["varlen_attn"] = lambda: _varlen(parts, bounds, repeat=True)
    ways["varlen_attn, heads not repeated"] = lambda: _varlen(parts, bounds, repeat=False)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        ways[f"one by one, {backend.name}"] = partial(_each, parts, bounds, backend)
    return ways


def _varlen(parts: list[Tensor], bounds: list[int], *, repeat: bool) -> Tensor:
    ends = torch.tensor(bounds, dtype=torch.int32, device=parts[0].device)
    longest = bounds[1]
    query, *others = parts
    group = query.shape[0] // others[0].shape[0]
    key, value = (part.repeat_interleave(group, 0) if repeat else part for part in others)
    rows = [part.transpose(0, 1) for part in (query, key, value)]
    output = varlen_attn(*rows, ends, ends, longest, longest, window_size=(-1, 0))
    assert isinstance(output, Tensor)
    return output.transpose(0, 1)


def _each(parts: list[Tensor], bounds: list[int], backend: SDPBackend) -> Tensor:
    scores = Scores(parts[0].shape[2] ** -0.5)
    with sdpa_kernel([backend]):
        return torch.cat(
            [
                causal_attention(*(part[:, start:stop] for part in parts), scores=scores)
                for start, stop in itertools.pairwise(bounds)
            ],
            dim=1,
        )


def adapters(bench: Bench) -> None:
    """Forward and backward of q, k and v with many adapters, by each algorithm; and whether one of
    them waits for the device.
    """
    width = bench.size(1024, 48)
    shapes = {"q": LinearShape(width, 2 * width), "k": LinearShape(width, width)}
    shapes["v"] = shapes["k"]
    (group,) = complete(shapes, [("q", "k", "v")])
    tokens = bench.size(4096, 96)
    x = torch.randn(tokens, width, device=bench.device, dtype=BF16)
    y = torch.randn(tokens, group.width, device=bench.device, dtype=BF16)
    weight = torch.randn(group.width, width, device=bench.device, dtype=BF16)
    base_s = bench.seconds(lambda: (functional.linear(x, weight), y @ weight), 10)
    bench.note(f"{tokens} tokens of q, k, v, base alone", 1e3 * base_s, "ms")
    for count, rank, even in itertools.product((1, 8, 32), (8, 32), (True, False)):
        if bench.tiny and (count, rank) != (1, 8):  # its kernels take seconds in the interpreter
            continue
        bank = AdapterBank((group,), bench.device)
        spec = AdapterSpec(rank=rank, alpha=32.0, use_rslora=False, seed=0, modules=tuple(shapes))
        rows = [bank.add(spec) for _ in range(count)]
        for row in rows:
            row.part(Part.WEIGHTS).normal_(0.0, 0.02)
        ends = [tokens * (i + 1) // count for i in range(count)]
        if not even:  # all but the last have 4 rows
            ends = [*(4 * (i + 1) for i in range(count - 1)), tokens]
        segments = tuple(
            Segment(start, stop, row, accumulate=True)
            for (start, stop), row in zip(itertools.pairwise([0, *ends]), rows, strict=True)
        )

        def run(
            algorithm: Algorithm, backward: bool, own: tuple[Segment, ...] = segments
        ) -> Tensor:
            adapted = Adapted(own, x.device, x.dtype)
            out, dx = torch.zeros_like(y), torch.zeros_like(x)
            saved = algorithm.forward(x, out.split(group.out_features, 1), adapted, group)
            if backward:
                dy = y.split(group.out_features, 1)
                algorithm.backward(Gradients(x, dy, dx), saved, adapted, group)
            return torch.cat([out.flatten(), dx.flatten()])

        expected = run(LOOP, True)
        for name, algorithm, backward in (
            ("loop", LOOP, True),
            ("grouped", GROUPED, True),
            ("kernels", KERNELS, True),
            ("loop, forward", LOOP, False),
            ("grouped, forward", GROUPED, False),
            ("kernels, forward", KERNELS, False),
        ):
            part = slice(None) if backward else slice(0, y.numel())
            got = run(algorithm, backward)[part]
            error = ((got - expected[part]).norm() / expected[part].norm()).item()
            seconds = bench.seconds(lambda a=algorithm, b=backward: run(a, b), 5)
            kind = "even" if even else "tiny ones"
            title = f"{count} adapters, rank {rank}, {kind}, {name}"
            bench.note(title, 1e3 * seconds, "ms", f"differs by {error:.1e}")
    if not bench.tiny:
        adapted = Adapted(segments, x.device, x.dtype)
        saved = GROUPED.forward(x, y.split(group.out_features, 1), adapted, group)
        torch.cuda.set_sync_debug_mode("warn")  # prints where grouped products wait
        tensors = Gradients(x, y.split(group.out_features, 1), torch.zeros_like(x))
        GROUPED.forward(x, y.split(group.out_features, 1), adapted, group)
        GROUPED.backward(tensors, saved, adapted, group)
        torch.cuda.set_sync_debug_mode("default")


def paged(bench: Bench) -> None:
    """Decode attention over the paged cache: bytes of keys and values per second."""
    heads, key_heads, size = (16, 8, 128) if not bench.tiny else (4, 2, 16)
    from sampler_service.engine.cache.paged_kernels import paged_attention as attend

    for batch, context in ((1, 1024), (1, 8192), (32, 1024), (256, 1024), (32, 8192)):
        if bench.tiny:
            batch, context = min(batch, 2), 40
        width = blocks_for(context)
        shape = (batch * width, BLOCK_TOKENS, key_heads, size)
        # Several layers in turn, so that no cache of the GPU holds what is read.
        layers = max(1, min(8, 2**30 // (2 * batch * width * BLOCK_TOKENS * key_heads * size * 2)))
        layers = bench.size(layers, 1)
        caches = [
            [torch.randn(shape, device=bench.device, dtype=BF16) for _ in range(2)]
            for _ in range(layers)
        ]
        table = torch.randperm(batch * width, device=bench.device).view(batch, width).int()
        lengths = torch.full((batch,), context, device=bench.device)
        query = torch.randn(batch, heads, size, device=bench.device, dtype=BF16)
        scores = Scores(size**-0.5)
        ours = attend(query, *caches[0], table=table, lengths=lengths, scores=scores)
        expected = plain_attention(query, *caches[0], table=table, lengths=lengths, scores=scores)
        error = ((ours - expected).norm() / expected.norm()).item()

        def all_layers() -> None:
            for key, value in caches:  # noqa: B023
                attend(query, key, value, table, lengths, scores)  # noqa: B023

        seconds = _replayed_s(bench, all_layers) / layers
        read = 2 * 2 * batch * context * key_heads * size
        title = f"paged attention, {batch} x {context} tokens"
        bench.note(title, read / seconds / 1e12, "TB/s", f"{1e6 * seconds:.1f} us, {error:.1e}")


def _replayed_s(bench: Bench, call: Callable[[], None]) -> float:
    """In a graph: launches are left out, as in the sampler."""
    if bench.tiny:
        return bench.seconds(call)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return bench.seconds(graph.replay, 20)
