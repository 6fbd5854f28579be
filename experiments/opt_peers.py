"""What transformers' OPT takes to read a batch of prompts, and for each token that it adds to one.

A process of its own, as `experiments.peers` says. The model is made on the GPU with random weights; attention is
`sdpa`. Times are by the clock on the wall, as a user sees them: of the decoder over the batch padded to its longest
sequence, with the logits of each sequence's last token; and of `generate`, greedily, with its cache.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from experiments import peers

type Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """Batches to read.

    Attributes:
        config: transformers' fields.
        dtype: of weights and activations.
        batches: of each batch, its sequences' lengths.
        repeats: timed calls.
    """

    config: Row
    dtype: str
    batches: Sequence[Sequence[int]]
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Batches to continue.

    Attributes:
        config: transformers' fields.
        dtype: of weights and activations.
        batches: numbers of sequences.
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


def measure_prefill(config: Any, batches: Sequence[Sequence[int]], repeats: int) -> list[Row]:
    """`time_ms` and `memory_gib` of each batch; empty rows where torch, transformers or a GPU is missing.

    Args:
        config: an `OPTConfig`; the process that answers does without JAX, and so this module without naming it.
        batches: of each, its sequences' lengths.
        repeats: timed calls.

    Raises:
        RuntimeError: the process failed.
    """
    return _ask(Prefill(batches=batches, repeats=repeats, **_described(config)))


def measure_decode(config: Any, batches: Sequence[int], *, context: int, steps: int, repeats: int) -> list[Row]:
    """`time_ms` of a token and `memory_gib`, of each batch; otherwise as `measure_prefill`."""
    return _ask(Decode(batches=batches, context=context, steps=steps, repeats=repeats, **_described(config)))


def _described(config: Any) -> Row:
    from models.opt_checkpoint import ARCHITECTURE

    return {"config": ARCHITECTURE.write_config(config), "dtype": config.dtype}


def _ask(job: Prefill | Decode) -> list[Row]:
    found = peers.ask("experiments.opt_peers", [job], "transformers")[0].get("batches", [])
    return found + [{} for _ in job.batches[len(found) :]]


def _model(torch: Any, job: Prefill | Decode, device: str) -> Any:
    options = {"attn_implementation": "sdpa"}
    return peers.transformers_model(torch, "OPTForCausalLM", job.config, job.dtype, device, **options)


def _prefill(torch: Any, job: Prefill, row: Row, device: str = "cuda") -> None:
    model, row["batches"] = _model(torch, job, device), []  # as many as succeed
    for lengths in job.batches:
        count = torch.tensor(lengths, device=device)
        mask = (torch.arange(max(lengths), device=device)[None] < count[:, None]).long()
        tokens = torch.randint(4, job.config["vocab_size"], mask.shape, device=device)
        logits = functools.partial(_last_logits, torch, model, tokens, mask, count)
        row["batches"].append(peers.wall_clock(torch, logits, job.repeats))


def _last_logits(torch: Any, model: Any, tokens: Any, mask: Any, count: Any) -> Any:
    hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return model.lm_head(hidden[torch.arange(len(count), device=count.device), count - 1])


def _decode(torch: Any, job: Decode, row: Row, device: str = "cuda") -> None:
    model, row["batches"] = _model(torch, job, device), []
    for batch in job.batches:
        prompt = torch.randint(4, job.config["vocab_size"], (batch, job.context), device=device)
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 1}
        found = {}
        for tokens in (1, job.steps + 1):  # the difference leaves out the prompt
            limits = {"min_new_tokens": tokens, "max_new_tokens": tokens}
            generate = functools.partial(model.generate, prompt, **options, **limits)
            found[tokens] = peers.wall_clock(torch, generate, job.repeats)
        one, many = found.values()
        row["batches"].append(many | {"time_ms": round((many["time_ms"] - one["time_ms"]) / job.steps, 3)})


if __name__ == "__main__":
    peers.answer({Prefill: _prefill, Decode: _decode})
