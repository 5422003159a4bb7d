"""5. Can a short prefix take the place of a long text?

    python classroom/smollm2.py out/smollm2
    python classroom/exp5_distillation.py --base out/smollm2

A text of 124 tokens stands in the context of a frozen language model, which answers questions about it. A prefix of a few
tokens, that starts from the first words of the text and has no other text before it, is trained in two ways: to predict the
text, token by token, or to give each next token the probability that the model gives it with the text in its context, on
answers which that model wrote itself (context distillation; Eyuboglu et al. 2025, arXiv 2506.06266). Both are then compared
with the model that has the text, on questions which were held out. Rates are chosen on a seed that is not reported.
"""

import random
import statistics
from functools import cache
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from common import Experiment, lowest, machine, rate, spread
from torch import Tensor

from command.process import run_command
from data import Example, Row, batch_of, encode, shuffled_batches, source_ids
from model import Decoder, KVCache
from prefix import Prefix
from train import Plan, answers, loss_of, target_hidden

TEXT = """Hillmouth is a village of 340 people at the mouth of the river Orne. A ferry crosses to the island of Sall at seven,
noon and six; it carries bicycles but no cars. The school has two teachers and nineteen pupils. The baker, Mrs Adair, sells rye
bread on Tuesdays and fish pies on Fridays. The lighthouse was built in 1871, has 112 steps and is open in summer. Guests stay
at the Anchor, which has six rooms, or camp behind the mill. Dogs must be kept on a lead.
"""
ABOUT = ["the village", "the river", "the ferry", "the island", "the school", "the baker", "the lighthouse", "the Anchor"]
ABOUT += ["bicycles and cars", "the camp site", "dogs", "the people of Hillmouth"]
ASKED = ["What do you know about {}?", "Tell a visitor about {}.", "Write a short letter that mentions {}."]
ASKED += ["Give me two facts about {}.", "What should I ask about {}?", "Make up a story about {}."]
LENGTHS, STEPS, BATCH, LIMIT, UNREPORTED, MIDDLE = (2, 4, 8, 16), 150, 4, 32, 100, 0.03  # MIDDLE: of the rates tried
NOTHING, FIRST, ALONE, TAUGHT = "none", "the first words", "trained on the text", "taught by the model with the text"


def divergence(model: Decoder, rows: list[Row], past_kv: KVCache | None, taught_kv: KVCache) -> tuple[Tensor, Tensor]:
    """-> the KL divergence of the model behind one past from the model behind another, in nats per token of the rows' answers,
    and the share of these tokens where both have the same likeliest one."""
    batch = batch_of(rows, model.device)
    with torch.no_grad():
        hidden, _ = target_hidden(model, batch, taught_kv)
        taught = (hidden @ model.head.T).float().log_softmax(dim=-1)  # (N, V)
    hidden, _ = target_hidden(model, batch, past_kv)
    own = (hidden @ model.head.T).float().log_softmax(dim=-1)
    agreed = (own.argmax(dim=-1) == taught.argmax(dim=-1)).float().mean()
    return F.kl_div(own, taught, reduction="batchmean", log_target=True), agreed


class Distillation:
    """The text, the questions, and the runs."""

    def __init__(self, experiment: Experiment):
        self.experiment, (self.tokenizer, model) = experiment, experiment.load()
        self.model = model.to(torch.bfloat16)
        self.text = self.tokenizer.encode_ordinary(TEXT)[: model.config.block_size // 3]
        self.teacher = self.prefix(len(self.text))

    def prefix(self, P: int) -> Prefix:
        """-> the first P tokens of the text, as a prefix."""
        return Prefix.text(self.model, torch.tensor(self.text[:P], device=self.model.device))

    @cache
    def answered(self, seed: int) -> tuple[list[Row], list[Row]]:
        """-> questions to train on, and a quarter of all to measure on, with answers of the model that has the text."""
        questions = [asked.format(about) for asked in ASKED for about in ABOUT]
        questions = random.Random(seed).sample(questions, len(questions))[: self.experiment.at_most]
        sources = [source_ids(self.tokenizer, question) for question in questions]
        generator = torch.Generator(self.model.device).manual_seed(seed)
        texts = answers(self.model, [self.teacher], self.tokenizer, sources, LIMIT, temperature=1.0, generator=generator)
        rows = encode(self.tokenizer, list(map(Example, questions, texts)))
        return rows[len(rows) // 4 :], rows[: len(rows) // 4]

    def run(self, way: str, P: int, seed: int, lr: float) -> dict[str, Any]:
        """-> the record of a prefix after its training, or before it where the rate is 0."""
        return self.experiment.once({"way": way, "size": P, "seed": seed, "lr": lr}, lambda: self.measure(way, P, seed, lr))

    def measure(self, way: str, P: int, seed: int, lr: float) -> dict[str, Any]:
        model, prefix, (rows, held_out) = self.model, self.prefix(P), self.answered(seed)
        rows = rows if way == TAUGHT else [Row(self.text[:1], self.text[1:])]
        plan = Plan(self.experiment.steps(STEPS) if lr else 0, lr, BATCH, seed, 1, 1)
        optimizer = torch.optim.AdamW(prefix.parameters(), weight_decay=0.0)
        for step, some in enumerate(islice(shuffled_batches(rows, min(BATCH, len(rows)), seed), plan.steps), start=1):
            optimizer.param_groups[0]["lr"] = plan.rate(step)
            optimizer.zero_grad()
            if way == TAUGHT:
                loss, _ = divergence(model, some, prefix.past_kv(model), self.teacher.past_kv(model))
            else:
                loss = loss_of(model, batch_of(some, model.device), prefix.past_kv(model), len(self.text) - 1)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = divergence(model, held_out, None if way == NOTHING else prefix.past_kv(model), self.teacher.past_kv(model))
        return {"machine": machine(model.device)} | dict(zip(("divergence", "agreed"), map(Tensor.item, found)))


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    grid, lengths = Distillation(experiment), experiment.grid(list(LENGTHS))
    rows, columns = [], {}
    for way in (NOTHING, FIRST, ALONE, TAUGHT):
        lr = 0.0
        if way in (ALONE, TAUGHT):
            lr = rate(MIDDLE, lowest(lambda power: grid.run(way, 8, UNREPORTED, rate(MIDDLE, power))["divergence"]))
        for P in lengths[:1] if way == NOTHING else lengths:
            runs = [grid.run(way, P, seed, lr) for seed in experiment.seeds]
            columns.setdefault(way, []).append(found := [run["divergence"] for run in runs])
            agreed = [100 * run["agreed"] for run in runs]
            rows.append([way, "–" if way == NOTHING else str(P), f"{lr:g}", spread(found, 2), spread(agreed, 0)])

    def draw(axes) -> None:
        for way, some in columns.items():
            axes[0][0].plot(lengths, list(map(statistics.mean, some)) * (len(lengths) // len(some)), ".-", label=way)
        axes[0][0].set(xlabel="virtual tokens", ylabel="KL divergence, nats per token", ylim=(0, None))

    experiment.report(["prefix", "tokens", "learning rate", "KL divergence", "the same likeliest, %"], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
