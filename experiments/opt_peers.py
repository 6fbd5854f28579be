"""What transformers' OPT takes for the same batch: a process of its own, as `experiments.peers` says.

The model is made on the GPU with random weights; attention is `sdpa`. Wall-clock time, as a user sees it, of the
decoder over the batch padded to its longest sequence, and of the logits of each sequence's last token.
"""

import dataclasses
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments import peers
from models.opt import OPTConfig

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """A batch to read.

    Attributes:
        config: transformers' fields.
        dtype: of weights and activations.
        batches: of each batch, its sequences' lengths.
        repeats: timed calls.
    """

    config: Row
    dtype: str
    batches: Sequence[Sequence[int]]
    repeats: int = 5


def measure_prefill(config: OPTConfig, batches: Sequence[Sequence[int]], repeats: int) -> list[Row]:
    """`time_ms` and `memory_gib` of each batch; empty rows where torch, transformers or a GPU is missing.

    Raises:
        RuntimeError: the process failed.
    """
    from models.opt_checkpoint import ARCHITECTURE

    job = Prefill(config=ARCHITECTURE.write_config(config), dtype=config.dtype, batches=batches, repeats=repeats)
    row = peers.ask("experiments.opt_peers", [dataclasses.asdict(job)], "transformers")[0]
    return row.get("batches", [{} for _ in batches])


def main() -> int:
    """The process: jobs from stdin, a row a line to stdout, what went wrong to stderr."""
    torch: Any = importlib.import_module("torch")
    for described in json.load(sys.stdin):
        job, rows = Prefill(**described), []
        try:
            if not torch.cuda.is_available():
                raise RuntimeError("torch sees no GPU")
            if importlib.util.find_spec("transformers") is None:
                raise RuntimeError("transformers is not installed")
            model = make_model(torch, job.config, job.dtype)
            with torch.inference_mode():
                rows.extend(_measure(torch, model, lengths, job) for lengths in job.batches)
        except Exception as failed:  # a peer that cannot is a gap in the table, not the end of it
            print(f"transformers' columns stay empty: {failed}", file=sys.stderr, flush=True)
        print(json.dumps({"batches": rows + [{}] * (len(job.batches) - len(rows))}), flush=True)
    return 0


def make_model(torch: Any, config: Row, dtype: str, device: str = "cuda") -> Any:
    """transformers' model of these sizes with random weights, made on the device."""
    transformers: Any = importlib.import_module("transformers")
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = transformers.OPTForCausalLM._from_config(transformers.OPTConfig(**config), attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    return model.eval()


def _measure(torch: Any, model: Any, lengths: Sequence[int], job: Prefill, device: str = "cuda") -> Row:
    count = torch.tensor(lengths, device=device)
    mask = (torch.arange(max(lengths), device=device)[None] < count[:, None]).long()
    tokens = torch.randint(4, job.config["vocab_size"], mask.shape, device=device)

    def logits() -> Any:
        hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return model.lm_head(hidden[torch.arange(len(lengths), device=device), count - 1])

    logits()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(job.repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    gib = torch.cuda.max_memory_allocated() / 2**30
    return {"time_ms": round(statistics.median(times), 3), "memory_gib": round(gib, 3)}


if __name__ == "__main__":
    sys.exit(main())
