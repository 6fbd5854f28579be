"""Checks by the original implementation that what `save_hf` wrote is the model it came from.

By hand, after `save_hf(load_mixtral("tests/golden/mixtral"), "/tmp/saved")`, in make_mixtral.py's environment (or in
one with transformers 4, which reads the same files):

    /tmp/golden/bin/python tests/golden/check_saved_mixtral.py /tmp/saved tests/golden/mixtral
"""

# pyright: reportMissingImports=false

import sys
from pathlib import Path

import numpy as np
import torch
from make_opt import greedy
from transformers import MixtralConfig, MixtralForCausalLM

saved, original = map(Path, sys.argv[1:])
golden = np.load(original / "golden.npz")
config = MixtralConfig.from_pretrained(saved)
config._experts_implementation = "eager"  # which takes any sizes
model, info = MixtralForCausalLM.from_pretrained(
    saved, config=config, attn_implementation="eager", output_loading_info=True
)
problems = {name: keys for name, keys in info.items() if keys}
tokens, mask = golden["tokens"].astype(np.int64), golden["mask"].astype(np.int64)
with torch.no_grad():
    logits = model.eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
error = np.abs(logits - golden["logits"])[golden["mask"]].max()
prompts = golden["prompts"].astype(np.int64)
model.generation_config.eos_token_id = None
same = np.array_equal(greedy(model, prompts, mask[: len(prompts)], None), golden["greedy"])
print(f"loading problems: {problems}; largest difference of logits: {error}; same greedy tokens: {same}")
sys.exit(bool(problems) or error > 0 or not same)
