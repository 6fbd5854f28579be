"""Makes the golden files of OPT with the original implementation, transformers' OPTForCausalLM.

Run once, by hand, outside this project's environment:

    python3.11 -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.13.0 transformers==5.17.0
    /tmp/golden/bin/python tests/golden/make_opt.py

Each folder is what `save_pretrained` writes (the first one sharded), plus golden.npz:
    tokens, mask     [cases, length] batches padded on the left, on the right, and not at all
    logits           [cases, length, vocab] float32; rows at padding mean nothing
    prompts          [batch, length], padded on the left with 1
    greedy           [batch, new] tokens by `generate`
    eos, greedy_eos  the same with one of those tokens as end-of-text (padded with 1 after it)
"""

# pyright: reportMissingImports=false

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

HERE = Path(__file__).parent
VOCAB, PAD, NEW_TOKENS = 101, 1, 20
CONFIGS = {
    "opt_pre_norm": {"do_layer_norm_before": True, "word_embed_proj_dim": 26},  # as 125M
    "opt_post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 14},  # as 350M
}
SEEDS = {"opt_pre_norm": 13, "opt_post_norm": 5}  # whose greedy text varies
LENGTHS = (11, 7, 2)


def make_model(seed: int, **fields) -> OPTForCausalLM:
    """A small model whose every parameter matters (biases and norms are random too), float32 good to 1e-5."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=26,
        num_hidden_layers=3,
        ffn_dim=53,
        num_attention_heads=2,
        max_position_embeddings=47,
        **fields,
    )
    model = OPTForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layer_norm.weight" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:  # large positions and small biases, or the same token would win everywhere
                parameter.copy_(noise * (1.0 if "positions" in name else 0.1 if "bias" in name else 0.2))
    return model


def pad(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one batch, and which of its tokens are real."""
    length = max(map(len, rows))
    tokens = np.full((len(rows), length), PAD, np.int64)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, 1
    return tokens, mask


def greedy(model: OPTForCausalLM, tokens: np.ndarray, mask: np.ndarray, eos: int | None) -> np.ndarray:
    """New tokens by transformers' own loop."""
    ids = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    return ids[:, tokens.shape[1] :].numpy()


@torch.no_grad()
def make(folder: Path, seed: int, max_shard_size: str, **fields) -> None:
    """Writes one golden folder."""
    model = make_model(seed, **fields)
    model.generation_config.eos_token_id = None
    rng = np.random.default_rng(seed)
    rows = [np.concatenate([[2], rng.integers(4, VOCAB, n - 1)]) for n in LENGTHS]
    full = rng.integers(4, VOCAB, (len(LENGTHS), max(LENGTHS)))
    batches = [pad(rows, "left"), pad(rows, "right"), (full, np.ones_like(full))]
    tokens, mask = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    logits = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    prompts, prompt_mask = batches[0]
    new = greedy(model, prompts, prompt_mask, None)
    eos = int(new[0, 7])
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink()
    for path in folder.iterdir():
        path.chmod(0o644)
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.astype(np.int32),
        mask=mask.astype(bool),
        logits=logits,
        prompts=prompts.astype(np.int32),
        greedy=new.astype(np.int32),
        eos=np.int32(eos),
        greedy_eos=greedy(model, prompts, prompt_mask, eos).astype(np.int32),
    )


if __name__ == "__main__":
    for name, fields in CONFIGS.items():
        make(HERE / name, SEEDS[name], "30KB" if name == "opt_pre_norm" else "1GB", **fields)
