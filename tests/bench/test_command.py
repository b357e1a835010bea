"""`flowformer bench`, its files, and the comparison with another commit."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import flowformer
from flowformer import cli
from flowformer.bench import compare, plots, registry, results, runner, tables
from flowformer.bench.runner import Plan

SIZES = ["--heads", "2", "--channels", "8", "--value-channels", "8", "--seconds", "0.003", "--no-memory", "--no-limits"]


def bench(capsys, *words):
    status = cli.main(["bench", *words])
    return status, *capsys.readouterr()


def test_files_hold_what_was_measured(tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = ["causal", "step", "--lengths", "32,64", "--contenders", "flow-torch,sdpa", *SIZES]
    status, out, _ = bench(capsys, *arguments, "--threads", "1", "--out", str(folder))
    assert status == 0
    assert "flow-torch" in out
    start, *found, end = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert results.read_records(folder) == [start, *found, end]
    environment = start["environment"]
    assert environment["threads"] == start["plan"]["threads"] == 1
    assert environment["cpu"]
    assert environment["flowformer"] == flowformer.__version__
    assert {"torch", "python", "commit"} <= set(environment)
    assert len(start["load_before"]) == len(end["load_after"]) == 3
    assert isinstance(end["busy"], bool)
    assert end["finished"]
    assert len(found) == 2 * 2 * 2
    for point in found:
        assert 0 < point["min_ms"] <= point["median_ms"]
    table = (folder / "table.txt").read_text()
    assert "sdpa" in table
    assert environment["cpu"] in table
    assert max(map(len, table.splitlines())) <= 140
    for kind in ("time", "memory"):  # for a step, memory is the state
        assert (folder / f"{kind}.svg").read_text().startswith("<?xml")
        picture = read_png(folder / f"{kind}.png")
        assert picture.std() > 0.05
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def read_png(path):
    from matplotlib.image import imread

    return imread(path)


def test_figures_show_every_contender_on_logarithmic_axes(small):
    records = []
    runner.run(Plan(operations=("causal",), lengths=(16, 32), limits=False, **small), records.append)
    (axes,) = plots.draw(records, "time").axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line for line in axes.lines}
    timed = [record for record in records if record.get("status") == "timed"]
    assert set(lines) == {record["contender"] for record in timed}
    assert list(lines["sdpa"].get_ydata()) == [record["min_ms"] for record in timed if record["contender"] == "sdpa"]
    assert plots.draw(records, "memory") is None
    looks = [(line.get_color(), line.get_marker()) for line in lines.values()]
    assert len(looks) == len(set(looks)) > 8
    names = [text.get_text() for text in axes.texts]  # so many have their names at the ends of their lines
    assert sorted(names) == sorted(lines)


def test_table_tells_what_doubling_the_length_costs():
    times = {("quick", 64): 1.0, ("quick", 16): 0.25, ("slow", 16): 1.0, ("slow", 32): 4.0, ("slow", 64): 8.0}
    points = [
        {"contender": name, "length": length, "status": "timed", "min_ms": time}
        for (name, length), time in times.items()
    ]
    points.append({"contender": "slow", "length": 128, "status": "left out"})
    points.append({"contender": "slow", "length": 256, "status": "timed", "min_ms": None})
    growth = tables._growth(points, lambda point: point["min_ms"])
    assert growth == {("quick", 64): 2.0, ("slow", 32): 4.0, ("slow", 64): 2.0}
    assert tables._peak({"memory": {"peak_bytes": 3}}) == 3
    assert tables._peak({}) is None


def test_names_at_the_ends_of_lines_keep_apart():
    assert plots.spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert plots.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    together = plots.spread([0.30, 0.30, 0.42, 0.9], 0.1)  # the third is in the way of the two that are apart
    assert together == pytest.approx([0.24, 0.34, 0.44, 0.9])


def test_without_matplotlib_there_are_no_figures_but_a_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "draw", lambda records, kind: exec("import no_such_matplotlib"))
    arguments = ["causal", "--lengths", "16", "--contenders", "flow-torch", *SIZES, "--out", str(tmp_path)]
    status, out, _ = bench(capsys, *arguments)
    assert status == 0
    assert "pip install 'flowformer[bench]'" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.jsonl", "table.txt"]


def test_wrong_contender_makes_the_command_fail(rows, tmp_path, capsys):
    arguments = ["toy", "--import", rows, "--contenders", "right,wrong,absent", *SIZES, "--out", str(tmp_path)]
    status, out, err = bench(capsys, *arguments)
    assert status == 1
    assert "wrong is wrong in toy at length 8" in err
    assert "absent unavailable: the moon is not up (8)" in out


def test_interruption_leaves_results(rows, tmp_path, capsys, monkeypatch):
    def interrupted(plan, keep, tell):
        run_all(plan, keep, tell)
        raise KeyboardInterrupt

    from flowformer.bench import command

    run_all = runner.run
    monkeypatch.setattr(command, "run", interrupted)
    arguments = ["toy", "--import", rows, "--contenders", "right", *SIZES, "--out", str(tmp_path)]
    status, _, err = bench(capsys, *arguments)
    assert status == 130
    assert "interrupted" in err
    assert (tmp_path / "table.txt").exists()
    status, _, err = bench(capsys, *arguments)
    assert status == 2
    assert "holds the results of another run" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["casual"], "did you mean 'causal'?"),
        (["causal", "--contenders", "flow-torhc"], "did you mean 'flow-torch'?"),
        (["causal", "--length", "3"], "did you mean --lengths?"),
        (["causal", "--lengths", "a few"], "expects whole numbers separated by commas"),
        (["causal", "--heads", "0"], "heads must be at least 1"),
    ],
)
def test_mistakes_are_explained(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = bench(capsys, *words)
    assert status == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_help_lists_operations_and_contenders(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    out = capsys.readouterr().out
    for name in (*registry.OPERATIONS, "sdpa", "published", "--compare"):
        assert name in out


# ---------------------------------------------------------------------------------------------------------- comparison


def git(folder, *words):
    identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, "-C", folder, *words], check=True, capture_output=True, text=True).stdout


YESTERDAY = """
from flowformer.bench.registry import Contender, add_contender
from flowformer.bench.rows.peers import sdpa

add_contender(Contender("yesterday", "causal", sdpa, None, "what only the old commit has"))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with two commits: a library without a benchmark, and one with a contender that is gone today."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(
        Path(flowformer.__file__).parent, folder / "flowformer", ignore=shutil.ignore_patterns("__pycache__")
    )
    git(folder, "init", "-q", "-b", "trunk")
    git(folder, "add", "flowformer/__init__.py")
    git(folder, "commit", "-q", "-m", "without a benchmark")
    git(folder, "tag", "first")
    (folder / "flowformer" / "bench" / "rows" / "yesterday.py").write_text(YESTERDAY)
    git(folder, "add", "flowformer")
    git(folder, "commit", "-q", "-m", "old")
    return folder


def worktrees(folder):
    return git(folder, "worktree", "list").count("\n")


def test_comparison_measures_a_commit_by_its_own_bench(repository, small):
    """With real processes: what the old commit has not is left out, and what only it has is measured."""
    commit = compare.find_commit(repository, "HEAD")
    names = ("flow-torch", "yesterday", "tomorrow")
    plan = Plan(operations=("causal", "of-tomorrow"), lengths=(16,), contenders=names, threads=1, **small)
    with compare.worktree(repository, commit) as there:
        assert worktrees(repository) == 2
        found = compare._run(plan, there, "old")
        assert found[0]["environment"]["commit"] == commit  # and nothing in it is changed
    assert not there.exists()
    assert worktrees(repository) == 1
    assert [record["contender"] for record in found if record["record"] == "point"] == ["flow-torch", "yesterday"]


# Each starts a process: names of both kinds are refused by the same lines.
@pytest.mark.parametrize(
    "names",
    [{"operations": ("of-tomorrow",)}, pytest.param({"contenders": ("tomorrow",)}, marks=pytest.mark.slow)],
)
def test_comparison_says_what_the_old_commit_has_not(names, repository, small):
    plan = Plan(**{"operations": ("causal",), "lengths": (16,), "threads": 1, **names}, **small)
    with pytest.raises(results.RunError, match=r"old cannot be measured: .* there is none of the \w+ (of-)?tomorrow"):
        compare._run(plan, repository, "old")


def test_comparison_with_a_commit_without_a_bench_is_refused(repository, small):
    with pytest.raises(results.RunError, match=r"has no flowformer\.bench"):
        compare.compare("first", Plan(operations=("causal",), **small), print, root=repository)
    assert worktrees(repository) == 1


def fake_run(times, calls):
    def ask(task, threads, folder, *, plan, imports):
        calls.append(Path(folder).name)
        point = {"record": "point", "operation": "causal", "length": 16, "status": "timed", "ours": True}
        point |= {"contender": "flow-torch", "dtype": "float32", "layout": "length-first", "min_ms": times.pop(0)}
        memory = {"memory": {"peak_bytes": 300 if calls[-1] == "tree" else 600}} if plan["memory"] else {}
        limit = {"record": "limit", "operation": "causal", "length": 16, "name": "sgemm", "value": 50.0}
        return [{"record": "run", "environment": {"commit": "?"}}, limit, {**point, **memory}]

    return ask


def test_comparison_alternates_and_gives_ratios(repository, small, monkeypatch):
    calls, records = [], []
    monkeypatch.setattr(compare, "ask", fake_run([4.0, 2.0, 1.0, 3.0], calls))
    plan = Plan(operations=("causal",), lengths=(16,), threads=1, **{**small, "memory": True})
    compare.compare("trunk", plan, records.append, root=repository)
    assert calls == [repository.name, "tree", "tree", repository.name]
    found = {record["contender"]: record for record in records if record["record"] == "ratio"}
    row = found["flow-torch"]
    assert (row["here_ms"], row["there_ms"], row["ratio"]) == (3.0, 1.0, 3.0)
    assert row["pair_ratios"] == [2.0, 3.0]
    assert row["memory_ratio"] == 2
    assert found["flow (best)"]["ratio"] == 3
    assert found["limit sgemm, per 1e9"]["here_ms"] == 20


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_worktree_is_removed_whatever_happens(repository, small, monkeypatch, error):
    def fail(*_, **__):
        assert worktrees(repository) == 2
        raise error

    monkeypatch.setattr(compare, "ask", fail)
    with pytest.raises(error):
        compare.compare("HEAD", Plan(operations=("causal",), **small), print, root=repository)
    assert worktrees(repository) == 1


def test_comparison_says_what_it_wants(repository, tmp_path):
    with pytest.raises(results.RunError, match=r"git knows no commit 'trnk' \(did you mean 'trunk'"):
        compare.find_commit(repository, "trnk")
    with pytest.raises(results.RunError, match="git checkout"):
        compare.find_commit(tmp_path, "HEAD")


def test_comparison_is_shown(tmp_path, capsys, monkeypatch):
    from flowformer.bench import command

    def fake(revision, plan, keep, tell):
        runner.run(plan, keep)
        row = {"record": "ratio", "operation": "causal", "length": 16, "contender": "flow-torch", "memory_ratio": None}
        keep({**row, "here_ms": 3.0, "there_ms": 2.0, "ratio": 1.5, "pair_ratios": [1.4, 1.6]})

    monkeypatch.setattr(command, "compare", fake)
    arguments = ["causal", "--lengths", "16", "--contenders", "flow-torch", *SIZES, "--out", str(tmp_path)]
    status, out, _ = bench(capsys, *arguments, "--compare", "v0")
    assert status == 0
    assert "here against v0" in out
    assert "1.40 to 1.60" in (tmp_path / "table.txt").read_text()
