"""What torch takes for the same: a layer of experts by its grouped product, and transformers' Switch Transformers.

A process of its own, as `experiments.peers` says. A layer's time is that of its kernels by CUPTI, as JAX's are counted
here; a model's is wall-clock time, as a user sees it. Swin-MoE, which transformers does not have, is `swin_peer`'s.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import peers

type Row = dict[str, Any]

ROUTINGS = ("uniform", "zipf")
ZIPF_EXPONENT = 1.2
NOISE = math.pi / math.sqrt(6)  # standard deviation of Gumbel's distribution: choices then follow the popularity
TOLERANCE = 1e-2
CALLS, BATCHES, SAMPLE = 10, 3, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of experts and the tokens it is given; or, without an activation, one product of grouped rows.

    Attributes:
        model: whose layer it is.
        tokens: how many.
        d_model: width of a token.
        d_ff: neurons of an expert.
        experts: how many.
        top_k: experts of a token. Weights are softmax over these, or for one over all experts.
        activation: "relu", "gelu" or "silu", or None.
        gated: whether a second product gates the first.
        bias: of the first product.
        routing: "uniform" or "zipf": how popular experts are.
        seed: of weights and tokens.
    """

    model: str
    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int = 1
    activation: str | None
    gated: bool = False
    bias: bool = False
    routing: str = "uniform"
    seed: int = 0

    def __post_init__(self):
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}; got routing={self.routing!r}")

    @property
    def slots(self) -> int:
        """Choices of all tokens."""
        return self.tokens * self.top_k

    @property
    def hidden(self) -> int:
        """Columns of the first product's weights."""
        return 2 * self.d_ff if self.gated else self.d_ff

    def log_popularity(self) -> Float[np.ndarray, " experts"]:
        """What is added to random logits, so that experts are about this popular."""
        rank = np.arange(1, self.experts + 1, dtype=np.float64)
        share = rank**-ZIPF_EXPONENT if self.routing == "zipf" else np.ones_like(rank)
        return np.log(share / share.sum()).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A Switch Transformer and the batches it is given.

    Attributes:
        config: transformers' fields.
        dtype: of weights and activations: bfloat16, float16 or float32.
        batches: numbers of sequences.
        length: tokens that the encoder reads, and the decoder.
        repeats: timed calls.
    """

    config: Row
    dtype: str
    batches: Sequence[int]
    length: int
    repeats: int = 10


def measure_layers(layers: Sequence[Layer]) -> list[Row]:
    """`torch_us` and `torch_error` of each layer; empty without torch and a GPU, or where torch cannot.

    Raises:
        RuntimeError: the process failed.
    """
    return peers.ask("experiments.moe_peers", layers, "torch's layer")


def measure_model(model: Model) -> Row:
    """`<batch>_time_ms` and `<batch>_memory_gib` of each batch; empty where torch or transformers is missing.

    Raises:
        RuntimeError: the process failed.
    """
    return peers.ask("experiments.moe_peers", [model], "transformers")[0]


# A layer


def _measure_layer(torch: Any, layer: Layer, row: Row) -> None:
    parameters = make_layer(torch, layer)
    if layer.activation is None:
        groups = group(torch, torch.randint(layer.experts, (layer.tokens, 1), device="cuda"), layer)
        x, wi, ends = parameters["x"], parameters["wi"], groups[1]
        out, us = _kernels_us(torch, functools.partial(torch._grouped_mm, x, wi, offs=ends))
        error = product_error(torch, out, x, wi, ends)
    else:
        out, us = _kernels_us(torch, functools.partial(run_layer, torch, layer, **parameters))
        error = sample_error(torch, layer, out, **parameters)
    if not error <= TOLERANCE:
        raise RuntimeError(f"error {error:.1e} is above {TOLERANCE}")
    row |= {"torch_us": us, "torch_error": error}


def make_layer(torch: Any, layer: Layer, device: str = "cuda", dtype: str = "bfloat16") -> dict[str, Any]:
    """Tokens and parameters, distributed as JAX's."""
    generator = torch.Generator(device).manual_seed(layer.seed)
    options = {"device": device, "dtype": getattr(torch, dtype)}
    experts, d_model, d_ff = layer.experts, layer.d_model, layer.d_ff
    return {
        "x": torch.randn(layer.tokens, d_model, generator=generator, **options),
        "router": torch.randn(d_model, experts, generator=generator, device=device) * (NOISE / d_model**0.5),
        "router_bias": torch.from_numpy(layer.log_popularity()).to(device),
        "wi": torch.randn(experts, d_model, layer.hidden, generator=generator, **options) / d_model**0.5,
        "wo": torch.randn(experts, d_ff, d_model, generator=generator, **options) / d_ff**0.5,
        "wi_bias": torch.randn(experts, layer.hidden, generator=generator, **options) if layer.bias else None,
    }


def choose(torch: Any, layer: Layer, x, router, router_bias):
    """The experts of each token and their weights, both [tokens, top_k]."""
    logits = torch.addmm(router_bias, x.float(), router)
    chosen, ids = torch.topk(logits, layer.top_k)
    normaliser = chosen if layer.top_k > 1 else logits
    return ids, torch.exp(chosen - torch.logsumexp(normaliser, dim=1, keepdim=True))


def group(torch: Any, ids, layer: Layer):
    """Positions sorted by expert, and where each expert's end; nothing waits for the host."""
    flat = ids.reshape(-1)
    counts = torch.zeros(layer.experts, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return torch.argsort(flat, stable=True), torch.cumsum(counts, 0, dtype=torch.int32)


def activate(torch: Any, layer: Layer, h):
    """The hidden layer's activation."""
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[
        str(layer.activation)
    ]
    if not layer.gated:
        return act(h)
    gate, up = h.chunk(2, dim=-1)
    return act(gate) * up


def run_layer(torch: Any, layer: Layer, *, x, router, router_bias, wi, wo, wi_bias):
    """The layer: tokens gathered by expert, two grouped products, and a weighted sum in the order of tokens."""
    ids, weights = choose(torch, layer, x, router, router_bias)
    order, ends = group(torch, ids, layer)
    h = torch._grouped_mm(x.index_select(0, order // layer.top_k), wi, offs=ends)
    if wi_bias is not None:
        h = h + wi_bias.index_select(0, ids.reshape(-1).index_select(0, order))
    y = torch._grouped_mm(activate(torch, layer, h), wo, offs=ends)
    y = y * weights.reshape(-1).index_select(0, order)[:, None].to(y.dtype)
    return torch.empty_like(y).index_copy_(0, order, y).view(layer.tokens, layer.top_k, -1).sum(1)


def sample_error(torch: Any, layer: Layer, out, *, x, router, router_bias, wi, wo, wi_bias) -> float:
    """Of the first tokens, against each one's experts in float32."""
    x, expected = x[:SAMPLE], torch.zeros_like(x[:SAMPLE], dtype=torch.float32)
    ids, weights = choose(torch, layer, x, router, router_bias)
    for expert in range(layer.experts):
        h = x.float() @ wi[expert].float()
        h = activate(torch, layer, h if wi_bias is None else h + wi_bias[expert].float())
        expected += (weights * (ids == expert)).sum(1, keepdim=True) * (h @ wo[expert].float())
    return float((out[:SAMPLE].float() - expected).norm() / expected.norm())


def product_error(torch: Any, out, x, wi: Any, ends) -> float:
    """Of every 64th row of a grouped product, in float32."""
    rows = torch.arange(0, len(x), 64, device=x.device)
    owner = torch.searchsorted(ends, rows, right=True)
    expected: Any = sum((owner == expert)[:, None] * (x[rows].float() @ w.float()) for expert, w in enumerate(wi))
    return float((out[rows].float() - expected).norm() / expected.norm())


def _kernels_us(torch: Any, function: Callable[[], Any]) -> tuple[Any, float]:
    """Its output, and the time of a call's kernels by CUPTI, which is how JAX's are timed: the median of batches."""
    out = function()
    torch.cuda.synchronize()
    batches = []
    for _ in range(BATCHES):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(CALLS):
                function()
            torch.cuda.synchronize()
        on_device = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        kernels = [e.self_device_time_total for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
        batches.append(sum(kernels) / CALLS)
    if not min(batches) > 0:
        raise RuntimeError("CUPTI saw no kernel of torch's")
    return out, round(statistics.median(batches), 2)


# A model


def _measure_model(torch: Any, job: Model, row: Row) -> None:
    torch.set_float32_matmul_precision("high")  # TF32, as JAX's default
    model = peers.transformers_model(torch, "SwitchTransformersForConditionalGeneration", job.config, job.dtype)
    for batch in job.batches:
        tokens, decoder_tokens = torch.randint(job.config["vocab_size"], (2, batch, job.length), device="cuda")
        forward = functools.partial(model, input_ids=tokens, decoder_input_ids=decoder_tokens, use_cache=False)
        found = peers.wall_clock(torch, forward, job.repeats)
        row |= {f"{batch}_{name}": value for name, value in found.items()}


if __name__ == "__main__":
    peers.answer({Layer: _measure_layer, Model: _measure_model})
