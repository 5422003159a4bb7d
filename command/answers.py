"""Answers of a model as text: completed, shown, and written to a file."""

import json
import math
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import nn

from command.console import say
from data import Example, Row, Scores
from model import Decoder, past_length, stacked_past_kv
from storage.files import replace_file

CUT = " … [cut]"  # behind an answer that ran into its limit


@torch.inference_mode()  # as no_grad, and on a small model a tenth quicker
def answers(
    model: Decoder, adapters: list[nn.Module], tokenizer: tiktoken.Encoding,
    sources: list[list[int]], limit: int, batch_size: int = 16, **sampling: Any,
) -> list[str]:  # fmt: skip
    """Source ids -> their continuations as text, of at most `limit` tokens, up to the end of text.

    Sources of one length share a batch, so that no padding stands between a source and its answer.
    An answer that ran into its limit, or the context's, is marked.
    """
    past_kv, end = stacked_past_kv(adapters, model), tokenizer.eot_token
    texts, lengths = [""] * len(sources), torch.tensor([len(source) for source in sources])
    for length in lengths.unique().tolist():
        room = max(1, min(limit, model.config.block_size + 1 - past_length(past_kv) - length))
        for chunk in (lengths == length).nonzero()[:, 0].split(batch_size):
            idx = torch.tensor([sources[i] for i in chunk], device=model.device)
            new = model.generate(idx, room, past_kv, stop_token=end, **sampling)[:, length:]
            for i, ids in zip(chunk, new.tolist()):
                answer = ids[: ids.index(end)] if end in ids else ids
                texts[i] = tokenizer.decode(answer) + (CUT if end not in ids else "")
    return texts


def show_examples(
    model: Decoder, adapters: list[nn.Module], tokenizer: tiktoken.Encoding,
    examples: list[Example], rows: list[Row], exact: list[bool],
) -> None:  # fmt: skip
    """Prints three examples, wrong ones first, with the answer and that of the frozen model."""
    chosen = sorted(range(len(rows)), key=lambda i: exact[i])[:3]  # False comes before True
    sources = [rows[i].source for i in chosen]
    limit = max(len(rows[i].target) for i in chosen) + 10
    got = answers(model, adapters, tokenizer, sources, limit)
    frozen = answers(model, [], tokenizer, sources, limit) if adapters else [""] * len(chosen)
    for i, answer, before in zip(chosen, got, frozen):
        source = tokenizer.decode(rows[i].source).rstrip("\n")  # as the model reads it
        lines = {"source": source, "expected": examples[i].target, "got": answer}
        if adapters:  # a tuned base is frozen no more
            lines["frozen"] = before
        for name, text in lines.items():
            say(f"{name:8} " + text.replace("\n", "\n         "))
        say("")


def write_predictions(file: Path, examples: list[Example], predictions: list[str]) -> None:
    """Writes input, target, prediction, and whether that was cut, of each example as JSONL."""
    lines = ""
    for (given, target, _), prediction in zip(examples, predictions):
        row = {"input": given, "target": target, "prediction": prediction.removesuffix(CUT)}
        row["cut"] = prediction.endswith(CUT)
        lines += json.dumps(row, ensure_ascii=False) + "\n"
    replace_file(file, lines.encode())


def check_frozen(scores: Scores, model: Decoder) -> None:
    """Raises ValueError if the numbers of a base overflow."""
    if not math.isfinite(scores.loss):
        overflow = f"{model.name} overflows in {model.dtype}: its loss is {scores.loss}"
        raise ValueError(f"{overflow} before any step; give --dtype float32")


def report(tested: dict[str, Scores]) -> dict[str, float]:
    """Scores, by who was tested -> their numbers by name, and a printed line of each."""
    numbers = {}
    for name, scores in tested.items():
        exact_match = scores.exact_match()
        shares = f"tokens right {scores.tokens:5.1f} %  exact match {exact_match:5.1f} %"
        say(f"test     {name:6}  loss {scores.loss:.3f}  {shares}")
        numbers[f"loss_{name}"] = scores.loss
        numbers[f"tokens_{name}"] = scores.tokens
        numbers[f"exact_match_{name}"] = exact_match
    return numbers
