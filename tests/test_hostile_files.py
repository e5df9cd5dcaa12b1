"""Files of strangers: weights, states and checkpoints that lie end in one sentence, in little memory and time."""

import json
import pickle
import resource
import shutil
import struct
import time
import zipfile

import pytest
import torch
from builders import full_pipeline, generators
from originals import original_weights
from safetensors.torch import save_file

from tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_files import run_state
from tokentrim.tools.cli import main
from tokentrim.tools.component_sizes import check_components
from tokentrim.tools.headers import read_header
from tokentrim.tools.original import infer_config, read_original
from tokentrim.tools.publish import publish


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write_header(path, header, num_bytes=24, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_bytes))
    return path


HEADERS = {
    "a gap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [32, 56]}}, 56),
    "an overlap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 36]}}, 36),
    "twice the same bytes": ({"a": GOOD, "b": GOOD}, 24),
    "a late begin": ({"a": {**GOOD, "data_offsets": [8, 32]}}, 32),
    "too few bytes for the shape": ({"a": {**GOOD, "shape": [2, 4]}}, 24),
    "too many bytes for the dtype": ({"a": {**GOOD, "dtype": "F16"}}, 24),
    "bytes behind": ({"a": GOOD}, 25),
    "backwards": ({"a": {**GOOD, "data_offsets": [24, 0]}}, 24),
    "three offsets": ({"a": {**GOOD, "data_offsets": [0, 24, 24]}}, 24),
    "offsets of words": ({"a": {**GOOD, "data_offsets": ["0", "24"]}}, 24),
    "offsets of truth": ({"a": {**GOOD, "shape": [], "dtype": "U8", "data_offsets": [False, True]}}, 1),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 3]}}, 24),
    "an unknown dtype": ({"a": {**GOOD, "dtype": "F4"}}, 24),
    "a dtype of a list": ({"a": {**GOOD, "dtype": ["F32"]}}, 24),
    "a negative side": ({"a": {**GOOD, "shape": [-2, -3]}}, 24),
    "a side of a word": ({"a": {**GOOD, "shape": ["2", 3]}}, 24),
    "a fraction": ({"a": {**GOOD, "shape": [2.0, 3]}}, 24),
    "a side of null": ({"a": {**GOOD, "shape": [None, 3]}}, 24),
    "a huge side": ({"a": {**GOOD, "shape": [2**60, 0], "data_offsets": [0, 0]}}, 0),
    "a thousand sides": ({"a": {**GOOD, "shape": [1] * 1000, "data_offsets": [0, 4]}}, 4),
    "a shape of a word": ({"a": {**GOOD, "shape": "23"}}, 24),
    "a tensor of a number": ({"a": 3}, 24),
    "a list": ([1, 2], 0),
    "a word": ('"x"'.encode(), 0),
    "a deep list": (b"[" * 100_000 + b"]" * 100_000, 0),
    "a number of many digits": (b'{"a": ' + b"9" * 10_000 + b"}", 0),
    "no UTF-8": (b'{"\xff": 1}', 0),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused_in_a_sentence(case, tmp_path):
    header, num_bytes = HEADERS[case]
    path = write_header(tmp_path / "x.safetensors", header, num_bytes)
    with pytest.raises(ValueError, match=r"^`path` must be .*x.safetensors is truncated or something else: ") as error:
        read_header(path)
    assert len(str(error.value)) < 500


def test_a_header_beyond_100_mb_is_refused_before_it_is_read(tmp_path):
    path = write_header(tmp_path / "x.safetensors", b"", 0, 200 * 2**20)
    with path.open("r+b") as file:
        file.truncate(300 * 2**20)  # sparse
    with pytest.raises(ValueError, match="its header has 209715200 bytes, more than 104857600"):
        read_header(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.safetensors", "sub/x.safetensors", "x.pt", ""])
def test_an_index_names_files_beside_it_alone(name, tmp_path):
    (tmp_path / "inside").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    index = tmp_path / "inside" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="`path` must be an index of .safetensors files beside it, but .* names "):
        read_header(index)


# Pickles


def write_zip(path, content, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", content)
        for name, each in members.items():
            archive.writestr(f"x/data/{name.removeprefix('_')}", each)
    return path


def read_in_little_memory(path):
    """The error, with less than 200 MiB more in this process."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match="^`path` must be ") as error:
        read_header(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200 and time.monotonic() - start < 20
    return str(error.value)


def test_a_compressed_pickle_is_refused(tmp_path):
    path = write_zip(
        tmp_path / "x.pt", b"\x80\x04\x8d" + struct.pack("<Q", 2**28) + b"a" * 2**28 + b".", zipfile.ZIP_DEFLATED
    )
    assert path.stat().st_size < 2**20 and "'x/data.pkl' is compressed" in read_in_little_memory(path)


def test_a_compressed_storage_is_refused(tmp_path):
    """It is unpacked where weights are read."""
    torch.save({"model": torch.zeros(2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED)
    assert "is compressed" in read_in_little_memory(tmp_path / "x.pt")


def test_a_pickle_beyond_100_mb_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.pt", bytes(101 * 2**20))
    assert "its pickle has 105906176 bytes" in read_in_little_memory(path)


def grow(function, argument):
    """A pickle that calls a function on its own result many times."""
    return b"\x80\x02" + function + b"q\x00" + argument + b"q\x01" + b"h\x00h\x01\x85R0" * 100_000 + b"N."


@pytest.mark.parametrize("function", [b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"])
def test_functions_of_a_pickle_copy_nothing(function, tmp_path):
    """A list that is copied at every call would take minutes."""
    long_list = b"(" + b"K\x01K\x02\x86" * 100_000 + b"l"
    read_in_little_memory(write_zip(tmp_path / "x.pt", grow(function, long_list)))


class Tensor:
    """Pickled as a tensor whose header says what it is told."""

    def __init__(self, shape, stride, offset=0):
        self.shape, self.stride, self.offset = shape, stride, offset


class Pickler(pickle.Pickler):
    def __init__(self, file, count):
        super().__init__(file, 2)
        self.count = count

    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", self.count) if value is Tensor else None

    def reducer_override(self, value):
        if not isinstance(value, Tensor):
            return NotImplemented
        return torch._utils._rebuild_tensor_v2, (Tensor, value.offset, value.shape, value.stride, False, None)


@pytest.mark.parametrize(
    "tensor, count, num_bytes, message",
    [
        (Tensor((2, 3), (3, 1)), 6, 20, "its storage '0' needs 24 bytes, and has 20"),
        (Tensor((2, 3), (3, 1)), 2**50, 24, "has the shape"),
        (Tensor((2, 4), (4, 1)), 6, 24, "reads value 7 of a storage of 6"),
        (Tensor((2, 3), (3, 1), 1), 6, 24, "reads value 6 of a storage of 6"),
        (Tensor((2, 3), (3, 1), -1), 6, 24, "has the shape"),
        (Tensor((-1, 3), (3, 1)), 6, 24, "has the shape"),
        (Tensor(("2", 3), (3, 1)), 6, 24, "has the shape"),
        (Tensor((2, 3), (3,)), 6, 24, "is damaged"),
    ],
)
def test_a_tensor_of_a_pickle_fits_its_storage(tensor, count, num_bytes, message, tmp_path):
    with (tmp_path / "data.pkl").open("wb") as file:
        Pickler(file, count).dump({"model": {"a": tensor}})
    path = write_zip(tmp_path / "x.pt", (tmp_path / "data.pkl").read_bytes(), _0=bytes(num_bytes))
    assert message in read_in_little_memory(path)


# Sizes

SIZES = {
    "a patch without size": ("patch_embedding.weight", (24, 4, 1, 0, 2)),
    "a huge patch": ("patch_embedding.weight", (24, 4, 1, 2, 2**20)),
    "a huge width": ("patch_embedding.weight", (12 * 2**20, 4, 1, 2, 2)),
    "no channels": ("patch_embedding.weight", (24, 0, 1, 2, 2)),
    "a huge text": ("text_embedding.0.weight", (24, 2**30)),
    "a huge network": ("blocks.0.ffn.0.weight", (2**30, 24)),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_no_model_has_are_refused(case, tmp_path):
    name, shape = SIZES[case]
    torch.save(original_weights(), tmp_path / "x.pt")
    tensors = read_original(tmp_path / "x.pt").tensors
    tensors[name] = tensors[name]._replace(shape=shape)
    with pytest.raises(ValueError, match=r"^`path` must be of .*x.pt has "):
        infer_config(tmp_path / "x.pt", tensors, 12)


def test_a_thousand_blocks_are_refused(tmp_path):
    torch.save(original_weights(), tmp_path / "x.pt")
    tensors = read_original(tmp_path / "x.pt").tensors
    tensors |= {f"blocks.{number}.x": tensors["head.head.weight"] for number in range(1000)}
    with pytest.raises(ValueError, match="`path` must be of a `num_layers` of 1 to 512, but .* has 1000"):
        infer_config(tmp_path / "x.pt", tensors, 12)


@pytest.mark.parametrize("head_dim", [0, -12, "12", None, 12.0])
def test_a_head_that_is_no_size_is_refused(head_dim, tmp_path):
    torch.save(original_weights(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="`attention_head_dim` must be a divisor"):
        infer_config(tmp_path / "x.pt", read_original(tmp_path / "x.pt").tensors, head_dim)


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
def test_configs_of_sizes_that_no_model_has_are_refused_before_anything_is_built(config, values, copied, capsys):
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
def test_links_out_of_a_checkpoint_are_refused(place, copied, tmp_path):
    path, secret = link_to_secret(copied, place)
    path.symlink_to(secret)
    with pytest.raises(ValueError, match=f"`checkpoint` must be a folder of its own files.*{path.name} is a link to"):
        publish("you/world", tmp_path / "hub", copied, license="mit")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("target", ["..", ".", "../vae", "../../private", "missing", "/dev/zero"])
def test_links_that_lead_nowhere_good_are_refused(target, copied, tmp_path):
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


def test_links_out_of_a_base_are_refused(copied, tmp_path, capsys):
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
def test_made_up_states_are_refused_in_a_sentence(case, saved, tmp_path):
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
def test_records_that_are_none_are_refused(text, saved, tmp_path):
    pipe, _, tensors = saved
    (tmp_path / "state-00000002").mkdir()
    (tmp_path / "state-00000002" / "tensors.safetensors").write_bytes(tensors)
    (tmp_path / "state-00000002" / "state.json").write_text(text)
    with pytest.raises(ValueError, match="^`state_dir` must "):
        pipe.resume(tmp_path)
