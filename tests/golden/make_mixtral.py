"""Makes the golden files of Mixtral with the original implementation, transformers' MixtralForCausalLM.

Run once, by hand, outside this project's environment:

    python3.11 -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.13.0 transformers==5.17.0
    /tmp/golden/bin/python tests/golden/make_mixtral.py

Each folder is what `save_pretrained` writes (mixtral: a tensor for each expert, in shards; mixtral_packed: all experts
in one tensor, as transformers 5 computes with them), plus golden.npz as make_opt.py says.
"""

# pyright: reportMissingImports=false

import shutil
from pathlib import Path

import numpy as np
import torch
from make_opt import LENGTHS, greedy, pad
from transformers import MixtralConfig, MixtralForCausalLM

HERE = Path(__file__).parent
VOCAB = 61
SEEDS = {"mixtral": 1, "mixtral_packed": 2}  # whose greedy text varies
FIELDS = {
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 2},
    "mixtral_packed": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 1,
        "sliding_window": 4,
        "rope_theta": 50.0,
    },
}


def make_model(seed: int, **fields) -> MixtralForCausalLM:
    """A small model whose every parameter matters, float32 good to 1e-5."""
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=21,
        num_local_experts=5,
        max_position_embeddings=47,
        **fields,
    )
    config._attn_implementation = config._experts_implementation = "eager"  # which take any sizes
    model = MixtralForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * (1.0 if "embed" in name else 0.3))
    return model


@torch.no_grad()
def make(name: str) -> None:
    """Writes one golden folder."""
    folder = HERE / name
    model = make_model(SEEDS[name], **FIELDS[name])
    model.generation_config.eos_token_id = None
    rng = np.random.default_rng(SEEDS[name])
    rows = [np.concatenate([[1], rng.integers(3, VOCAB, n - 1)]) for n in LENGTHS]
    full = rng.integers(3, VOCAB, (len(LENGTHS), max(LENGTHS)))
    batches = [pad(rows, "left"), pad(rows, "right"), (full, np.ones_like(full))]
    tokens, mask = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    logits = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    prompts, prompt_mask = batches[0]
    new = greedy(model, prompts, prompt_mask, None)
    eos = int(new[0, 7])
    shutil.rmtree(folder, ignore_errors=True)
    packed = name.endswith("packed")
    model.save_pretrained(folder, max_shard_size="1GB" if packed else "20KB", save_original_format=not packed)
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
    for folder_name in FIELDS:
        make(folder_name)
