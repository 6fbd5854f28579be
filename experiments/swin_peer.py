"""What torch takes for Swin-MoE, which transformers does not have: a forward pass written for inference.

The network is that of `models.swin_moe`, written down once more for torch: attention by scaled_dot_product_attention,
experts by torch's grouped product in bfloat16 and by one batched product over all experts' room in other dtypes.
Nothing waits for the host. What depends on weights only, the biases of positions and the masks of shifted windows, is
computed beforehand, and the head multiplies in the dtype of the rest: both are work that the JAX model does and torch
is spared. In float32 it multiplies as TF32, routers included. Tokens over an expert's capacity pass by, the least sure
ones first, as in Tutel.

A process of its own, without JAX, as `experiments.peers` says; times are by the clock on the wall, as for
transformers' models: eagerly, neither compiled nor as a CUDA graph. Its logits are compared with the JAX model's in
tests, at their size.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import peers

type Row = dict[str, Any]

HIDDEN_WINDOW = -100.0  # added to the logits of tokens that a cyclic shift put into the same window from afar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A Swin-MoE and the batches it is given.

    Attributes:
        config: fields of `SwinMoEConfig`, whose dtype is that of weights and activations.
        shapes: of the JAX model's parameters, by name.
        batches: numbers of images.
        router_std: standard deviation of the routers' logits.
        repeats: timed calls.
    """

    config: Row
    shapes: Mapping[str, Sequence[int]] = dataclasses.field(repr=False)
    batches: Sequence[int]
    router_std: float = 1.0
    repeats: int = 10


def describe(config: Any, batches: Sequence[int], **options: Any) -> Model:
    """What to measure.

    Args:
        config: a `SwinMoEConfig`; the process that answers does without JAX, and so this module without naming it.
        batches: numbers of images.
        options: of `Model`.
    """
    from flax import nnx

    from models.checkpoint import dotted
    from models.swin_moe import SwinMoE

    parameters = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: SwinMoE(config, rngs=nnx.Rngs(0))), nnx.Param))
    shapes = {dotted(path): variable.shape for path, variable in parameters}
    return Model(config=dataclasses.asdict(config), shapes=shapes, batches=batches, **options)


def measure_model(model: Model) -> Row:
    """`<batch>_time_ms` and `<batch>_memory_gib` of each batch; empty where torch or a GPU is missing.

    Raises:
        RuntimeError: the process failed.
    """
    return peers.ask("experiments.swin_peer", [model], "torch's Swin-MoE")[0]


def capacity(config: Row, tokens: int) -> int:
    """The most tokens that an expert takes of a batch's, as `SwinMoEConfig` has it."""
    factor, top_k = config["capacity_factor"], config["top_k"]
    return tokens if factor is None else min(tokens, max(1, top_k * int(factor * -(-tokens // config["experts"]))))


class Swin:
    """The network. It asks the host for nothing, so that a GPU never waits."""

    def __init__(self, torch: Any, config: Row, parameters: Mapping[str, Any]):
        """Takes the JAX model's parameters, and lays linear ones out as torch has them, [out, in].

        Raises:
            NotImplementedError: the router is not linear.
        """
        if config["router"] != "linear":
            raise NotImplementedError(f"router must be linear; got router={config['router']!r}")
        self.torch, self.config, self.w = torch, config, {**parameters}
        for name, value in parameters.items():
            if name.endswith("router.kernel"):
                self.w[name] = value.float()
            elif name.endswith("kernel"):
                self.w[name] = value.flatten(end_dim=-2).mT.contiguous()
        for stage, depth in enumerate(config["depths"]):
            for block in range(depth):
                name = f"layers.{stage}.blocks.{block}.attn"
                self.w[f"{name}.bias"] = self._attention_bias(name, *self._windows(stage, block))

    def __call__(self, images):
        """Logits of each class, in float32, of images [batch, height, width, channels]."""
        patch, depths = self.config["patch_size"], self.config["depths"]
        side = self.config["image_size"] // patch
        x = images.view(len(images), side, patch, side, patch, -1).transpose(2, 3).reshape(len(images), side, side, -1)
        x = self._norm("patch_embed.norm", self._linear("patch_embed.proj", x))
        for stage, depth in enumerate(depths):
            for block in range(depth):
                x = self._block(stage, block, x)
            if stage < len(depths) - 1:
                x = self._merge(f"layers.{stage}.downsample", x)
        features = self._norm("norm", x).mean((1, 2), dtype=self.torch.float32)
        return self._linear("head", features.to(x.dtype)).float()

    def _linear(self, name: str, x):
        return self.torch.nn.functional.linear(x, self.w[f"{name}.kernel"], self.w.get(f"{name}.bias"))

    def _norm(self, name: str, x):
        scale, bias = self.w[f"{name}.scale"], self.w[f"{name}.bias"]
        return self.torch.nn.functional.layer_norm(x, scale.shape, scale, bias, 1e-5)

    def _windows(self, stage: int, block: int) -> tuple[int, int, int]:
        """Tokens from end to end of an image and of a window, and by how many windows are shifted."""
        resolution = self.config["image_size"] // self.config["patch_size"] // 2**stage
        window = self.config["window"]
        return resolution, min(window, resolution), window // 2 if block % 2 and resolution > window else 0

    def _block(self, stage: int, block: int, x):
        name, (resolution, window, shift) = f"layers.{stage}.blocks.{block}", self._windows(stage, block)
        y = self._norm(f"{name}.norm1", x)
        y = y.roll((-shift, -shift), (1, 2)) if shift else y
        y = _join(self._attend(f"{name}.attn", self.config["heads"][stage], _partition(y, window)), resolution, window)
        x = x + (y.roll((shift, shift), (1, 2)) if shift else y)
        y = self._norm(f"{name}.norm2", x)
        if f"{name}.mlp.wi" in self.w:
            return x + self._experts(f"{name}.mlp", y.view(-1, y.shape[-1])).view(x.shape)
        return x + self._linear(f"{name}.mlp.fc2", self._gelu(self._linear(f"{name}.mlp.fc1", y)))

    def _gelu(self, x):
        return self.torch.nn.functional.gelu(x)

    def _merge(self, name: str, x):
        batch, side, _, width = x.shape
        x = x.view(batch, side // 2, 2, side // 2, 2, width).permute(0, 1, 3, 4, 2, 5)
        return self._linear(f"{name}.reduction", self._norm(f"{name}.norm", x.flatten(3)))

    def _attend(self, name: str, heads: int, x):
        """Windows count as heads: one bias is then for every image, and one window of all tokens is not copied."""
        batch, windows, tokens, _ = x.shape
        qkv = self._linear(f"{name}.qkv", x).view(batch, windows, tokens, 3, heads, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        mixed = self.torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.w[f"{name}.bias"])
        return self._linear(f"{name}.proj", mixed.unflatten(1, (windows, heads)).transpose(2, 3).flatten(3))

    def _attention_bias(self, name: str, resolution: int, window: int, shift: int):
        """What is added to the logits of attention, [1, windows * heads, tokens, tokens]."""
        torch, w, device = self.torch, self.w, self.w["head.kernel"].device
        spaced = torch.arange(1 - window, window, device=device) * (8 / (window - 1))
        spaced = spaced.sign() * torch.log2(spaced.abs() + 1) / 3
        first, last = f"{name}.cpb_mlp.layers.0", f"{name}.cpb_mlp.layers.2.kernel"
        offsets = torch.cartesian_prod(spaced, spaced)
        hidden = torch.relu(offsets @ w[f"{first}.kernel"].float().mT + w[f"{first}.bias"].float())
        of_offset = hidden @ w[last].float().mT
        position = torch.arange(window, device=device)
        apart = position[:, None] - position + window - 1
        index = apart[:, None, :, None] * (2 * window - 1) + apart[None, :, None, :]
        bias = of_offset[index.reshape(window**2, -1)].permute(2, 0, 1)
        # Regions of the image that a cyclic shift brought into one window.
        position = torch.arange(resolution, device=device)
        band = (position >= resolution - window).int() + (position >= resolution - shift).int()
        region = _partition((3 * band[:, None] + band)[None, :, :, None], window)[0, :, :, 0]
        hidden = (region[:, None, :, None] != region[:, None, None, :]) * (HIDDEN_WINDOW if shift else 0)
        return (bias + hidden).flatten(0, 1)[None].to(w[last].dtype)

    def _experts(self, name: str, x):
        """Choices are copied to their experts' rows, multiplied, and read back."""
        (tokens, width), top_k = x.shape, self.config["top_k"]
        weights, ids = (x.float() @ self.w[f"{name}.router.kernel"]).softmax(1).topk(top_k)
        rank, counts = self._rank(weights[:, 0], ids)
        room = capacity(self.config, tokens)
        choices = x[:, None].expand(-1, top_k, -1).reshape(-1, width)
        multiply = self._grouped if x.dtype == self.torch.bfloat16 else self._batched
        y = multiply(name, choices, ids.view(-1), rank.view(-1), counts, room).view(tokens, top_k, width)
        # Selected, not multiplied by zero: what was read for a dropped choice may be anything.
        return (y * weights[:, :, None].to(y.dtype)).masked_fill_((rank >= room)[:, :, None], 0).sum(1)

    def _rank(self, priority, ids):
        """How many choices come to an expert before this one, the surest tokens' first; and to each expert at all."""
        turn = priority.argsort(descending=True, stable=True)
        queue = ids[turn].T.flatten()  # all first choices before second ones
        experts = self.torch.arange(self.config["experts"], device=ids.device)
        arrived = (queue == experts[:, None]).cumsum(1)  # along rows, of which a GPU sums each with many threads
        before = arrived.gather(0, queue[None]).view(ids.shape[1], -1).T - 1
        return self.torch.empty_like(ids).index_copy_(0, turn, before), arrived[:, -1]

    def _grouped(self, name: str, x, ids, rank, counts, room: int):
        """Experts' rows one after the other, as many as they take; a row behind them is for what they do not."""
        torch, w, taken = self.torch, self.w, counts.clamp(max=room)
        ends = taken.cumsum(0)
        slots = torch.where(rank < room, (ends - taken)[ids] + rank, len(x))
        rows = x.new_empty(len(x) + 1, x.shape[1]).index_copy_(0, slots, x)
        owners = ids.new_zeros(len(rows)).index_copy_(0, slots, ids)
        ends = ends.int()
        h = torch._grouped_mm(rows, w[f"{name}.wi"], offs=ends).add_(w[f"{name}.wi_bias"].index_select(0, owners))
        return torch._grouped_mm(self._gelu(h), w[f"{name}.wo"], offs=ends).index_select(0, slots)

    def _batched(self, name: str, x, ids, rank, counts, room: int):
        """Equally many rows for each expert; its last one is for what it does not take."""
        slots = ids * (room + 1) + rank.clamp(max=room)
        rows = x.new_empty(len(counts), room + 1, x.shape[1])
        rows.flatten(0, 1).index_copy_(0, slots, x)
        h = self.torch.baddbmm(self.w[f"{name}.wi_bias"][:, None], rows, self.w[f"{name}.wi"])
        return self.torch.bmm(self._gelu(h), self.w[f"{name}.wo"]).flatten(0, 1).index_select(0, slots)


def _partition(x, window: int):
    """[batch, height, width, features] -> [batch, windows, tokens, features]."""
    batch, side, _, width = x.shape
    x = x.view(batch, side // window, window, side // window, window, width)
    return x.transpose(2, 3).reshape(batch, -1, window**2, width)


def _join(x, side: int, window: int):
    """What `_partition` took apart."""
    batch, _, _, width = x.shape
    x = x.view(batch, side // window, side // window, window, window, width)
    return x.transpose(2, 3).reshape(batch, side, side, width)


def make(torch: Any, model: Model, device: str) -> Swin:
    """The network with random weights, distributed as the JAX model's."""
    parameters, dtype = {}, getattr(torch, model.config["dtype"])
    for name, shape in model.shapes.items():
        parameters[name] = value = torch.zeros(*shape, dtype=dtype, device=device)
        if name.endswith("scale"):
            value.fill_(1)
        elif name.endswith("router.kernel"):
            value.normal_(std=model.router_std / shape[0] ** 0.5)
        elif not name.endswith("bias"):
            value.normal_(std=model.config["init_std"])
    return Swin(torch, model.config, parameters)


def _measure(torch: Any, job: Model, row: Row, device: str = "cuda") -> None:
    torch.set_float32_matmul_precision("high")  # TF32, as JAX's default
    model, size = make(torch, job, device), job.config["image_size"]
    options = {"dtype": getattr(torch, job.config["dtype"]), "device": device}
    for batch in job.batches:
        images = torch.randn(batch, size, size, job.config["channels"], **options)
        found = peers.wall_clock(torch, functools.partial(model, images), job.repeats)
        row |= {f"{batch}_{name}": value for name, value in found.items()}


if __name__ == "__main__":
    peers.answer({Model: _measure})
