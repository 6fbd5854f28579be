"""Checks by the original implementation that what `save_hf` wrote is the model it came from.

By hand, after `save_hf(load_opt("tests/golden/opt_pre_norm"), "/tmp/saved")`, in make_opt.py's environment:

    /tmp/golden/bin/python tests/golden/check_saved_opt.py /tmp/saved tests/golden/opt_pre_norm
"""

# pyright: reportMissingImports=false

import sys
from pathlib import Path

import numpy as np
import torch
from make_opt import greedy
from transformers import OPTForCausalLM

saved, original = map(Path, sys.argv[1:])
golden = np.load(original / "golden.npz")
model, info = OPTForCausalLM.from_pretrained(saved, output_loading_info=True)
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
