"""The scripts of classroom/: what they measure is what they say, and an interruption loses nothing."""

import json
import weakref
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import common
import compare
import inspect_adapter
import pytest
import torch
from conftest import C, H, L, random_ids
from torch.testing import assert_close

import train
from data import Row, batch_of
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from prefix import Prefix
from soft_prompt import SoftPrompt


@pytest.fixture
def flags(base, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["--base", base, "--device", "cpu", "--data", str(Path(base).parent / "forty.jsonl")]


# ------------------------------------------------------------------------------------------------------------- measures


def test_attention_is_what_the_model_computes(model):
    """The weights written out, times the values, are the model's own fused attention; the past is part of it."""
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
    values = cache[-1][1].repeat_interleave(n_head // H, dim=1)
    assert_close((weights[-1] @ values).transpose(1, 2).flatten(2), attended[0])


def test_what_is_kept_for_backward_is_counted_once_and_without_weights(gpt2):
    """A product keeps its factors: the trained one, and not the frozen weight; views of one storage count once."""
    x = torch.ones(3, C, dtype=torch.float64, requires_grad=True)
    weight = gpt2.h[0].attn.c_proj.weight
    assert common.kept_for_backward(gpt2, lambda: (x @ weight).sum()) == 0
    assert common.kept_for_backward(gpt2, lambda: (x * x.view(3, C)).sum()) == 3 * C * 8
    assert common.kept_for_backward(gpt2, lambda: (2 * x).exp().sum()) == 3 * C * 8


def test_what_was_counted_is_freed(gpt2):
    """An operation may hold its own output, as exp does; a hook that hands the output itself back would keep it for ever."""
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
    """In each layer, for a position of the text 10·C numbers of GPT-2 and 4·C + 2·K·D + 3·I of a Llama, for a virtual token
    2·K·D in each row; a soft prompt's are text once a batch. All layers share one mask. To some percent: the loss has more."""
    gpt2, llama = GPT(GPTConfig(500, 220, 4, 4, 256)), Llama(LlamaConfig(500, 220, 4, 4, 2, 256, 640, 64, 1e4, 1e-5))
    for model in (gpt2, llama):
        rows = [Row(random_ids(T // 2, seed=i).tolist(), random_ids(T + 1 - T // 2, seed=i).tolist()) for i in range(B)]
        adapter, batch = kind.random(model.freeze(), P), batch_of(rows, model.device)
        kept = common.kept_for_backward(model, partial(common.forward, model, [adapter], batch))
        expected = common.kept_by_formula(model, P, B, T, kind is SoftPrompt)
        assert 1 <= kept / expected < 1.07, kept / expected


def test_the_effective_rank():
    """Rows that are multiples of one: 1. Orthogonal rows of one length: as many as they are."""
    assert inspect_adapter.effective_rank(torch.ones(4, 6)) == pytest.approx(1, abs=1e-4)
    assert inspect_adapter.effective_rank(3 * torch.eye(4, 6)) == pytest.approx(4)


def test_the_share_of_a_text_is_that_of_its_tokens(model):
    """A prefix that holds a text draws the attention that the text in the context would draw."""
    text, row = random_ids(3, seed=1), Row([1, 2, 3], [4, 5])
    share = inspect_adapter.virtual_share(model, [row], Prefix.text(model, text).past_kv(model))
    whole = common.attention(model, torch.cat([text, torch.tensor([1, 2, 3, 4])])[None])  # (L, 1, H, 7, 7)
    assert_close(share, whole[:, 0, :, 3:, :3].sum(dim=-1).mean(dim=-1))


def runs_of(trained, exact, loss) -> list[dict]:
    return [{"trained": trained, "validation_exact": e, "validation": v} for e, v in zip(exact, loss)]


def test_the_sentence_names_the_cheapest_within_the_noise():
    """By exact match where it says something, else by the loss; what the seeds of one method differ by is noise."""
    methods = {
        "soft_prompt": runs_of(700, [80, 90, 85], [0.5, 0.5, 0.5]),
        "prefix": runs_of(8000, [88, 92, 96], [0.3, 0.3, 0.3]),
        "full": runs_of(10**6, [97, 97, 97], [0.1, 0.1, 0.1]),
    }
    sentence = compare.verdict(methods)
    assert "is prefix, 8,000 numbers: 92 % exact match" in sentence  # 5 points behind, and its seeds are 8 apart
    assert "the best, full fine-tuning, has 97; the seeds of one method are up to 8 apart" in sentence
    methods["soft_prompt"] = runs_of(700, [97, 97, 97], [0.5, 0.5, 0.5])
    assert "is soft prompt, 700 numbers: 97 % exact match on validation data, and none is better." in compare.verdict(methods)
    free = {name: runs_of(runs[0]["trained"], [0, 0, 0], [run["validation"] for run in runs]) for name, runs in methods.items()}
    assert "is full fine-tuning, 1,000,000 numbers: 0.1 nats per token" in compare.verdict(free)
    assert "no cheaper method is within the noise, which is 0 between" in compare.verdict(free)
    assert "give --seeds 3" in compare.verdict({"full": runs_of(10, [100], [0.1])})


# -------------------------------------------------------------------------------------------------------------- scripts


def test_a_comparison_goes_on_where_it_was_interrupted(flags, monkeypatch, capsys):
    """Run again, it trains nothing; seed 0 is never reported, and never meets the test data."""
    tune, tuned = train.tune, []

    def counted(model, adapters, rows, plan):
        of_the_base = sum(p.requires_grad for p in model.parameters())
        tuned.append((tuple(map(type, adapters)), of_the_base, plan.lr, plan.seed))
        if len(tuned) == 3:
            raise KeyboardInterrupt
        return tune(model, adapters, rows, plan)

    monkeypatch.setattr(train, "tune", counted)
    argv = ["--seeds", "2", "--steps", "2", "--batch-size", "4", *flags]
    with pytest.raises(KeyboardInterrupt):
        compare.main([*argv, "--lr", "0.01"])
    compare.main([*argv, "--lr", "0.01"])
    assert len(tuned) == 11 and len(set(tuned)) == 10  # five methods, two seeds, one of them begun twice
    assert {seed for *_, seed in tuned} == {1, 2}
    printed = capsys.readouterr().out
    assert all(f"| {compare.NAMES[method]} |" in printed for method in compare.METHODS)
    assert "forty: The cheapest method within the noise of the best is " in printed
    written = json.loads(Path("out/compare/compare.json").read_text())
    assert len(written["runs"]) == 10 and all("exact_match" in record for record in written["runs"])
    compare.main([*argv, "--lr", "0.01"])
    assert len(tuned) == 11
    assert json.loads(Path("out/compare/compare.json").read_text())["runs"] == written["runs"]
    compare.main(argv)
    chosen = [record for record in json.loads(Path("out/compare/compare.json").read_text())["runs"] if record["seed"] == 0]
    assert len(chosen) >= 15 and not any("exact_match" in record for record in chosen)


def test_each_method_gets_its_own_learning_rate(monkeypatch):
    """Three rates; further ones while the outermost is the best by more than it could be by chance."""
    optimum = {"prefix": 9 * train.RECIPES["prefix"].lr, "full": train.RECIPES["full"].lr}

    def distance(_, task, method, seed, lr):
        tried.append(lr)
        return {"validation": abs(torch.tensor(lr / optimum[method]).log().item())}

    monkeypatch.setattr(compare, "tuned", distance)
    for method, count in [("prefix", 5), ("full", 3)]:
        tried: list[float] = []
        assert compare.best_rate(None, compare.Task("sentence", None, None, None), method) == pytest.approx(optimum[method])
        assert len(tried) == count


def test_the_costs_of_a_prefix_are_counted_exactly(flags):
    """8 tokens of 4 layers, keys and values of 128 numbers; AdamW keeps two averages of each; full keeps the most."""
    compare.main(["--seeds", "1", "--steps", "1", "--lr", "0.01", "--batch-size", "4", *flags])
    found = json.loads(Path("out/compare/compare.json").read_text())["costs"]
    n = 8 * 4 * 2 * 128
    cells = {"trained": n, "context": 8, "training": 4 * n + 8 * n}
    assert {key: found["prefix"][key] for key in cells} == cells
    assert found["prefix"]["share"] == pytest.approx(100 * n / found["full"]["trained"])
    assert "activations" not in found["none"] and 0 < found["soft_prompt"]["activations"] < found["full"]["activations"]


def test_the_shares_of_real_models():
    """GPT-2: a prefix of 10 has 10 · 12 · 2 · 768 of 124,439,808 numbers. Llama's groups share keys, so it has far less."""
    assert f"| GPT-2 | prefix | {100 * 184_320 / 124_439_808:.2g} % |" in compare.share_table()
    assert f"| Llama 3.2 1B | prefix | {100 * 10 * 16 * 2 * 8 * 64 / 1_235_814_400:.2g} % |" in compare.share_table()


@pytest.mark.parametrize("method", ["prefix", "soft_prompt", "both"])
def test_an_adapter_can_be_inspected(flags, method, capsys):
    train.main(["--method", method, "--steps", "2", "--out", "adapter", *flags])
    found = inspect_adapter.main(["adapter", *flags])
    assert torch.tensor(found["share"]).shape == (4, 4) and len(found["effective_rank"]) == 1 + (method == "both")
    assert all(off != on for off, on in found["losses"].values())
    assert len(found["next"][0]) == 5 and found["next"][0] != found["next"][1]
    shown = capsys.readouterr().out
    assert ("is nearest to" in shown) == (method != "prefix")
    assert "| layer | head 1 | head 2 | head 3 | head 4 |" in shown and "\n| 4 |" in shown and "\n| 0 |" not in shown
    drawn = sorted(path.name for path in Path().glob("*.png"))
    assert drawn == [f"adapter-layer{i}.png" for i in range(1, 5) if find_spec("matplotlib")]


def test_the_likeliest_next_tokens(model):
    """Behind a text and behind a prefix of it: the first is what generation takes, and they come by their probability."""
    text, source = random_ids(4, seed=1), [1, 2, 3]
    found = inspect_adapter.likeliest(model, source, Prefix.text(model, text).past_kv(model))
    ids = torch.tensor([*text, *source])[None]
    assert found[0][0] == model.generate(ids, 1)[0, -1]
    p = model(ids)[0][0, -1].softmax(dim=-1)
    assert [value for _, value in found] == pytest.approx(p.sort(descending=True).values[:5].tolist())
