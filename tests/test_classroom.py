"""The scripts of classroom/ measure what they say, and an interruption loses nothing."""

import json
import weakref
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import common
import compare
import inspect_adapter
import pytest
import torch
from conftest import C, H, L, random_ids
from torch.testing import assert_close

import train
from command.flags import RECIPES
from data import Row, batch_of
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig, attend
from prefix import Prefix
from soft_prompt import SoftPrompt

pytestmark = pytest.mark.slow


@pytest.fixture
def flags(base, tmp_path, monkeypatch) -> list[str]:
    """An empty folder, forty examples, and times that are measured once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "interleaved", lambda some, _: common.interleaved(some, 1))
    return ["--base", base, "--device", "cpu", "--data", str(Path(base).parent / "forty.jsonl")]


# ----------------------------------------------------------------------------------------- measures


def test_attention_is_what_the_model_computes(model):
    """The weights, times the values, are what the model's own attention reads, past included."""
    idx, past_kv = random_ids(2, 5), Prefix.text(model, random_ids(3, seed=1)).past_kv(model)
    weights = common.attention(model, idx, past_kv)
    n_head = model.config.n_head  # in the Llama, two share a head of keys and values
    assert weights.shape == (L, 2, n_head, 5, 8)
    assert_close(weights.sum(dim=-1), torch.ones(L, 2, n_head, 5, dtype=torch.float64))
    attended = []
    last = getattr(model.h[-1].attn, "c_proj", None) or model.h[-1].attn.o_proj
    hook = last.register_forward_pre_hook(lambda _, inputs: attended.append(inputs[0]))
    _, cache = model(idx, past_kv)
    hook.remove()
    assert all(block.attn.attend is attend for block in model.h)  # the seam is as it was
    values = cache[-1][1].repeat_interleave(n_head // H, dim=1)
    assert_close((weights[-1] @ values).transpose(1, 2).flatten(2), attended[0])


def test_what_is_kept_for_backward_is_counted_once_and_without_weights(gpt2):
    """A product keeps its factors, a frozen weight does not count, and a storage counts once."""
    x = torch.ones(3, C, dtype=torch.float64, requires_grad=True)
    weight = gpt2.h[0].attn.c_proj.weight
    assert common.kept_for_backward(gpt2, lambda: (x @ weight).sum()) == 0
    assert common.kept_for_backward(gpt2, lambda: (x * x.view(3, C)).sum()) == 3 * C * 8
    assert common.kept_for_backward(gpt2, lambda: (2 * x).exp().sum()) == 3 * C * 8


def test_what_was_counted_is_freed(gpt2):
    """An operation may hold its own output, as exp does: the count does not keep it alive."""
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    outputs = []

    def compute() -> torch.Tensor:
        y = x.exp()
        outputs.append(weakref.ref(y))
        return y

    assert common.kept_for_backward(gpt2, compute) == 3 * 8
    assert outputs[0]() is None


@pytest.mark.parametrize("kind", [Prefix, SoftPrompt])
@pytest.mark.parametrize("B, T, P", [(10, 75, 20), (8, 75, 60), (4, 120, 5)])
def test_what_is_kept_for_backward_is_as_the_readme_says(kind, B, T, P):
    """The formula tells what a training step keeps, to two percent.

    A layer keeps 9·C numbers a position in GPT-2, 3·C + 2·K·D + 3·I in a Llama; 2·K·D a virtual
    token; and H·T·S attention weights a row. A soft prompt keeps its own positions once a batch.
    """
    llama = LlamaConfig(500, 220, 4, 4, 2, 256, 640, 64, 1e4, 1e-5)
    for model in (GPT(GPTConfig(500, 220, 4, 4, 256)), Llama(llama)):
        ids = [random_ids(T + 1, seed=i).tolist() for i in range(B)]
        batch = batch_of([Row(row[: T // 2], row[T // 2 :]) for row in ids], model.device)
        adapter = kind.random(model.requires_grad_(False), P)
        kept = common.kept_for_backward(model, partial(common.forward, model, [adapter], batch))
        expected = common.kept_by_formula(model, P, B, T, kind is SoftPrompt)
        assert kept == pytest.approx(expected, rel=0.02)


def test_the_effective_rank():
    """It is 1 for multiples of one row, and their number for orthogonal rows of one length."""
    assert inspect_adapter.effective_rank(torch.ones(4, 6)) == pytest.approx(1, abs=1e-4)
    assert inspect_adapter.effective_rank(3 * torch.eye(4, 6)) == pytest.approx(4)


def test_the_share_of_a_text_is_that_of_its_tokens(model):
    """A prefix that holds a text draws the attention that the text in the context would draw."""
    text, row = random_ids(3, seed=1), Row([1, 2, 3], [4, 5])
    share = inspect_adapter.virtual_share(model, [row], Prefix.text(model, text).past_kv(model))
    idx = torch.cat([text, torch.tensor([1, 2, 3, 4])])[None]
    whole = common.attention(model, idx)  # (L, 1, H, 7, 7)
    assert_close(share, whole[:, 0, :, 3:, :3].sum(dim=-1).mean(dim=-1))


def runs_of(trained, exact, loss) -> list[dict]:
    keys = ("trained", "validation_exact", "validation")
    return [dict(zip(keys, (trained, *pair))) for pair in zip(exact, loss)]


def test_the_sentence_names_the_cheapest_that_keeps_up_in_every_pair():
    """Exact match counts where it says something, else the loss. Behind in some pairs is open."""
    methods = {
        "soft_prompt": runs_of(700, [80, 90, 85], [0.5, 0.5, 0.5]),
        "prefix": runs_of(8000, [97, 90, 96], [0.3, 0.1, 0.3]),
        "lora": runs_of(9000, [96, 97, 99], [0.2, 0.2, 0.2]),
        "full": runs_of(10**6, [97, 98, 99], [0.1, 0.1, 0.1]),
    }
    sentence = compare.verdict(methods)
    assert "is LoRA, 9,000 numbers: 97.33 % exact match on validation data" in sentence
    assert ", where full fine-tuning has 98. Undecided" in sentence
    assert "the pairs in which it keeps up: prefix, 1 of 3." in sentence  # the soft prompt in none
    methods["soft_prompt"] = runs_of(700, [97, 98, 99], [0.5, 0.5, 0.5])
    best = "is soft prompt, 700 numbers: 98 % exact match on validation data."
    assert compare.verdict(methods).endswith(best)
    free = {name: [run | {"validation_exact": 0} for run in runs] for name, runs in methods.items()}
    assert "is full fine-tuning, 1,000,000 numbers: 0.1 nats a token" in compare.verdict(free)
    del free["prefix"]
    assert "What is cheaper stays behind in every pair." in compare.verdict(free)
    assert "give --seeds 3" in compare.verdict({"full": runs_of(10, [100], [0.1])})


@pytest.mark.parametrize("apart", [0, 10, 50])
def test_noise_never_speaks_for_a_method(apart):
    """However far the runs of a method lie apart, one that was behind does not tie by that."""
    wild = runs_of(700, [90 - apart, 90, 90 + apart / 10], [1, 1, 1])
    sentence = compare.verdict({"prefix": wild, "full": runs_of(10**6, [99, 99, 99], [1, 1, 1])})
    assert "is full fine-tuning" in sentence


# ------------------------------------------------------------------------------------------ scripts


def test_a_comparison_goes_on_where_it_was_interrupted(flags, monkeypatch, capsys):
    """Run again, it trains nothing; the seed of the rates never meets the test data."""
    tune, tuned = train.tune, []

    def counted(model, adapters, rows, plan, **more):
        of_the_base = sum(p.requires_grad for p in model.parameters())
        tuned.append((tuple(map(type, adapters)), of_the_base, plan.lr, plan.seed))
        if len(tuned) == 3:
            raise KeyboardInterrupt
        return tune(model, adapters, rows, plan, **more)

    monkeypatch.setattr(train, "tune", counted)
    argv = ["--seeds", "2", "--steps", "2", "--batch-size", "4", *flags]
    with pytest.raises(KeyboardInterrupt):
        compare.main([*argv, "--lr", "0.01"])
    compare.main([*argv, "--lr", "0.01"])
    assert len(tuned) == 11 and len(set(tuned)) == 10  # 5 methods, 2 seeds; one begun twice
    assert {seed for *_, seed in tuned} == {0, 1}
    printed = capsys.readouterr().out
    assert all(f"| {compare.NAMES[method]} |" in printed for method in compare.METHODS)
    assert "forty: The cheapest method that keeps up with the best is " in printed
    written = json.loads(Path("out/compare/compare.json").read_text())
    assert len(written["runs"]) == 10 and all("exact_match" in record for record in written["runs"])
    compare.main([*argv, "--lr", "0.01"])
    assert len(tuned) == 11
    assert json.loads(Path("out/compare/compare.json").read_text())["runs"] == written["runs"]
    compare.main(argv)
    runs = json.loads(Path("out/compare/compare.json").read_text())["runs"]
    chosen = [record for record in runs if record["seed"] == compare.UNREPORTED]
    assert len(chosen) >= 15 and not any("exact_match" in record for record in chosen)


def test_each_seed_of_an_embedded_task_has_a_base_of_its_own(base, tmp_path, monkeypatch):
    """So a statement is one about more than one base. Data of the user's are tried on theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "pretrain", lambda directory, **_: copytree(base, directory))
    argv = ["--device", "cpu", "--seeds", "2", "--out", str(tmp_path)]
    experiment = common.Experiment("compare", "Which?", argv, compare.own_flags)
    used = []
    monkeypatch.setattr(
        experiment, "prepared", lambda examples, method, seed, base, **_: used.append(str(base))
    )
    for args in (("chat", None, None, None), ("mine", "mine.jsonl", "m", 1)):
        task = compare.Task(*args)
        monkeypatch.setattr(compare, "load_examples", lambda *_: {})
        for seed in (0, 1, 2):
            compare.ready(experiment, task, "prefix", seed)
    assert used == ["out/base", "out/bases/1", "out/bases/2", *3 * ["out/base"]]


def test_with_chat_all_methods_read_ones_own_inputs_through_the_template(base, tmp_path):
    place = copytree(base, tmp_path / "chatty")
    template = {"chat_template": "{{ messages[0].role }}: {{ messages[0].content }}\nA:"}
    (place / "tokenizer_config.json").write_text(json.dumps(template))
    lines = [json.dumps({"input": f"hello {i}", "target": "you"}) + "\n" for i in range(4)]
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    argv = ["--chat", "--base", str(place), "--device", "cpu", "--out", str(tmp_path)]
    experiment = common.Experiment("compare", "Which?", argv, compare.own_flags)
    task = compare.Task("mine", str(tmp_path / "mine.jsonl"), None, 1)
    rows = compare.ready(experiment, task, "prefix", 0).rows["train"]
    tokenizer, _ = experiment.load()
    read = {tokenizer.decode(row.source) for row in rows}
    assert len(read) == 3 and read <= {f"user: hello {i}\nA:" for i in range(4)}


def test_each_method_gets_its_own_learning_rate(monkeypatch):
    """Three rates are tried, and further ones while the outermost is clearly the best."""
    optimum = {"prefix": 9 * RECIPES["prefix"].lr, "full": RECIPES["full"].lr}

    def distance(_, task, method, seed, lr):
        tried.append(lr)
        return {"validation": abs(torch.tensor(lr / optimum[method]).log().item())}

    monkeypatch.setattr(compare, "tuned", distance)
    for method, count in [("prefix", 5), ("full", 3)]:
        tried: list[float] = []
        found = compare.own_rate(None, compare.Task("sentence", None, None, None), method)
        assert found == pytest.approx(optimum[method])
        assert len(tried) == count


def test_a_rate_is_rounded_once():
    """Stored runs are found again by their rate, however far from the middle the search goes."""
    tried = []

    def loss_at(rate: float) -> float:
        if len(tried) == 7:
            raise StopIteration
        tried.append(rate)
        return rate

    with pytest.raises(StopIteration):
        common.best_rate(0.0015, loss_at)
    assert tried == [0.0005, 0.0015, 0.0045, 0.00017, 5.6e-05, 1.9e-05, 6.2e-06]


def test_the_soonest_rate_is_taken_and_where_none_is_done_the_lowest_loss(base, tmp_path):
    """A rate gets no longer than the soonest before it. An edge that is better by more than a
    hundredth is not the end of the search."""
    argv = ["--base", base, "--device", "cpu", "--seeds", "2", "--out", str(tmp_path)]
    experiment = common.Experiment("exp1_demand", "How soon?", argv)
    tried = []

    def measure(cell: str, seed: int, lr: float, most: int) -> dict:
        steps = {0.1: 100, 0.3: 300}.get(lr, 900) if cell == "learned" else 10**6
        tried.append((seed, lr, most))
        loss = {0.1: 0.51, 0.3: 0.52, 0.9: 0.53, 0.033: 0.5}.get(lr, 0.54)
        return {"steps": min(steps, most), "solved": steps <= most, "loss": loss}

    experiment.soonest({"cell": "learned"}, measure, 0.3, 1000, 400)
    assert tried[:4] == [(100, 0.1, 400), (100, 0.3, 100), (100, 0.9, 100), (100, 0.033, 100)]
    assert [run for run in tried if run[0] < 2] == [(seed, 0.1, 1000) for seed in (0, 1)]
    tried.clear()
    experiment.soonest({"cell": "never"}, measure, 0.3, 1000, 400)
    assert [lr for seed, lr, _ in tried if seed == 100] == [0.1, 0.3, 0.9, 0.033, 0.011]
    assert tried[-2:] == [(0, 0.033, 1000), (1, 0.033, 1000)]


def test_a_run_ends_when_all_is_right(model):
    """A look at validation data that finds every answer exact ends a training, and is its last."""
    prefix = Prefix.random(model, 2)
    ids = model.generate(torch.tensor([[1, 2, 3]]), 2, prefix.past_kv(model))[0].tolist()
    right, wrong = Row(ids[:3], ids[3:]), Row(ids[:3], [ids[3], (ids[4] + 1) % 61])
    plan = train.Plan(steps=6, lr=1e-9, batch_size=1, seed=0, eval_every=2)
    for row, steps in ((right, [0]), (wrong, [0, 2, 4, 6])):
        run = common.Run(model, [prefix], {"train": [row], "validation": [row]}, plan)
        assert [look["step"] for look in common.looks_of(run, common.all_right)] == steps
    run = run._replace(rows={"train": [right], "validation": [right]})
    assert [look["step"] for look in common.looks_of(run)] == [0, 2, 4, 6]  # only if asked to


def test_a_loss_that_is_no_number_counts_as_infinite(gpt2):
    """A rate that is too high ends no experiment. It is only never chosen."""
    model = gpt2.float()
    rows = {"train": [Row([1], [2])], "validation": [Row([1], [2])]}
    for steps in (1, 6):  # it is seen in the last look, or in training
        plan = train.Plan(steps, lr=1e38, batch_size=1, seed=0, eval_every=6)
        run = common.Run(model, [Prefix.random(model, 2)], rows, plan)
        assert common.curve_of(common.looks_of(run))[-1] == (steps, float("inf"))


def test_the_costs_of_a_prefix_are_counted_exactly(flags):
    """8 tokens have 4 layers of keys and values of 128. AdamW keeps two averages of each number."""
    compare.main(["--seeds", "1", "--steps", "1", "--lr", "0.01", "--batch-size", "4", *flags])
    found = json.loads(Path("out/compare/compare.json").read_text())["costs"]
    n = 8 * 4 * 2 * 128
    cells = {"trained": n, "context": 8, "training": 4 * n + 8 * n}
    assert {key: found["prefix"][key] for key in cells} == cells
    assert found["prefix"]["share"] == pytest.approx(100 * n / found["full"]["trained"])
    assert "activations" not in found["none"]
    assert 0 < found["soft_prompt"]["activations"] < found["full"]["activations"]


def test_the_shares_of_real_models():
    """A prefix of 10 has 10 · 12 · 2 · 768 numbers on GPT-2, far less where heads share keys."""
    gpt2, llama = 100 * 184_320 / 124_439_808, 100 * 10 * 16 * 2 * 8 * 64 / 1_235_814_400
    assert f"| GPT-2 | prefix | {gpt2:.2g} % |" in compare.share_table()
    assert f"| Llama 3.2 1B | prefix | {llama:.2g} % |" in compare.share_table()


@pytest.mark.parametrize("method", ["prefix", "soft_prompt", "both"])
def test_an_adapter_can_be_inspected(flags, method, capsys):
    """Its attention, next tokens, rank and losses are printed and returned; the base is its own."""
    train.main(["--method", method, "--steps", "2", "--lr", "0.1", "--out", "adapter", *flags])
    found = inspect_adapter.main(["adapter", *flags[2:]])
    assert torch.tensor(found["share"]).shape == (4, 4)
    assert len(found["effective_rank"]) == 1 + (method == "both")
    assert all(off != on for off, on in found["losses"].values())
    assert len(found["next"][0]) == 5 and found["next"][0] != found["next"][1]
    shown = capsys.readouterr().out
    assert ("is nearest to" in shown) == (method != "prefix")
    assert "| layer | head 1 | head 2 | head 3 | head 4 |" in shown
    assert "\n| 4 |" in shown and "\n| 0 |" not in shown
    drawn = sorted(path.name for path in Path().glob("*.png"))
    assert drawn == [f"adapter-layer{i}.png" for i in range(1, 5) if find_spec("matplotlib")]


def test_the_likeliest_next_tokens(model):
    """The first is what generation takes, and they come by their probability."""
    text, source = random_ids(4, seed=1), [1, 2, 3]
    found = inspect_adapter.likeliest(model, source, Prefix.text(model, text).past_kv(model))
    ids = torch.tensor([*text, *source])[None]
    assert found[0][0] == model.generate(ids, 1)[0, -1]
    p = model(ids)[0][0, -1].softmax(dim=-1).sort(descending=True).values
    assert [value for _, value in found] == pytest.approx(p[:5].tolist())


def test_the_nearest_tokens_go_by_the_angle():
    """An embedding is nearest to itself, however long the vector has grown."""
    embeddings = torch.randn(50, C, generator=torch.Generator().manual_seed(0))
    embeddings[7] *= 100  # long, and yet not near to all
    vectors = embeddings[[3, 7, 11]] * torch.tensor([[0.01], [1.0], [50.0]])
    assert inspect_adapter.nearest_tokens(vectors, embeddings, 2)[:, 0].tolist() == [3, 7, 11]
    assert inspect_adapter.nearest_tokens(-vectors, embeddings, 50)[:, -1].tolist() == [3, 7, 11]


def test_a_head_can_be_drawn_alone(flags):
    """--head 2 3 draws one picture, of head 3 in layer 2. A head that is not there is an error."""
    train.main(["--method", "prefix", "--steps", "1", "--lr", "0.1", "--out", "adapter", *flags])
    with pytest.raises(ValueError, match="--head 2 5: there are 4 layers of 4 heads"):
        inspect_adapter.main(["adapter", "--head", "2", "5", *flags[2:]])
    inspect_adapter.main(["adapter", "--head", "2", "3", *flags[2:]])
    drawn = [path.name for path in Path().glob("*.png")]
    assert drawn == ["adapter-layer2-head3.png"] * bool(find_spec("matplotlib"))
