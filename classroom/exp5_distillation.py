"""5. Can a short prefix take the place of a long text?

    python classroom/smollm2.py out/smollm2
    python classroom/exp5_distillation.py --base out/smollm2

A text of 124 tokens stands in the context of a frozen language model, which answers questions about
it. A prefix of a few tokens shall replace the text. It starts from the text's first words, and is
trained in one of two ways. The first: to predict the text, token by token. The second is context
distillation (Eyuboglu et al. 2025, arXiv 2506.06266): to give each next token the probability that
the model gives it with the text in its context, on answers that this model wrote. Both are compared
with the model that has the text, on questions that were held out. Rates are chosen on a seed that
is not reported.
"""

import random
import statistics
from functools import cache
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from common import UNREPORTED, Experiment, best_rate, machine, spread
from torch import Tensor

from command.answers import CUT, answers
from command.console import run_command
from data import Example, Row, batch_of, encode, shuffled_batches, source_ids
from model import Decoder, KVCache
from prefix import Prefix
from train import Plan, loss_of, target_hidden

TEXT = (
    "Hillmouth is a village of 340 people at the mouth of the river Orne. A ferry crosses to "
    "the island of Sall at seven,\n"
    "noon and six; it carries bicycles but no cars. The school has two teachers and nineteen "
    "pupils. The baker, Mrs Adair, sells rye\n"
    "bread on Tuesdays and fish pies on Fridays. The lighthouse was built in 1871, has 112 "
    "steps and is open in summer. Guests stay\n"
    "at the Anchor, which has six rooms, or camp behind the mill. Dogs must be kept on a "
    "lead.\n"
)
ABOUT = ["the village", "the river", "the ferry", "the island", "the school", "the baker"]
ABOUT += ["the lighthouse", "the Anchor", "bicycles and cars", "the camp site", "dogs"]
ABOUT += ["the people of Hillmouth"]
ASKED = ["What do you know about {}?", "Tell a visitor about {}."]
ASKED += ["Write a short letter that mentions {}.", "Give me two facts about {}."]
ASKED += ["What should I ask about {}?", "Make up a story about {}."]
LENGTHS = (2, 4, 8, 16)  # virtual tokens
STEPS, BATCH = 150, 4
LIMIT = 32  # tokens of an answer
MIDDLE = 0.03  # where the search of a rate begins
NOTHING, FIRST = "none", "the first words"
ALONE, TAUGHT = "trained on the text", "taught by the model with the text"


def divergence(
    model: Decoder, rows: list[Row], past_kv: KVCache | None, taught_kv: KVCache
) -> tuple[Tensor, Tensor]:
    """Two pasts -> how far the model behind the first is from the model behind the second.

    That is their KL divergence in nats a token of the rows' answers, and the share of these tokens
    where both have the same likeliest one.
    """
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
        self.experiment = experiment
        self.tokenizer, model = experiment.load()
        self.model = model.to(torch.bfloat16)
        self.text = self.tokenizer.encode_ordinary(TEXT)[: model.config.block_size // 3]
        self.teacher = self.prefix(len(self.text))

    def prefix(self, P: int) -> Prefix:
        """-> the first P tokens of the text, as a prefix."""
        return Prefix.text(self.model, torch.tensor(self.text[:P], device=self.model.device))

    @cache
    def answered(self, seed: int) -> tuple[list[Row], list[Row]]:
        """-> questions to train on, and a quarter to measure on, as the teacher answers them."""
        questions = [asked.format(about) for asked in ASKED for about in ABOUT]
        questions = random.Random(seed).sample(questions, len(questions))
        questions = questions[: self.experiment.at_most]
        sources = [source_ids(self.tokenizer, question) for question in questions]
        generator = torch.Generator(self.model.device).manual_seed(seed)
        texts = answers(
            self.model, [self.teacher], self.tokenizer, sources, LIMIT, batch_size=32,
            temperature=1.0, generator=generator,
        )  # fmt: skip
        texts = [text.removesuffix(CUT) for text in texts]
        rows = encode(self.tokenizer, list(map(Example, questions, texts)))
        return rows[len(rows) // 4 :], rows[: len(rows) // 4]

    def run(self, way: str, P: int, seed: int, lr: float) -> dict[str, Any]:
        """-> the record of a prefix after its training, or before it where the rate is 0."""
        settings = {"way": way, "size": P, "seed": seed, "lr": lr}
        return self.experiment.once(settings, lambda: self.measure(way, P, seed, lr))

    def measure(self, way: str, P: int, seed: int, lr: float) -> dict[str, Any]:
        model, prefix = self.model, self.prefix(P)
        rows, held_out = self.answered(seed)
        if way != TAUGHT:
            rows = [Row(self.text[:1], self.text[1:])]
        steps = self.experiment.steps(STEPS) if lr else 0
        plan = Plan(steps, lr, min(BATCH, len(rows)), seed, eval_every=1)
        taught_kv = self.teacher.past_kv(model)
        optimizer = torch.optim.AdamW(prefix.parameters(), weight_decay=0.0)
        batches = islice(shuffled_batches(rows, plan.batch_size, seed), plan.steps)
        for step, step_rows in enumerate(batches, start=1):  # train.tune knows no other loss
            optimizer.param_groups[0]["lr"] = plan.rate(step)
            optimizer.zero_grad()
            if way == TAUGHT:
                loss, _ = divergence(model, step_rows, prefix.past_kv(model), taught_kv)
            else:
                batch = batch_of(step_rows, model.device)
                loss = loss_of(model, batch, prefix.past_kv(model), len(self.text) - 1)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            past_kv = None if way == NOTHING else prefix.past_kv(model)
            nats, agreed = divergence(model, held_out, past_kv, taught_kv)
        found = {"divergence": nats.item(), "agreed": agreed.item()}
        return {"machine": machine(model.device)} | found


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    grid, lengths = Distillation(experiment), experiment.grid(list(LENGTHS))
    rows, columns = [], {}
    for way in (NOTHING, FIRST, ALONE, TAUGHT):
        lr = 0.0
        if way in (ALONE, TAUGHT):
            lr = best_rate(MIDDLE, lambda lr: grid.run(way, 8, UNREPORTED, lr)["divergence"])
        for P in lengths[:1] if way == NOTHING else lengths:
            runs = [grid.run(way, P, seed, lr) for seed in experiment.seeds]
            nats = [run["divergence"] for run in runs]
            columns.setdefault(way, []).append(nats)
            agreed = [100 * run["agreed"] for run in runs]
            tokens = "–" if way == NOTHING else str(P)
            rows.append([way, tokens, f"{lr:g}", spread(nats, 2), spread(agreed, 0)])

    def draw(axes) -> None:
        for way, some in columns.items():
            means = list(map(statistics.mean, some))
            if way == NOTHING:  # at every length the same
                means *= len(lengths)
            axes[0][0].plot(lengths, means, ".-", label=way)
        axes[0][0].set(xlabel="virtual tokens", ylabel="distance from having the text, nats")
        axes[0][0].set(ylim=(0, None), title="Teach it, and two tokens do most of the text's work")
        axes[0][0].set_xticks(lengths, lengths)

    header = ["prefix", "tokens", "learning rate", "KL divergence", "the same likeliest, %"]
    experiment.report(header, rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
