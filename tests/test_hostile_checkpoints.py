"""Checkpoints and states of strangers that lie end in one sentence: sizes, links, records."""

import json
import shutil
import time

import pytest
import torch
from builders import full_pipeline, generators
from originals import original_weights

from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_files import run_state
from tokentrim.tools.cli import main
from tokentrim.tools.component_sizes import check_components
from tokentrim.tools.publish import publish


# Sizes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    full_pipeline(window_size=6, method="plain").save_pretrained(folder)
    return folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copied")


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "config, values",
    [
        ("transformer", {"num_layers": 10**9}),
        ("transformer", {"num_attention_heads": 10**12}),
        ("transformer", {"rope_max_seq_len": 10**12}),
        ("text_encoder", {"num_layers": 10**9}),
        ("text_encoder", {"d_ff": -(10**12)}),
        ("vae", {"dim_mult": [1] * 10**6}),
        ("vae", {"base_dim": 10**10}),
        ("scheduler", {"num_train_timesteps": 10**12}),
    ],
)
def test_absurd_sizes_raise_before_anything_is_built(config, values, copied, capsys):
    name = "scheduler_config.json" if config == "scheduler" else "config.json"
    check_components("checkpoint", copied)
    change_json(copied / config / name, **values)
    start = time.monotonic()
    assert main(["doctor", str(copied)]) == 1
    assert "`checkpoint` must be " in capsys.readouterr().err and time.monotonic() - start < 5


@pytest.mark.parametrize(
    "settings",
    [
        {"num_inference_steps": 10**9},
        {"height": 10**9},
        {"num_frames_per_chunk": 10**9},
        {"window_size": 10**12},
        {"max_sequence_length": 10**9},
        {"layout": {"infinity_rope": {"window_size": 10**12}}},
    ],
)
def test_settings_of_a_checkpoint_have_limits(settings, copied):
    change_json(copied / "model_index.json", **settings)
    with pytest.raises(ValueError, match="must be at most .*, to travel with a checkpoint, but is 10{9}"):
        TokenTrimPipeline.from_pretrained(copied)


# Links


def link_to_secret(folder, place):
    secret = folder.parent / "private" / "key"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("SECRET")
    path = folder / place
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    return path, secret


@pytest.mark.parametrize("place", ["vae/notes.txt", "README.md", "vae/config.json", ".hidden/x", "new/x.txt"])
def test_links_out_of_a_checkpoint_raise(place, copied, tmp_path):
    path, secret = link_to_secret(copied, place)
    path.symlink_to(secret)
    with pytest.raises(ValueError, match=f"`checkpoint` must be a folder of its own files.*{path.name} is a link to"):
        publish("you/world", tmp_path / "hub", copied, license="mit")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("target", ["..", ".", "../vae", "../../private", "missing", "/dev/zero"])
def test_broken_links_raise(target, copied, tmp_path):
    (tmp_path / "private").mkdir()
    (copied / "vae" / "link").symlink_to(target)
    with pytest.raises(ValueError, match="link is a link to"):
        publish("you/world", tmp_path / "hub", copied, license="mit")


def test_links_inside_a_checkpoint_and_its_cache_are_followed(checkpoint, tmp_path):
    """The Hub's cache has links to a store of files alone."""
    snapshot = tmp_path / "models--you--world" / "snapshots" / "0123"
    blobs = tmp_path / "models--you--world" / "blobs"
    shutil.copytree(checkpoint, snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))
    (snapshot / "vae" / "inside.json").symlink_to("config.json")
    publish("you/world", tmp_path / "hub", snapshot, license="mit")
    assert not any(path.is_symlink() for path in (tmp_path / "hub").rglob("*"))
    name = "vae/config.json"
    assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "hub/vae/inside.json").read_bytes()
    assert json.loads((tmp_path / "hub" / name).read_text()) == json.loads((checkpoint / name).read_text())


def test_links_out_of_a_base_raise(copied, tmp_path, capsys):
    path, secret = link_to_secret(copied, "vae/notes.txt")
    path.symlink_to(secret)
    torch.save(original_weights(), tmp_path / "x.pt")
    arguments = ["convert", tmp_path / "x.pt", "--base", copied, "--out", tmp_path / "out", "--preset", "self_forcing"]
    assert main(list(map(str, arguments))) == 1
    assert "`base` must be a folder of its own files" in capsys.readouterr().err and not (tmp_path / "out").exists()


# States


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state of a run, as record and tensors."""
    folder = tmp_path_factory.mktemp("run")
    pipe = full_pipeline(window_size=6, method="tokentrim")
    call = {"num_frames": 33, "height": 32, "width": 48, "num_inference_steps": 1, "generator": generators(0)}
    with pipe.stream("a red circle", **call, state_dir=folder, save_every=1) as stream:
        next(stream), next(stream), stream.save_state()
    (state,) = folder.glob("state-*")
    return pipe, json.loads((state / "state.json").read_text()), (state / "tensors.safetensors").read_bytes()


def find(value, key):
    """The pairs [key, value] of a name, wherever they are."""
    if isinstance(value, list) and len(value) == 2 and value[0] == key:
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from find(each, key)


def setting(key, value):
    def change(plain):
        for pair in find(plain, key):
            pair[1] = value

    return change


def replacing(old, new):
    return lambda plain: json.loads(json.dumps(plain).replace(old, new))


def without(key):
    def change(plain):
        plain["dict"] = [item for item in plain["dict"] if item[0] != key]

    return change


STATES = {
    **{f"no {key}": without(key) for key in ("run", "call", "settings", "weights")},
    **{
        f"{key} is a word": setting(key, "x") for key in ("run", "index", "backbone", "policies", "generators", "book")
    },
    **{f"{key} is null": setting(key, None) for key in ("run", "num_drawn", "noise", "in_flight", "prompt", "frames")},
    **{f"{key} is an empty list": setting(key, []) for key in ("policies", "shape", "prompt", "book")},
    "a negative index": setting("index", -3),
    "an index beyond the end": setting("index", 10**6),
    "an index of truth": setting("index", True),
    "draws beyond": setting("num_drawn", 10**9),
    "another device": replacing('"device": "cpu"', '"device": "nowhere"'),
    "a device that is missing": replacing('"device": "cpu"', '"device": "cuda"'),
    "a missing tensor": replacing('"tensor": "000001"', '"tensor": "999999"'),
    "another tensor": replacing('"tensor": "000001"', '"tensor": "000000"'),
    "a list": lambda plain: [1, 2],
    "a number": lambda plain: 7,
    "null": lambda plain: {"dict": None},
    "pairs of one": lambda plain: {"dict": [[1]]},
    "keys that are lists": lambda plain: {"dict": [[[1], 2]]},
}


@pytest.mark.parametrize("case", STATES)
def test_made_up_states_raise_a_sentence(case, saved, tmp_path):
    """Their sums are right, as a stranger would make them."""
    pipe, record, tensors = saved
    plain = json.loads(json.dumps(record["state"]))
    plain = STATES[case](plain) or plain
    folder = tmp_path / "state-00000002"
    folder.mkdir()
    (folder / "tensors.safetensors").write_bytes(tensors)
    sums = [run_state._sha256(json.dumps(plain).encode()), run_state._sha256_of_file(folder / "tensors.safetensors")]
    (folder / "state.json").write_text(json.dumps({**record, "sha256": sums, "state": plain}))
    with (
        pytest.raises(ValueError, match="^`(state_dir|state|[a-z_]+)` must be ") as error,
        pipe.resume(tmp_path) as stream,
    ):
        next(stream)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        "7",
        '"x"',
        "[" * 100_000 + "]" * 100_000,
        '{"version": 1}',
        '{"version": [1], "state": 1}',
        "\0",
    ],
    ids=lambda text: text[:12],
)
def test_invalid_records_raise(text, saved, tmp_path):
    pipe, _, tensors = saved
    (tmp_path / "state-00000002").mkdir()
    (tmp_path / "state-00000002" / "tensors.safetensors").write_bytes(tensors)
    (tmp_path / "state-00000002" / "state.json").write_text(text)
    with pytest.raises(ValueError, match="^`state_dir` must "):
        pipe.resume(tmp_path)
