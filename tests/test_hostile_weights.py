"""Weights of strangers: headers and pickles that lie end in one sentence, in little memory and time."""

import json
import pickle
import resource
import struct
import time
import zipfile

import pytest
import torch
from originals import original_weights
from safetensors.torch import save_file

from tokentrim.tools.headers import read_header
from tokentrim.tools.original import infer_config, read_original


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
def test_false_headers_raise_a_sentence(case, tmp_path):
    header, num_bytes = HEADERS[case]
    path = write_header(tmp_path / "x.safetensors", header, num_bytes)
    with pytest.raises(ValueError, match=r"^`path` must be .*x.safetensors is truncated or something else: ") as error:
        read_header(path)
    assert len(str(error.value)) < 500


def test_header_beyond_100_mb_raises_before_reading(tmp_path):
    path = write_header(tmp_path / "x.safetensors", b"", 0, 200 * 2**20)
    with path.open("r+b") as file:
        file.truncate(300 * 2**20)  # sparse
    with pytest.raises(ValueError, match="its header has 209715200 bytes, more than 104857600"):
        read_header(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.safetensors", "sub/x.safetensors", "x.pt", ""])
def test_index_may_only_name_files_beside_it(name, tmp_path):
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


def test_compressed_pickle_raises(tmp_path):
    path = write_zip(
        tmp_path / "x.pt", b"\x80\x04\x8d" + struct.pack("<Q", 2**28) + b"a" * 2**28 + b".", zipfile.ZIP_DEFLATED
    )
    assert path.stat().st_size < 2**20 and "'x/data.pkl' is compressed" in read_in_little_memory(path)


def test_compressed_storage_raises(tmp_path):
    """It is unpacked where weights are read."""
    torch.save({"model": torch.zeros(2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED)
    assert "is compressed" in read_in_little_memory(tmp_path / "x.pt")


def test_pickle_beyond_100_mb_raises(tmp_path):
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
    """Pickled as a tensor whose header says the given values."""

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
def test_tensor_beyond_its_storage_raises(tensor, count, num_bytes, message, tmp_path):
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
def test_absurd_sizes_raise(case, tmp_path):
    name, shape = SIZES[case]
    torch.save(original_weights(), tmp_path / "x.pt")
    tensors = read_original(tmp_path / "x.pt").tensors
    tensors[name] = tensors[name]._replace(shape=shape)
    with pytest.raises(ValueError, match=r"^`path` must be of .*x.pt has "):
        infer_config(tmp_path / "x.pt", tensors, 12)


def test_a_thousand_blocks_raise(tmp_path):
    torch.save(original_weights(), tmp_path / "x.pt")
    tensors = read_original(tmp_path / "x.pt").tensors
    tensors |= {f"blocks.{number}.x": tensors["head.head.weight"] for number in range(1000)}
    with pytest.raises(ValueError, match="`path` must be of a `num_layers` of 1 to 512, but .* has 1000"):
        infer_config(tmp_path / "x.pt", tensors, 12)


@pytest.mark.parametrize("head_dim", [0, -12, "12", None, 12.0])
def test_invalid_head_size_raises(head_dim, tmp_path):
    torch.save(original_weights(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="`attention_head_dim` must be a divisor"):
        infer_config(tmp_path / "x.pt", read_original(tmp_path / "x.pt").tensors, head_dim)
