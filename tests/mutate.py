"""Mutation testing: break the code in one small place, run the tests, and see whether any of them notices.

A break that none notices, a survivor, is a missing test (or superfluous code): coverage tells which lines the tests run,
mutation testing tells which they check.

    python tests/mutate.py                        every break of every file
    python tests/mutate.py prefix.py data.py      every break of these
    python tests/mutate.py --sample 150 --seed 1  some of them

Breaks come from the syntax tree: `variants` has one rule a kind of node. The tests run in a copy of the project; one process
imports what they need and forks for each break. A first, traced run tells which tests execute which lines, so that a break
meets those tests only, the quickest first, until one fails. Prints survivors as two-line diffs; exits 1 below 95 % killed.
"""

import argparse
import ast
import gc
import importlib.util
import io
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ["model.py", "prefix.py", "soft_prompt.py", "data.py", "train.py"]
GOAL = 95  # percent

# Breaks that change nothing, or nothing that a test on a CPU could see: (a piece of a line, what it becomes, why).
EQUIVALENT = [
    ("transpose(1, 2)", "transpose(2, 1)", "the order of the two does not matter"),
    ("promote_types(start.dtype, torch.float32)", "promote_types(torch.float32, start.dtype)", "the order does not matter"),
    ("for n in (L, H, C)", "for n in (H, L, C)", "the order of conditions that must all hold does not matter"),
    ("(torch.float64, torch.float32,", "(torch.float32, torch.float64,", "the order does not matter"),
    ("equal(head, weights['wte.weight'])", "equal(weights['wte.weight'], head)", "the order does not matter"),
    ("('.attn.bias', '.attn.masked_bias')", "('.attn.masked_bias', '.attn.bias')", "the order does not matter"),
    ("min(top_k, logits.size(-1))", "min(logits.size(-1), top_k)", "the order does not matter"),
    ("transpose(0, -1)", "transpose(-1, 0)", "the order does not matter"),
    ("logits.size(-1)", "logits.size(1)", "the same axis, counted from the other end"),
    ("argmax(dim=-1, keepdim", "argmax(dim=1, keepdim", "the same axis, counted from the other end"),
    ("/ temperature, dim=-1)", "/ temperature, dim=1)", "the same axis, counted from the other end"),
    ("/ temperature, dim=-1)", "/ temperature)", "the same axis, with a warning"),
    ("where[best].copy()", "where[best]", "what is added on the way is in the set already"),
    ("[0][0].size", "[0][1].size", "keys and values have one shape"),
    ("n_past:S]", "n_past:S + 1]", "the next token overwrites the position behind before it is read"),
    ("room - n_past", "room", "a buffer larger than need be"),
    ("room - n_past", "room + n_past", "a buffer larger than need be"),
    ("if n > 1 else None", "if n >= 1 else None", "a mask that hides nothing; having none is faster"),
    ("causal_mask(n, S, q.device) if n > 1 else None", "causal_mask(n, S, q.device)", "as above"),
    ("cache[0][0]", "cache[1][0]", "all layers have one shape"),
    ("@torch.no_grad()", "", "what it saves is memory"),
    ("with torch.inference_mode():", "if True:", "what it saves is time"),
    ("with torch.device('meta'):", "if True:", "what it saves is memory"),
    ("F.normalize(self.vectors, dim=1)", "F.normalize(self.vectors)", "the default, spelled out"),
    ("to(self.vectors.dtype), dim=1)", "to(self.vectors.dtype))", "the default, spelled out"),
    ("topk(k, dim=1)", "topk(k)", "the default, spelled out"),
    (", encoding='utf-8')", ")", "the default where the tests run"),
    ("(encoding='utf-8')", "()", "the default where the tests run"),
    (".cpu()", "", "the tests run on a CPU"),
    (".to(ids.device)", "", "the tests run on a CPU"),
    (".to(model.device)", "", "the tests run on a CPU"),
    (".to(device)", "", "the tests run on a CPU"),
    (", device=hidden.device", "", "the tests run on a CPU"),
    (", device=model.device", "", "the tests run on a CPU"),
    (", device=idx.device", "", "the tests run on a CPU"),
    (", device=x.device", "", "the tests run on a CPU"),
    (", device=device", "", "the tests run on a CPU"),
    (" or q.device.type != 'cpu'", "", "both ways to attend give the same"),
    (" or q.dtype != torch.bfloat16", "", "both ways to attend give the same"),
    ("q.device.type != 'cpu'", "q.device.type == 'cpu'", "both ways to attend give the same"),
    ("q.device.type != 'cpu'", "q.device.type != 'cpux'", "both ways to attend give the same"),
    ("q.dtype != torch.bfloat16", "q.dtype == torch.bfloat16", "both ways to attend give the same"),
    ("x.numel() > x.size(-1)", "x.numel() >= x.size(-1)", "both ways to multiply give the same"),
    ("x.numel() > x.size(-1)", "x.numel() > x.size(1)", "both ways to multiply give the same"),
    ("x.numel() > x.size(-1)", "x.numel() > x.size(-2)", "both ways to multiply give the same"),
    ("q = q.contiguous()", "q = q", "what it saves is memory"),
    ("q = q.contiguous()", "pass", "what it saves is memory"),
    ("if self.dtype == torch.bfloat16", "if not self.dtype == torch.bfloat16", "what the layout saves is time"),
    ("if self.dtype == torch.bfloat16", "if self.dtype != torch.bfloat16", "what the layout saves is time"),
    ("weight.data.contiguous()", "weight.data", "what the layout saves is time"),
    ("weight.data = weight.data.contiguous()", "pass", "what the layout saves is time"),
    ("(stop_token is not None and done.all())", "done.all()", "without a stop token no row is ever done"),
    ("(vectors, past_kv, last=1)", "(vectors, past_kv)", "what it saves is time: only the cache is used"),
    ("(vectors, past_kv, last=1)", "(vectors, past_kv, last=2)", "what it saves is time: only the cache is used"),
    ("('gpt2', 'gpt2-medium',", "('gpt2-medium', 'gpt2',", "the order does not matter"),
    ("in (new, old)", "in (old, new)", "the order does not matter"),
    ("checkpoint.safetensors", "checkpoint.safetensorsx", "a name as good as another"),
    ("f'{split} {seed}'", "f'{split} x{seed}'", "other numbers, as random"),
    ("(batch.targets != IGNORE).any(dim=0)", "(batch.targets != IGNORE).any()", "what a later start saves is time"),
    ("(batch.targets != IGNORE).any(dim=0)", "(batch.targets != IGNORE).any(dim=1)", "what a later start saves is time"),
    ("max(1, LOGITS_AT_ONCE // model.config.vocab_size)", "max(LOGITS_AT_ONCE // model.config.vocab_size, 1)", "the order"),
    ("loss += part.detach()", "loss += part", "what it saves is memory"),
    ("(step + 1) / 10, (args.steps - step) / args.steps)", "(args.steps - step) / args.steps, (step + 1) / 10)", "the order"),
    ("step < args.steps and (", "step <= args.steps and (", "a checkpoint more, whose place the adapter takes at once"),
    (" and step < args.steps and (", " and (", "a checkpoint more, whose place the adapter takes at once"),
    ("lr=args.lr, weight_decay=0.1)", "lr=args.lr)", "the default, spelled out"),
    ("min(1, (step + 1) / 30,", "min((step + 1) / 30, 1,", "the order does not matter"),
    ("texts[:5000]", "texts", "what it saves is time"),
    ("texts[:5000]", "texts[:5001]", "a limit as good as another"),
    ("n_merges=700", "n_merges=701", "a limit as good as another"),
    ("while len(queue) < args.batch_size", "while len(queue) <= args.batch_size", "the same queue, filled up sooner"),
    ("encode()).hexdigest()[:16]", "encode()).hexdigest()", "a longer fingerprint of the examples"),
    ("encode()).hexdigest()[:16]", "encode()).hexdigest()[:17]", "a longer fingerprint of the examples"),
    ("run.rows['train'], run.rows['validation']", "run.rows['validation'], run.rows['train']", "the order does not matter"),
    ("('method', 'n_virtual',", "('n_virtual', 'method',", "the order does not matter"),
    ("trainee).item()", "trainee)", "a tensor of one number prints as that number"),
    ("(0.0, 0, [", "(0, 0.0, [", "whole and broken numbers add alike"),
    (", key=lambda i: len(rows[i].source) + len(rows[i].target)", "", "what the order saves is padding"),
    ("len(rows[i].source) + len(rows[i].target))", "len(rows[i].source))", "what the order saves is padding"),
    ("len(rows[i].source) + len(rows[i].target))", "len(rows[i].source) - len(rows[i].target))", "as above"),
    ("targets].unique().tolist()", "targets].unique()", "a tensor of one number is an index, too"),
    ("targets].unique().tolist()", "targets].tolist()", "marked wrong twice is wrong"),
    ("logits.argmax(dim=-1))", "logits.argmax(dim=1))", "the same axis, counted from the other end"),
    ("check_finite(loss.item(), args.lr)", "check_finite(loss, args.lr)", "a tensor of one number prints as that number"),
    ("torch.Generator().manual_seed(args.seed)", "torch.manual_seed(args.seed)", "other numbers, as random"),
    ("('step', 'exp_avg',", "('exp_avg', 'step',", "the order does not matter"),
]

# ------------------------------------------------------------------------------------------------------------ the breaks

OPPOSITE = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def changed(node: ast.AST, **fields) -> ast.AST:
    return type(node)(**dict(ast.iter_fields(node)) | fields)


def without(nodes: list) -> Iterator[list]:
    """-> the list without its first element, without its second, …"""
    return (nodes[:i] + nodes[i + 1 :] for i in range(len(nodes)))


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """-> the nodes that may take the place of this one, each a small break."""
    match node:
        case ast.BinOp(left, op) | ast.AugAssign(left, op):
            if type(op) in OPPOSITE:
                yield changed(node, op=OPPOSITE[type(op)]())
            if isinstance(node, ast.BinOp):  # a missing scale, mask or bias
                yield left
        case ast.BoolOp(op, values):
            yield changed(node, op=OPPOSITE[type(op)]())
            for fewer in without(values):
                yield changed(node, values=fewer) if len(fewer) > 1 else fewer[0]
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield changed(node, ops=[*ops[:i], OPPOSITE[type(op)](), *ops[i + 1 :]])
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value or 1.0)
        case ast.Constant(str(value)):
            yield ast.Constant(value + "x")
        case ast.If(test) | ast.While(test):
            yield changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.IfExp(_, body, orelse):
            yield from (body, orelse)
        case ast.Call(func, arguments, keywords):
            if len(arguments) > 1 and not any(isinstance(a, ast.Starred) for a in arguments):
                yield changed(node, args=[arguments[1], arguments[0], *arguments[2:]])
            for fewer in without(keywords):
                yield changed(node, keywords=fewer)
            if isinstance(func, ast.Attribute):  # a missing .detach(), .float(), .transpose(1, 2), …
                yield func.value
        case ast.Tuple([first, second, *rest], ast.Load()):
            yield changed(node, elts=[second, first, *rest])
        case ast.Subscript(value, ast.Slice()):
            yield value
        case ast.Slice(lower, upper):
            for side, bound in (("lower", lower), ("upper", upper)):
                if bound and not isinstance(bound, ast.Constant):
                    yield changed(node, **{side: ast.BinOp(bound, ast.Add(), ast.Constant(1))})
        case ast.comprehension(ifs=ifs):
            for fewer in without(ifs):
                yield changed(node, ifs=fewer)
        case ast.ExceptHandler(ast.Tuple(kinds)) if len(kinds) > 1:
            for fewer in without(kinds):
                yield changed(node, type=ast.Tuple(fewer, ast.Load()))
        case ast.With(body=body):  # a missing no_grad
            yield ast.If(ast.Constant(True), body, [])
        case ast.FunctionDef(decorator_list=decorators):
            for fewer in without(decorators):
                yield changed(node, decorator_list=fewer)
    match node:  # a missing line, unless it introduces a name: without that nothing would run at all
        case ast.Assign([ast.Name(name)], value) if name not in {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}:
            pass
        case ast.Assign([ast.Tuple()]) | ast.AnnAssign(ast.Name()):
            pass
        case ast.Expr() | ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.Delete() | ast.Return() | ast.Raise():
            yield ast.Pass()
        case ast.Break() | ast.Continue():
            yield ast.Pass()


def is_silent(node: ast.AST, parent: ast.AST) -> bool:
    """What is said, not done (docstrings, messages), annotations, imports, and the order of what has none."""
    match parent, node:
        case ast.Raise(), _:
            return True
        case _, ast.Expr(ast.Constant(str())) | ast.Call(ast.Name("print")) | ast.Import() | ast.ImportFrom():
            return True
        case ast.ExceptHandler() | ast.Compare(), ast.Tuple():
            return True
    return node in (getattr(parent, "annotation", None), getattr(parent, "returns", None))


class Break(NamedTuple):
    file: str
    line: int
    lines: set[int] | None  # a test that executes one of them may notice; None: whatever imports the file
    before: str
    after: str
    make: Callable[[], None]  # changes the tree


def breaks(file: str, node: ast.AST, statement: ast.stmt | None = None, lines: set[int] | None = None) -> Iterator[Break]:
    """The breaks below a node of a file's tree."""
    for field, value in ast.iter_fields(node):
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or is_silent(child, node):
                continue
            inner, inner_lines = statement, lines
            if isinstance(child, ast.stmt):
                inner = child
                if lines is not None or isinstance(node, ast.FunctionDef):  # in a function; of a compound statement, its head
                    last = child.body[0].lineno - 1 if hasattr(child, "body") else child.end_lineno
                    inner_lines = set(range(child.lineno, max(child.lineno, last) + 1))

            def put(new: ast.AST, node=node, field=field, place=place) -> None:
                if place is None:
                    setattr(node, field, new)
                else:
                    getattr(node, field)[place] = new

            for variant in variants(child):
                before = ast.unparse(inner).splitlines()
                put(ast.copy_location(variant, child))
                after = ast.unparse(variant if inner is child else inner).splitlines()
                put(child)
                i = len(os.path.commonprefix([before, after]))  # the first line that differs
                if before != after:
                    new = "" if before[i + 1 :] == after[i:] else after[i]
                    line, make = getattr(child, "lineno", inner.lineno), lambda put=put, variant=variant: put(variant)
                    yield Break(file, line, inner_lines, before[i], new, make)
            yield from breaks(file, child, inner, inner_lines)


def is_equivalent(b: Break) -> bool:
    """-> whether it replaces one piece of a line by another as an entry of the list says."""
    pieces = ((b.before.split(old), old, new) for old, new, _ in EQUIVALENT)
    return any(b.after == old.join(p[:i]) + new + old.join(p[i:]) for p, old, new in pieces for i in range(1, len(p)))


def around(before: str, after: str, width: int = 50) -> tuple[str, str]:
    """-> two lines, cut to what differs and its surroundings."""
    same = len(os.path.commonprefix([before, after]))
    tail = min(len(os.path.commonprefix([before[::-1], after[::-1]])), min(len(before), len(after)) - same)
    return tuple(line[max(0, same - width) : len(line) - tail + width].strip() for line in (before, after))


def learning(tree: ast.Module) -> set[int]:
    """train.py -> the lines of whatever in it computes a loss or its gradient, and of what that makes use of."""
    parts = {part.name: part for part in tree.body if isinstance(part, (ast.FunctionDef, ast.ClassDef))}
    words = {name: {getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(part)} for name, part in parts.items()}
    used = {name for name in parts if words[name] & {"cross_entropy", "backward"}}
    while more := set().union(*(words[name] for name in used)) & set(parts) - used:
        used |= more
    return {i for part in map(parts.get, used) for i in range(part.lineno - len(part.decorator_list), part.end_lineno + 1)}


# ------------------------------------------------------------------------------------------------------------- the tests


class Tracer:
    """A pytest plugin: which lines each test executes, and how long it takes.

    What a fixture that tests share executes is recorded under the fixture's name, and counts for all its tests.
    """

    def __init__(self):
        self.files = {str(Path(file).resolve()): file for file in FILES}
        self.owner = ""
        self.lines: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self.fixtures: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.values: dict[str, str] = {}
        self.outside: set[str] = set()  # tests that start a process, which has the files as they are, unbroken
        sys.addaudithook(lambda event, _: event == "subprocess.Popen" and self.outside.add(self.owner))

    def trace(self, frame, event, argument):
        file = self.files.get(frame.f_code.co_filename)
        if file:
            self.lines[self.owner].add((file, frame.f_lineno))
            return self.trace

    def record(self, owner: str):
        outer, self.owner = self.owner, owner
        begin = time.perf_counter()
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(self.trace if outer else None)
            self.seconds[owner] = time.perf_counter() - begin
            self.owner = outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.fixtures[item.nodeid] = item.fixturenames
        return (yield from self.record(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        value = yield from self.record(fixturedef.argname)
        self.values[fixturedef.argname] = value
        return value


class Jury:
    """A pytest plugin: runs only the tests that may notice a break, the quickest first, each within a time limit."""

    def __init__(self, tracer: Tracer, b: Break, directory: Path):
        self.tracer, self.directory = tracer, directory
        self.at = b.lines and {(b.file, line) for line in b.lines}

    def notices(self, owner: str) -> bool:
        return self.at is None or not self.at.isdisjoint(self.tracer.lines[owner])

    def seconds(self, test: str) -> float:
        """-> the test's, with those of the fixtures that are to be made again."""
        again = (f for f in self.tracer.fixtures[test] if f in self.tracer.values and self.notices(f))
        return self.tracer.seconds[test] + sum(self.tracer.seconds[f] for f in again)

    def tests(self) -> list[str]:
        fixtures = self.tracer.fixtures
        tests = fixtures.keys() - self.tracer.outside
        return sorted((t for t in tests if any(map(self.notices, [t, *fixtures[t]]))), key=lambda t: (self.seconds(t), t))

    def pytest_collection_modifyitems(self, items):
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.tests()]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        signal.alarm(math.ceil(10 + 5 * self.seconds(item.nodeid)))  # its default action ends the process: a kill

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef, request):
        """What a shared fixture made in the traced run serves again, in a copy, unless the break lies in its making."""
        value, traced = self.tracer.values.get(fixturedef.argname), self.directory.parent / "traced"
        if isinstance(value, (str, Path)) and Path(value).is_relative_to(traced) and not self.notices(fixturedef.argname):
            place = Path(value).relative_to(traced)
            shutil.copytree(traced / place.parts[0], self.directory / place.parts[0], dirs_exist_ok=True)
            value = type(value)(self.directory / place)
            fixturedef.cached_result = (value, fixturedef.cache_key(request), None)
            return value


def in_child(do: Callable[[], int]) -> int:
    """Forks a process that ends with what `do` returns -> its id."""
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):  # a break may raise whatever it likes, on import too
            os.setsid()
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(silence, stream)
            resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
            status = do()
        os._exit(status)
    return child


def run_pytest(*options: str, files: Iterable[str] = ("tests",), plugins: tuple = ()) -> int:
    """All tests but the slow ones, the peers' and the classroom's, without what would cost each break tenths of a second."""
    lean = ["--assert=plain", "--tb=no", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    slow = [f"--ignore=tests/test_{name}.py" for name in ("peers", "classroom", "exercises", "experiments")]
    return int(pytest.main(["-x", "-q", *lean, *options, *slow, *files], plugins))


def try_break(b: Break, trees: dict[str, ast.Module], tracer: Tracer, directory: Path) -> int:
    """Runs in a child, so that the broken tree and module are its own."""
    b.make()
    name = b.file.removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, Path(b.file).resolve())
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    signal.alarm(30)
    exec(compile(ast.fix_missing_locations(trees[b.file]), module.__file__, "exec"), module.__dict__)
    jury = Jury(tracer, b, directory)
    files = dict.fromkeys(test.split("::")[0] for test in jury.tests())  # to collect fewer is quicker
    return run_pytest(f"--basetemp={directory / 'pytest'}", files=files, plugins=(jury,))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, metavar="FILE", help="break only these (default: all)")
    parser.add_argument("--sample", metavar="N", type=int, help="try only N of the breaks, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="breaks tried at the same time (default: 2)")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.dont_write_bytecode = False
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary).resolve()
        shutil.copytree(ROOT, here / "project", ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
        os.chdir(here / "project")
        return mutate(args, here, begin)


def mutate(args: argparse.Namespace, here: Path, begin: float) -> int:
    trees = {file: ast.parse(Path(file).read_text(encoding="utf-8")) for file in args.files}
    found = {}
    for file, tree in trees.items():
        loop = learning(tree)
        for b in breaks(file, tree):
            if not is_equivalent(b) and (file != "train.py" or b.line in loop):
                found[file, b.line, b.before, b.after] = b
    chosen = list(found.values())
    if args.sample:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))

    environment = dict(os.environ)
    with redirect_stdout(io.StringIO()):
        run_pytest("--collect-only")
    for name, module in list(sys.modules.items()):  # what is left is what the project imports
        if str(getattr(module, "__file__", "")).startswith(str(here)):
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()

    def traced() -> int:
        tracer = Tracer()
        status = run_pytest(f"--basetemp={here / 'traced'}", plugins=(tracer,))
        (here / "tracer").write_bytes(pickle.dumps(tracer))
        return status

    if os.waitpid(in_child(traced), 0)[1]:
        sys.exit("the tests fail as the code is: mend that first")
    tracer = pickle.loads((here / "tracer").read_bytes())
    print(f"{len(chosen)} of {len(found)} breaks, {len(tracer.fixtures)} tests; {time.perf_counter() - begin:.0f} s to prepare")

    tried, survived, running = Counter(b.file for b in chosen), Counter(), {}

    def verdict(b: Break, status: int) -> None:
        if status == 0:
            survived[b.file] += 1
            before, after = around(b.before, b.after)
            print(f"{b.file}:{b.line}\n- {before}\n+ {after}\n", flush=True)

    def wait() -> None:
        child, status = os.wait()
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it may have started
        b, directory = running.pop(child)
        shutil.rmtree(directory, ignore_errors=True)
        verdict(b, status)

    for i, b in enumerate(chosen):
        if not Jury(tracer, b, here).tests():
            verdict(b, 0)
            continue
        if len(running) == args.workers:
            wait()
        directory = here / str(i)
        directory.mkdir()
        running[in_child(lambda: try_break(b, trees, tracer, directory))] = b, directory
    while running:
        wait()
    for file, n in tried.items():
        print(f"{file:15} {n - survived[file]:4} of {n:4} killed, {100 * (1 - survived[file] / n):5.1f} %")
    share = 100 * (1 - survived.total() / len(chosen))
    print(f"{'in all':15} {len(chosen) - survived.total():4} of {len(chosen):4} killed, {share:5.1f} %")
    print(f"{time.perf_counter() - begin:.0f} s")
    return int(share < GOAL)


if __name__ == "__main__":
    sys.exit(main())
