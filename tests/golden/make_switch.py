"""Makes the golden files of the Switch Transformer with the original implementation, transformers'
SwitchTransformersForConditionalGeneration, in two versions of it.

Run once, by hand, outside this project's environment, in this order:

    python3.11 -m venv /tmp/golden5 && /tmp/golden5/bin/pip install torch==2.13.0 transformers==5.17.0
    python3.11 -m venv /tmp/golden4 && /tmp/golden4/bin/pip install torch==2.13.0 transformers==4.46.3
    /tmp/golden5/bin/python tests/golden/make_switch.py
    /tmp/golden4/bin/python tests/golden/make_switch.py

Version 5.17 writes the folders (what `save_pretrained` writes, the second one sharded) with golden.npz. It takes its
cumulative sum over an axis of one, so it drops no token. Version 4.46 reads the same weights and adds
golden_capacity.npz: there an expert takes `expert_capacity` tokens of each sequence, and the others go on unchanged,
times their router probability. Its padding takes places too, so only padding on the right is compared.

    tokens, mask                  [cases, length] encoder batches padded on the left, on the right, and not at all
    decoder_tokens, decoder_mask  [cases, length] the same for the decoder
    encoded                       [cases, length, d_model] encoder output; rows at padding mean nothing
    router_logits                 [cases, length, experts] of the last encoder layer
    logits                        [cases, length, vocab] float32; rows at padding mean nothing
    prompts, prompt_mask          [batch, length]
    greedy                        [batch, new] tokens by `generate`
    eos, greedy_eos               the same with one of those tokens as end-of-text (padded with 0 after it)
    dropped                       (4.46 only) real tokens of the encoder's batches that no expert of its last layer took
    encoder_buckets, decoder_buckets  (5.17 only) bucket of the distances -300 ... 300 with the published sizes
"""

# pyright: reportMissingImports=false

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

HERE = Path(__file__).parent
DROPPING = transformers.__version__.startswith("4.")
VOCAB, START, NEW_TOKENS = 61, 0, 16
LENGTHS, DECODER_LENGTHS = (23, 14, 3), (9, 2, 7)
CONFIGS = {
    "switch": {"num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_experts": 4},
    "switch_untied": {  # every layer sparse
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 1,
        "num_experts": 3,
        "tie_word_embeddings": False,
    },
}
SEEDS = {"switch": 1, "switch_untied": 5}  # whose greedy text varies


def make_model(seed: int, **fields) -> SwitchTransformersForConditionalGeneration:
    """A small model whose every parameter matters, float32 good to 1e-5."""
    config = SwitchTransformersConfig(
        vocab_size=VOCAB,
        d_model=20,
        d_kv=6,
        num_heads=3,
        d_ff=28,
        num_layers=2,
        num_sparse_decoder_layers=1,
        expert_capacity=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=START,
        **fields,
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layer_norm.weight" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (1.0 if "bias" in name or "lm_head" in name else 0.3))
        for stack in (model.encoder, model.decoder):  # 5.17 lets them differ where the output projection is not tied
            stack.embed_tokens.weight.copy_(model.shared.weight)
    return model


def pad(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one batch, and which of its tokens are real."""
    length = max(map(len, rows))
    tokens = np.zeros((len(rows), length), np.int64)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, 1
    return tokens, mask


def batches(rng: np.random.Generator, lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same rows padded on the left (not for 4.46), on the right, and a batch without padding."""
    rows = [rng.integers(2, VOCAB, n) for n in lengths]
    full = rng.integers(2, VOCAB, (len(lengths), max(lengths)))
    cases = [pad(rows, "right"), pad(rows, "left"), (full, np.ones_like(full))]
    tokens, mask = (np.concatenate(arrays) for arrays in zip(*cases[:: 2 if DROPPING else 1], strict=True))
    return tokens, mask


def greedy(model, tokens: np.ndarray, mask: np.ndarray, eos: int | None) -> np.ndarray:
    """New tokens by transformers' own loop."""
    ids = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
        decoder_start_token_id=START,
    )
    return ids[:, 1:].numpy()


def buckets(bidirectional: bool) -> np.ndarray:
    distances = torch.arange(-300, 301)
    return SwitchTransformersAttention._relative_position_bucket(distances, bidirectional, 32, 128).numpy()


@torch.no_grad()
def outputs(model, seed: int) -> dict[str, Any]:
    """What the model makes of some batches."""
    rng = np.random.default_rng(seed)
    tokens, mask = batches(rng, LENGTHS)
    decoder_tokens, decoder_mask = batches(rng, DECODER_LENGTHS)
    seen = []
    router = model.encoder.block[-1].layer[-1].mlp.router
    handles = [
        router.classifier.register_forward_hook(lambda *args: seen.append(args[-1])),
        router.register_forward_hook(lambda *args: seen.append(args[-1][0])),  # 4.46: one-hot, zero where dropped
    ]
    result = model(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        decoder_input_ids=torch.tensor(decoder_tokens),
        decoder_attention_mask=torch.tensor(decoder_mask),
    )
    for handle in handles:
        handle.remove()
    count = len(LENGTHS)
    prompts, prompt_mask = tokens[:count], mask[:count]
    model.generation_config.eos_token_id = None
    new = greedy(model, prompts, prompt_mask, None)
    eos = int(new[0, 8])
    arrays = {
        "tokens": tokens.astype(np.int32),
        "mask": mask.astype(bool),
        "decoder_tokens": decoder_tokens.astype(np.int32),
        "decoder_mask": decoder_mask.astype(bool),
        "encoded": result.encoder_last_hidden_state.numpy(),
        "router_logits": seen[0].reshape(*tokens.shape, -1).numpy(),
        "logits": result.logits.numpy(),
        "prompts": prompts.astype(np.int32),
        "prompt_mask": prompt_mask.astype(bool),
        "greedy": new.astype(np.int32),
        "eos": np.int32(eos),
        "greedy_eos": greedy(model, prompts, prompt_mask, eos).astype(np.int32),
    }
    if DROPPING:
        return arrays | {"dropped": np.int32(((seen[1].sum(-1) == 0).numpy() & mask.astype(bool)).sum())}
    return arrays | {"encoder_buckets": buckets(True), "decoder_buckets": buckets(False)}


def make(folder: Path, seed: int, max_shard_size: str, **fields) -> None:
    """Writes one golden folder."""
    model = make_model(seed, **fields)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink()
    for path in folder.iterdir():
        path.chmod(0o644)
    np.savez_compressed(folder / "golden.npz", **outputs(model, seed))


if __name__ == "__main__":
    for name, fields in CONFIGS.items():
        if DROPPING:
            model = SwitchTransformersForConditionalGeneration.from_pretrained(HERE / name).eval()
            np.savez_compressed(HERE / name / "golden_capacity.npz", **outputs(model, SEEDS[name]))
        else:
            make(HERE / name, SEEDS[name], "20KB" if name == "switch_untied" else "1GB", **fields)
