"""Makes the golden files of Swin-MoE, and of the zip files that torch.save writes, with PyTorch.

Run once, by hand, outside this project's environment:

    python3.11 -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.13.0 transformers==5.17.0
    /tmp/golden/bin/python tests/golden/make_swin_moe.py

The model is transformers' Swin, of which Swin-MoE keeps everything but the bias of relative positions (a table there,
filled here with the output of the small network that stands in its place) and the experts (`Experts` below: Tutel's
gates/top.py, gates/cosine_top.py, impls/fast_dispatch.py and experts/ffn.py, one token at a time). All in float64.

    dense.pth.global                      no experts; everything in one file
    linear.pth.{rank0 ... rank7,master}   4 experts, each cut over 2 ranks
    cosine.pth.{rank0,rank1,master}       4 experts, 2 a rank, with a cosine router
    {dense,linear,cosine}.npz             images [batch, 3, 16, 16], logits [batch, classes]; dropless: the same without
                                          a capacity; counts and dropless_counts: tokens of each expert
    types.pt                              tensors of each type, views, parameters, a state_dict, scalars, containers
"""

# pyright: reportMissingImports=false

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import SwinConfig, SwinForImageClassification

HERE = Path(__file__).parent / "swin_moe"
SIZE, PATCH, WINDOW, EMBED, DEPTHS, HEADS, CLASSES, EXPERTS = 16, 2, 4, 8, (2, 2), (2, 4), 7, 4
SPARSE = "layers.1.blocks.1.mlp._moe_layer."
CAPACITY_FACTOR = 1.25


def random_state(generator: torch.Generator, router: str | None) -> dict[str, torch.Tensor]:
    """Parameters by the original's names, all of which matter."""

    def normal(*shape: int, std: float) -> torch.Tensor:
        return std * torch.randn(shape, generator=generator)

    state: dict[str, torch.Tensor] = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True, std: float | None = None) -> None:
        state[f"{name}.weight"] = normal(outputs, inputs, std=std or inputs**-0.5)
        if bias:
            state[f"{name}.bias"] = normal(outputs, std=0.2)

    def norm(name: str, features: int) -> None:
        state[f"{name}.weight"] = 1 + normal(features, std=0.3)
        state[f"{name}.bias"] = normal(features, std=0.2)

    state["patch_embed.proj.weight"] = normal(EMBED, 3, PATCH, PATCH, std=0.3)
    state["patch_embed.proj.bias"] = normal(EMBED, std=0.2)
    norm("patch_embed.norm", EMBED)
    for stage, depth in enumerate(DEPTHS):
        width = EMBED * 2**stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            norm(f"{name}.norm1", width)
            linear(f"{name}.attn.qkv", width, 3 * width, std=1.5 * width**-0.5)
            linear(f"{name}.attn.proj", width, width)
            linear(f"{name}.attn.cpb_mlp.0", 2, 512)
            linear(f"{name}.attn.cpb_mlp.2", 512, HEADS[stage], bias=False, std=0.1)
            norm(f"{name}.norm2", width)
            if router and f"{name}.mlp._moe_layer." == SPARSE:
                state |= random_experts(normal, router, width)
            else:
                linear(f"{name}.mlp.fc1", width, 4 * width)
                linear(f"{name}.mlp.fc2", 4 * width, width, bias=False)
        if stage < len(DEPTHS) - 1:
            norm(f"layers.{stage}.downsample.norm", 4 * width)
            linear(f"layers.{stage}.downsample.reduction", 4 * width, 2 * width, bias=False)
    norm("norm", width)
    linear("head", width, CLASSES)
    return state


def random_experts(normal, router: str, width: int) -> dict[str, torch.Tensor]:
    """Gate and experts of one Tutel layer."""
    gate = {"gates.0.wg.weight": normal(EXPERTS, width, std=0.5)}
    if router == "cosine":
        gate = {
            "gates.0.cosine_projector.weight": normal(256, width, std=0.2),
            "gates.0.cosine_projector.bias": normal(256, std=0.2),
            "gates.0.sim_matrix": normal(256, EXPERTS, std=0.01),
            "gates.0.temperature": torch.full([1], 2.3),
        }
    experts = {
        "experts.batched_fc1_w": normal(EXPERTS, 4 * width, width, std=width**-0.5),
        "experts.batched_fc1_bias": normal(EXPERTS, 4 * width, std=0.2),
        "experts.batched_fc2_w": normal(EXPERTS, 4 * width, width, std=width**-0.5),
        "experts.batched_fc2_bias": torch.zeros(EXPERTS, width),
    }
    return {SPARSE + name: tensor for name, tensor in (gate | experts).items()}


class Experts(torch.nn.Module):
    """Tutel's layer, top-1, without padding: each token by itself."""

    def __init__(self, state: dict[str, torch.Tensor], capacity_factor: float | None):
        super().__init__()
        self.state = {k.removeprefix(SPARSE): v.double() for k, v in state.items() if k.startswith(SPARSE)}
        self.capacity_factor = capacity_factor

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        s = {k.removeprefix("gates.0."): v for k, v in self.state.items()}
        if "wg.weight" in s:
            return x @ s["wg.weight"].T
        projected = functional.normalize(x @ s["cosine_projector.weight"].T + s["cosine_projector.bias"], dim=1)
        scale = torch.clamp(s["temperature"], max=np.log(1 / 0.01)).exp()
        return projected @ functional.normalize(s["sim_matrix"], dim=0) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.logits(tokens).softmax(dim=1)
        gates, experts = scores.max(dim=1)
        capacity = len(tokens)
        if self.capacity_factor:
            capacity = int(self.capacity_factor * ((len(tokens) + EXPERTS - 1) // EXPERTS))
        counts, out = [0] * EXPERTS, torch.zeros_like(tokens)
        w = {k.removeprefix("experts.batched_"): v for k, v in self.state.items()}
        for t in torch.argsort(-gates).tolist():  # batch-prioritised: the surest token first
            e = int(experts[t])
            if counts[e] < capacity:
                counts[e] += 1
                hidden = functional.gelu(w["fc1_w"][e] @ tokens[t] + w["fc1_bias"][e])
                out[t] = gates[t] * (hidden @ w["fc2_w"][e] + w["fc2_bias"][e])
        self.counts = counts
        return out.reshape(x.shape)


def coordinates() -> torch.Tensor:
    """The original's relative_coords_table, [1, 2 * WINDOW - 1, 2 * WINDOW - 1, 2]."""
    offsets = torch.arange(-(WINDOW - 1), WINDOW, dtype=torch.float32)
    table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)[None] / (WINDOW - 1) * 8
    return torch.sign(table) * torch.log2(table.abs() + 1) / np.log2(8)


def transformers_model(state: dict[str, torch.Tensor], capacity_factor: float | None) -> SwinForImageClassification:
    """transformers' Swin with these parameters."""
    config = SwinConfig(
        image_size=SIZE,
        patch_size=PATCH,
        embed_dim=EMBED,
        depths=list(DEPTHS),
        num_heads=list(HEADS),
        window_size=WINDOW,
        num_labels=CLASSES,
        num_channels=3,
        layer_norm_eps=1e-5,  # PyTorch's own, which the original uses
    )
    model = SwinForImageClassification(config).double().eval()
    renamed = (
        ("patch_embed.proj", "swin.embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", "swin.embeddings.norm"),
        ("layers.", "swin.encoder.layers."),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.proj", "attention.o_proj"),
        ("head", "classifier"),
    )
    target = {}
    for name, tensor in state.items():
        key = name
        for ours, theirs in renamed:
            key = key.replace(ours, theirs)
        if "qkv" in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                target[key.replace("attn.qkv", f"attention.{part}")] = piece
        elif "cpb_mlp.2" in name:
            mlp = name.removesuffix("2.weight")
            hidden = (coordinates().double() @ state[mlp + "0.weight"].double().T + state[mlp + "0.bias"]).relu()
            table = "attention.relative_position_bias.relative_position_bias_table"
            target[key.replace("attn.cpb_mlp.2.weight", table)] = (hidden @ tensor.double().T).reshape(-1, len(tensor))
        elif "cpb_mlp" not in name and "_moe_layer" not in name:
            target["swin.layernorm" + name[4:] if name.startswith("norm.") else key] = tensor
    blocks = [block for stage in model.swin.encoder.layers for block in stage.blocks]
    if any("_moe_layer" in name for name in state):
        blocks.pop().mlp = Experts(state, capacity_factor)
    for block in blocks:
        block.mlp.fc2.bias = None  # as in the published models
    model.load_state_dict({k: v.double() for k, v in target.items()})
    return model


def buffers() -> dict[str, torch.Tensor]:
    """What the original saves besides parameters; values of no meaning but in the table of coordinates."""
    found = {}
    table, index = coordinates(), torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)  # stored once, so shared
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            found[f"{name}.attn.relative_coords_table"] = table
            found[f"{name}.attn.relative_position_index"] = index
            if stage == 0 and block == 1:
                found[f"{name}.attn_mask"] = torch.zeros((SIZE // PATCH // WINDOW) ** 2, WINDOW**2, WINDOW**2)
    return found


def save(name: str, state: dict[str, torch.Tensor], ranks: int) -> None:
    """As the original's `save_checkpoint(zero_redundancy=True)` does after training on so many ranks."""
    if not ranks:
        torch.save({"model": state | buffers()}, HERE / f"{name}.pth.global")
        return
    local, cut = max(EXPERTS // ranks, 1), max(ranks // EXPERTS, 1)
    ours = [k for k in state if ".experts." in k and "fc2_bias" not in k]  # what is frozen is the master's
    for rank in range(ranks):
        experts = slice(rank // cut * local, rank // cut * local + local)
        pieces = {k: state[k][experts].chunk(cut, dim=1)[rank % cut].clone() for k in ours}
        torch.save({"model": pieces}, HERE / f"{name}.pth.rank{rank}")
    master = {k: v for k, v in state.items() if k not in ours} | buffers()
    master[SPARSE + "experts.batched_fc2_bias"] = master[SPARSE + "experts.batched_fc2_bias"][:local].chunk(cut, 1)[0]
    master[SPARSE + "_num_global_experts"] = torch.tensor(EXPERTS)
    torch.save({"model": master}, HERE / f"{name}.pth.master")


def make_model(name: str, seed: int, router: str | None, ranks: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = random_state(generator, router)
    images = torch.randn(5, 3, SIZE, SIZE, generator=generator)
    golden = {"images": images.numpy()}
    for prefix, factor in (("", CAPACITY_FACTOR), ("dropless_", None)):
        model = transformers_model(state, factor)
        with torch.no_grad():
            golden[f"{prefix}logits"] = model(images.double()).logits.numpy()
        if router:
            golden[f"{prefix}counts"] = np.array(model.swin.encoder.layers[1].blocks[1].mlp.counts)
    print(name, {k: v.tolist() for k, v in golden.items() if "counts" in k}, golden["logits"][0])
    np.savez_compressed(HERE / f"{name}.npz", **golden)
    save(name, state, ranks)


def make_types() -> None:
    """What torch.save can put into a file without asking for anything but tensors."""
    numbers = torch.arange(24).reshape(2, 3, 4)
    types = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.arange(6).reshape(2, 3))
        module.bias.copy_(torch.arange(2))
    torch.save(
        {
            "types": {name: numbers.to(getattr(torch, name)) for name in types},
            "views": {
                "whole": numbers,
                "transposed": numbers.permute(2, 0, 1),
                "column": numbers[:, 1, 2],
                "last": numbers[1],
                "expanded": torch.arange(3.0)[:, None].expand(3, 4),
                "scalar": torch.tensor(7),
                "empty": torch.zeros(0, 3),
            },
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "state_dict": module.state_dict(),
            "size": torch.Size([2, 3]),
            "numbers": [1, -2, 300, 70000, 2**40, -(2**70), 0.5],
            "plain": ["text", None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, [[1], [2]]],
        },
        HERE / "types.pt",
    )


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    make_types()
    make_model("dense", 1, None, 0)
    make_model("linear", 1, "linear", 8)
    make_model("cosine", 3, "cosine", 2)
