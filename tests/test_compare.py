"""`tokentrim compare`: plans, paired statistics, a folder that grows and resumes, the report, and the leaderboard."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from research.evaluation.leaderboard import format_board, read_lines
from tokentrim.tools.cli import build_parser, main
from tokentrim.tools.compare.making import Maker
from tokentrim.tools.compare.paired import FEWEST, bootstrap, judge_methods, tell_verdict
from tokentrim.tools.compare.plan import read_plan
from tokentrim.tools.compare.report import make_page
from tokentrim.tools.compare.results import ABOUT, LINES, Results
from tokentrim.tools.drift import measure_video
from tokentrim.tools.frames import read_frames
from tokentrim.tools.worlds import WORLDS


WORLD = str(ROOT / "checkpoints" / "tiny-world")
SHORT = ["--chunks", "8", "--seeds", "2", "--steps", "1", "--batch", "2"]


def plan_of(*arguments):
    return read_plan(build_parser().parse_args(["compare", *arguments, "--out", "x"]))


# Plans


def test_a_plan_has_the_prompts_and_the_measured_part_of_a_shipped_world():
    plan = plan_of(WORLD)
    assert list(plan.methods) == ["plain", "tokentrim", "tokentrim_plus"] and plan.reference == "plain"
    assert plan.prompts == WORLDS["tiny-world"].still and not any("while" in prompt for prompt in plan.prompts)
    assert (plan.chunks, plan.seeds, plan.top) == (60, 4, 1.0)
    assert plan_of(str(ROOT / "checkpoints" / "travelling-world")).top == 0.3
    quick = plan_of(WORLD, "--quick", "--chunks", "50")
    assert (quick.chunks, quick.seeds, len(quick.prompts)) == (50, 3, 2)


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\n  a   whale \na fox\n")
    (tmp_path / "plan.yaml").write_text(
        f"checkpoint: {WORLD}\nprompts: prompts.txt\nchunks: 9\nseeds: 3\nlayouts: [longlive]\n"
        "methods:\n  held: {method: {reanchor: {tolerance: null}}, window_size: 9}\nsettings: {height: 32}\n"
    )
    plan = plan_of("--plan", str(tmp_path / "plan.yaml"), "--chunks", "10", "--width", "48")
    assert plan.prompts == ("a fox", "a whale") and (plan.chunks, plan.seeds, plan.reference) == (10, 3, "held")
    assert plan.arguments("longlive") == {"height": 32, "width": 48, "method": "plain", "layout": "longlive"}
    assert plan.arguments("held")["window_size"] == 9
    assert len({video.seed for video in plan.videos("held")}) == 6  # no noise serves two videos of a method


def test_batches_pair_all_methods_on_prompt_and_seed():
    plan = plan_of(WORLD, "--seeds", "3")
    batches = plan.batches(4)
    assert len(batches) == 3 * 3 and [batch[0].method for batch in batches[:3]] == list(plan.methods)
    for start in range(0, len(batches), 3):
        keys = [[(each.number, each.seed) for each in batch] for batch in batches[start : start + 3]]
        assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("chunks: 0", "`chunks` must be an int >= 2, but is 0"),
        ("seeds: 2000", "`seeds` must be an int from 1 to 1000"),
        ("top: 0", "`top` must be a number above 0"),
        ("frames: 9", "has 'frames'"),
        ("- plain", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("methods: [magic]", "`methods` must be one of"),
        ("methods: plain", "must be a list of names"),
        ("methods: {}", "at least one method"),
        ("methods: {a: {num_frames: 9}}", "`num_frames` is decided by the comparison"),
        ("methods: {a: {window: 9}}", "but is 'window'"),
        ("methods: {a b: {method: plain}, A-b: {method: plain}}", "differ in letters or digits"),
        ("layouts: [mem_rope]", "did you mean memrope"),
        ("prompts: [1]", "must be a file, or a list of texts"),
        ("prompts: ['-']", "no line of"),
        ("prompts: none.txt", "does not exist"),
        ("settings: {height: 33}", "`height` must be a multiple"),
    ],
)
def test_an_invalid_plan_is_one_sentence(content, sentence, tmp_path):
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan_of(WORLD, "--plan", str(tmp_path / "plan.yaml"))


# Statistics


def line_of(method, number, drift, calls=10, motion=1.0, cuts=0):
    measures = {"color_distance": drift, "motion_late_to_early": motion, "cuts": cuts}
    return {
        "method": method,
        "prompt_number": number,
        "seed": 0,
        "measures": measures,
        "calls": calls,
        "seconds": 2.0,
        "num_frames": 24,
        "memory": 5,
    }


def lines_of(plain, other, **options):
    return [
        *(line_of("plain", *pair) for pair in enumerate(plain)),
        *(line_of("other", *pair, **options) for pair in enumerate(other)),
    ]


def verdict_of(*values, **options):
    return tell_verdict(judge_methods(lines_of(*values, **options), ["plain", "other"], "plain"), "plain")


@pytest.mark.parametrize("count", [2, 7, 40])
def test_bootstrap_is_the_percentile_bootstrap_of_scipy(count):
    values = np.random.default_rng(count).normal(1, 2, count)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap(values) == pytest.approx(tuple(theirs), rel=1e-12)
    assert bootstrap([3.0, 3.0]) == (3.0, 3.0)


def test_differences_are_those_of_pairs():
    lines = lines_of([5.0, 9.0, 1.0], [1.0, 6.0])  # the third video of the other method is not finished
    plain, other = judge_methods(lines, ["plain", "other", "none"], "plain")
    assert (other.videos, other.pairs, other.difference, other.lower_in) == (2, 2, -3.5, 1.0)
    assert (other.means["color_distance"], other.reference) == (3.5, 7.0)
    assert (other.low, other.high) == bootstrap([-4.0, -3.0])
    assert plain.difference is None and plain.calls == 1 and plain.means["color_distance"] == 5.0
    assert other.speed == 12


def test_the_verdict_names_the_method_with_the_least_drift_and_its_cost():
    plain = [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    told = verdict_of(plain, [each - 9 for each in plain])
    assert told == (
        "On these weights other drifts least: colors end 3.5 away from the start against 12.5 of plain, 95% interval of the"
        " difference -9.0 to -9.0, 6 videos; no extra calls."
    )
    assert "20% more calls" in verdict_of(plain, [1.0] * 6, calls=12)


@pytest.mark.parametrize(
    "others, options, sentence",
    [
        ([1.0] * (FEWEST - 1), {}, "Too few videos to tell: 5 of each method so far, and 6 are needed."),
        ([], {}, "No pair of videos is finished"),
        ([14.0, 9.0, 14.0, 10.0, 15.0, 12.0], {}, "no method drifts measurably less than plain"),
        ([99.0] * 6, {}, "no method drifts measurably less than plain"),
        ([1.0] * 6, {"motion": 0.5}, "But its videos slow down: motion at the end is 0.50"),
        ([1.0] * 6, {"cuts": 3}, "But its videos leap: 3.0 cuts a video, 0.0 with plain."),
    ],
)
def test_the_verdict_says_what_cannot_be_told_and_what_it_costs(others, options, sentence):
    assert sentence in verdict_of([10.0, 11.0, 12.0, 13.0, 14.0, 15.0], others, **options)


# Folders


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A comparison of two methods on two videos, in one batch each."""
    out = tmp_path_factory.mktemp("made") / "out"
    prompts = out.parent / "prompts.txt"
    prompts.write_text(WORLDS["tiny-world"].examples[0])
    arguments = ["compare", WORLD, "--prompts", str(prompts), *SHORT, "--methods", "plain", "tokentrim_plus"]
    assert main([*arguments, "--out", str(out)]) == 0
    return out, arguments


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "out")


def numbers_of(out):
    return {
        (line["method"], line["prompt_number"], line["seed"]): (line["measures"], line["distances"], line["calls"])
        for line in Results(out).read()
    }


def test_each_video_is_a_file_a_line_and_a_strip_measured_as_drift_does(made):
    out, _ = made
    lines = Results(out).read()
    assert len(lines) == 4 and sorted(path.name for path in out.iterdir()) == sorted(
        [ABOUT, LINES, "videos", "report.html", "methods.csv", "videos.csv", "methods.jsonl"]
    )
    for line in lines:
        frames = list(read_frames(out / line["file"]))
        drift = measure_video("x", iter(frames))
        assert drift.measures() == line["measures"] and len(frames) == line["num_frames"] == 24
        assert drift.distances() == pytest.approx(line["distances"], abs=1e-3)
        assert (out / line["file"]).with_suffix(".jpg").stat().st_size > 1000
        assert (out / line["file"]).with_suffix(".jsonl").read_text().count("\n") == 8
    assert {line["calls"] for line in lines} == {8 * (1 + 1) - 1}  # a step and a commit a chunk, but the last


def test_noise_is_paired_and_depends_on_the_seed_alone(made, tmp_path):
    """Also if the videos are generated one by one, in another order."""
    out, arguments = made
    first = [list(read_frames(out / f"videos/{method}/00-0.mp4"))[0] for method in ("plain", "tokentrim_plus")]
    assert np.array_equal(*first)  # no method acts on the first chunk
    alone = [
        word if word != "2" or arguments[number - 1] != "--batch" else "1" for number, word in enumerate(arguments)
    ]
    assert main([*alone, "--methods", "tokentrim_plus", "--out", str(tmp_path / "out")]) == 0
    ours, theirs = (numbers_of(folder)["tokentrim_plus", 0, 1][1] for folder in (tmp_path / "out", out))
    assert ours == pytest.approx(theirs, abs=0.01)


def test_one_more_method_generates_only_that(made, copied, capsys):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.mp4")}
    numbers = numbers_of(copied)
    assert main([*made[1], "tokentrim", "--out", str(copied)]) == 0
    assert "2 videos to make" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    after = numbers_of(copied)
    assert len(after) == 6 and {key: after[key] for key in numbers} == numbers
    methods = [json.loads(line)["method"] for line in (copied / "methods.jsonl").read_text().splitlines()]
    assert methods == ["plain", "tokentrim_plus", "tokentrim"]


def test_an_interrupted_run_continues_to_the_same_numbers(made, tmp_path, monkeypatch):
    out, arguments = made
    make_batch, calls = Maker.make_batch, []

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            self.generate(batch)  # its files are there, and no line says so
            raise KeyboardInterrupt
        make_batch(self, batch)

    monkeypatch.setattr(Maker, "make_batch", interrupted)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 130
    assert set(numbers_of(tmp_path / "out")) == {("plain", 0, 0), ("plain", 0, 1)}
    assert (
        "of 4 videos" in (tmp_path / "out" / "report.html").read_text()
        or '"planned": 4' in (tmp_path / "out" / "report.html").read_text()
    )
    with (tmp_path / "out" / LINES).open("a") as file:
        file.write('{"method": "tokentrim_plus", "prompt_nu')  # as a kill leaves it
    monkeypatch.undo()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert numbers_of(tmp_path / "out") == numbers_of(out)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--chunks", "9"], "chunks 8, not 9"),
        (["--steps", "2"], "settings"),
        (["--dtype", "bfloat16"], "dtype 'float32', not 'bfloat16'"),
    ],
)
def test_a_folder_of_another_comparison_is_refused(options, sentence, made, copied, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert main([*made[1], *options, "--out", str(copied)]) == 1
    told = capsys.readouterr().err
    assert "holds another comparison" in told and sentence in told
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_folders_of_other_things_are_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        assert main(["compare", WORLD, "--out", str(out)]) == 1
        assert "--out must be a" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_the_model_cannot_do_is_refused_before_anything_is_made(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(
        "methods:\n  plain: {}\n  rolling: {method: plain, rollout: rolling_forcing, layout: memrope}\n"
    )
    out = tmp_path / "out"
    assert main(["compare", WORLD, "--plan", str(tmp_path / "plan.yaml"), "--out", str(out)]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        told.startswith("tokentrim compare: error: This checkpoint cannot do rolling: `layout`") and not out.exists()
    )
    assert main(["compare", WORLD, "--chunks", "6", "--out", str(out)]) == 1
    assert "must make more than 20 frames, but 6 make 18" in capsys.readouterr().err and not out.exists()


def test_a_full_disk_is_one_sentence_and_finished_videos_stay(made, copied, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", str(copied / "videos"))

    numbers = numbers_of(copied)
    monkeypatch.setattr("tokentrim.tools.compare.making.film_strip", full)
    assert main([*made[1][:-2], "tokentrim", "--out", str(copied)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("videos: No space left on device")
    assert numbers_of(copied) == numbers


# Reports


def test_the_report_asks_for_nothing_from_elsewhere(made):
    html = (made[0] / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)[a-z]+:", html) and "http" not in html.replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert "Too few videos to tell: 2 of each method" in html


def test_no_text_of_a_prompt_ends_the_script():
    text = "</script><script>alert(1)</script> /* script */ /* data */"
    html = make_page({"verdict": text})
    assert html.count("</script>") == 2 and "alert(1)</" not in html
    content = re.search(r'id="data">(.*?)</script>', html, flags=re.S)[1]
    assert json.loads(content) == {"verdict": text}


def test_the_leaderboard_ranks_the_lines_of_comparable_folders(made, tmp_path):
    path, other = made[0] / "methods.jsonl", tmp_path / "other.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    other.write_text(
        "".join(json.dumps({**line, "machine": "H200", "drift": line["drift"] + 1}) + "\n" for line in lines)
    )
    board = format_board(read_lines([path, other, path]))
    rows = [line for line in board.splitlines() if line.startswith(("| plain", "| tokentrim_plus"))]
    drifts = [float(row.split(" | ")[1]) for row in rows]
    assert len(rows) == 4 and drifts == sorted(drifts) and board.count("**") == 2
    longer = tmp_path / "longer.jsonl"
    longer.write_text(json.dumps({**lines[0], "chunks": 99}) + "\n")
    assert format_board(read_lines([path, longer])).count("**") == 4
    longer.write_text('{"format": 1}\n')
    with pytest.raises(ValueError, match="line 1 is"):
        read_lines([longer])
