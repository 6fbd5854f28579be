"""What transformers takes for a token of an OPT of the same sizes: its own generate, greedily, with a cache.

As in `experiments.peers`, a process of its own reads jobs from stdin and writes a row a line. The time of a token is
the difference between texts of many tokens and of one, so that the prompt does not count.
"""

import dataclasses
import importlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments import peers

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """An OPT and the batches that it continues.

    Attributes:
        config: transformers' fields.
        dtype: of weights and activations: bfloat16, float16 or float32.
        batches: numbers of sequences, ascending: memory is the most so far.
        context: tokens of each prompt.
        steps: tokens to add.
        repeats: timed texts.
    """

    config: Row
    dtype: str
    batches: Sequence[int]
    context: int
    steps: int
    repeats: int


def measure(job: Decoding) -> Row:
    """`<batch>_time_ms` of a token and `<batch>_memory_gib`; empty where torch or transformers is missing.

    Raises:
        RuntimeError: the process failed.
    """
    return peers.ask("experiments.decode_peers", [dataclasses.asdict(job)], "transformers")[0]


def main() -> int:
    """The process: jobs from stdin, a row a line to stdout, what went wrong to stderr."""
    torch: Any = importlib.import_module("torch")
    for job in json.load(sys.stdin):
        row: Row = {}
        try:
            if torch.cuda.is_available():
                with torch.inference_mode():
                    _measure(torch, Decoding(**job), row)
        except Exception as failed:  # a peer that cannot is a gap in the table, not the end of it
            print(f"transformers, {job}: {failed}", file=sys.stderr, flush=True)
        print(json.dumps(row), flush=True)
    return 0


def _measure(torch: Any, job: Decoding, row: Row) -> None:
    transformers: Any = importlib.import_module("transformers")
    torch.set_default_dtype(getattr(torch, job.dtype))
    with torch.device("cuda"):
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**job.config)).eval()
    torch.set_default_dtype(torch.float32)
    for batch in job.batches:
        prompt = torch.randint(4, job.config["vocab_size"], (batch, job.context), device="cuda")
        _seconds(torch, model, prompt, 2)  # warm
        torch.cuda.reset_peak_memory_stats()
        many, one = (
            statistics.median(_seconds(torch, model, prompt, tokens) for _ in range(job.repeats))
            for tokens in (job.steps + 1, 1)
        )
        row[f"{batch}_time_ms"] = round(1e3 * (many - one) / job.steps, 3)
        row[f"{batch}_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)


def _seconds(torch: Any, model: Any, prompt: Any, tokens: int) -> float:
    """To continue the prompts by so many tokens."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=1,
    )
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
