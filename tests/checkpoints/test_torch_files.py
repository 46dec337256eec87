"""Files of torch.save are read as torch reads them, and run nothing."""

import io
import os
import pickle
import random
import re
import struct
import sys
import types
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from flax_pref.checkpoints.torch_files import StoredTensor, is_torchscript, read_torch_file, read_torch_module
from flax_pref.checkpoints.weights import TorchTensors

HEAD = Path(__file__).parents[3] / "shared" / "data" / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth"

X = torch.arange(24.0).reshape(4, 6) - 3
NEWER = {"uint16": X.abs().to(torch.uint16), "float8": X.to(torch.float8_e4m3fn)}  # not in torch's old format


def content():
    linear = torch.nn.Linear(3, 2)
    dtypes = ["float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "int8", "bool", "complex64"]
    return {
        **{dtype: X.to(getattr(torch, dtype)) for dtype in dtypes},
        "uint8": X.abs().to(torch.uint8),
        "transposed": X.T,
        "part": X[1:, ::2],
        "same storage": X.flatten()[7:],
        "parameter": torch.nn.Parameter(X),
        "scalar": torch.tensor(3.5),
        "a step that is never taken": X.as_strided((1, 3), (2**61, 1), 2),
        "empty": torch.zeros(0, 3),
        "module": linear.state_dict(),  # an OrderedDict with the attribute _metadata
        "plain": {"epoch": 3, "rate": 1e-4, 2: [None, True, ("a", 2**70)], "device": torch.device("cpu")},
        "size": X.shape,
    }


def assert_equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, StoredTensor) and ours.dtype.name == str(theirs.dtype).removeprefix("torch.")
        wide = torch.complex128 if theirs.is_complex() else torch.float64
        assert ours.shape == tuple(theirs.shape)
        np.testing.assert_array_equal(np.asarray(ours).astype(str(wide)[6:]), theirs.detach().to(wide).numpy())
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, torch.device):
        assert ours == str(theirs)
    else:
        assert ours == theirs


def save(value, file, **options):
    torch.save(value, file, **options)
    return file


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_every_kind_of_tensor_is_what_torch_reads(zipped, protocol, tmp_path):
    value = content() | (NEWER if zipped else {})
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    file = save(value, tmp_path / "x.pt", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of other protocols than 2
        theirs = torch.load(file, weights_only=False)
    ours = read_torch_file(file)
    assert_equal(ours, theirs)
    assert not np.asarray(ours["float32"]).flags.writeable


def rezipped(file, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The archive written anew by Python, its members changed."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            if (changed := change(name.split("/", 1)[1], data)) is not None:
                archive.writestr(name, changed)
    return file


def test_compressed_archives_and_those_of_big_endian_machines_are_read(tmp_path):
    file = save({"x": X, "h": X.bfloat16(), "c": X.to(torch.complex64)}, tmp_path / "x.pt")

    def swapped(name, data):
        if name == "byteorder":
            return b"big"
        width = {"data/0": 4, "data/1": 2, "data/2": 4}.get(name)
        return data if width is None else np.frombuffer(data, f"u{width}").byteswap().tobytes()

    ours = read_torch_file(rezipped(file, swapped, zipfile.ZIP_DEFLATED))
    assert_equal(ours, {"x": X, "h": X.bfloat16(), "c": X.to(torch.complex64)})


def test_an_archive_that_torch_wrote_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        file = save({"x": X}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(read_torch_file(file), {"x": X})


@pytest.mark.skipif(not HEAD.is_file(), reason="needs the aesthetic head")
def test_a_published_file_is_what_torch_reads():
    theirs = torch.load(HEAD, map_location="cpu")
    assert_equal(read_torch_file(HEAD), theirs)
    assert len(theirs) == 10


# ----------------------------------------------------------------------------------------------------------------------
# Files that would do something


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


class Stateful:
    def __setstate__(self, state):
        raise AssertionError("called")


def hostile(canary):
    """Pickles, each of which would make the file `canary` when pickle loads it, or reach for what could."""
    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    built = {
        "os.system": Calls(os.system, command),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "getattr": Calls(getattr, "x", "format"),
        "__import__": Calls(__import__, "os"),
        "setstate": Calls(Stateful, state={"a": 1}),
        "numpy reconstruct": np.arange(3),
        "inside a dict": {"state_dict": OrderedDict(a=[Calls(os.system, command)])},
    }
    for name, value in built.items():
        yield name, pickle.dumps(value, 2)
    yield "newobj", b"\x80\x02" + b"cos\n_wrap_close\n)\x81."
    yield "newobj of a tensor's function", b"\x80\x02" + tensor + b")\x81."
    yield "dotted name", b"\x80\x04\x8c\x02os\x8c\x0bpath.os.exec\x93."
    yield "dotted name of what is known", b"\x80\x04\x8c\x05torch\x8c\x17_utils._rebuild_tensor.__globals__\x93."
    yield "inst", f"(S'{command}'\nios\nsystem\n.".encode()
    yield "obj", f"(cos\nsystem\nS'{command}'\no.".encode()
    yield "global", f"cposix\nsystem\n(S'{command}'\ntR.".encode()
    yield "extension", b"\x80\x02\x82\x01."
    yield "build on a function", tensor + b"}S'__code__'\nI1\nsb."
    yield "build with slots", tensor + b"N}S'__defaults__'\n(I1\nts\x86b."
    yield "build on a list", b"]}b."
    yield "call of data", b"S'x'\n)R."
    yield "call of a call", tensor + b")R)R."
    yield "text identity", b"Pstorage\n."


HOSTILE = [name for name, _ in hostile("canary")]


def as_file(program, file, zipped):
    """A file of torch.save whose pickle is `program`."""
    torch.save({"x": X}, file, _use_new_zipfile_serialization=zipped)
    if zipped:
        return rezipped(file, lambda name, data: program if name == "data.pkl" else data)
    data = io.BytesIO(file.read_bytes())
    for _ in range(3):
        pickle.load(data)
    start = data.tell()
    file.write_bytes(data.getvalue()[:start] + program)
    return file


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_would_do_more_than_build_tensors_does_nothing(name, zipped, tmp_path):
    canary = tmp_path / "canary"
    file = as_file(dict(hostile(canary))[name], tmp_path / "x.pt", zipped)
    with pytest.raises(ValueError, match=re.escape(f"{file}: ")) as error:
        read_torch_file(file)
    assert "\n" not in str(error.value)
    try:
        TorchTensors(file, read_torch_module(file))
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
    else:
        raise AssertionError("read as weights")
    assert not canary.exists()


def test_hostile_files_would_have_done_it(tmp_path):
    for name in ("os.system", "eval", "inst", "obj", "global", "inside a dict"):
        canary = tmp_path / name.replace(" ", "_")
        pickle.loads(dict(hostile(canary))[name])
        assert canary.exists(), name


def test_a_refusal_names_what_the_file_asks_for(tmp_path):
    file = as_file(pickle.dumps(Calls(os.system, "x"), 2), tmp_path / "x.pt", True)
    with pytest.raises(ValueError, match=r"x\.pt: asks for 'posix\.system'; reading it would run code"):
        read_torch_file(file)


STORAGE = object()


def claiming(offset, shape, strides, *, kind="FloatStorage", key="0", count=24):
    """A pickle of one tensor that says of itself what it wants."""
    output = io.BytesIO()
    pickler = pickle.Pickler(output, 2)
    pickler.persistent_id = lambda x: ("storage", getattr(torch, kind), key, "cpu", count) if x is STORAGE else None
    pickler.dump(Calls(torch._utils._rebuild_tensor_v2, STORAGE, offset, shape, strides, False, OrderedDict()))
    return output.getvalue()


@pytest.mark.parametrize(
    "claim",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**62},
        {"offset": 2**70},
        {"shape": (5, 6)},
        {"shape": (4, -6)},
        {"shape": (2**40,), "strides": (0,)},
        {"strides": (6, 2)},
        {"strides": (-6, 1)},
        {"strides": (2**61, 1)},
        {"strides": (6,)},
        {"shape": (0, 2**62), "strides": (1, 1)},
        {"shape": (0,), "strides": (1,), "offset": 25},
        {"strides": (6.0, 1.0)},
        {"shape": [4, 6]},
        {"shape": (1,) * 65, "strides": (1,) * 65},
        {"kind": "DoubleStorage"},
        {"count": 25},
        {"count": -24},
        {"count": "24"},
        {"key": "1"},
        {"key": "../0"},
        {"key": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_tensor_never_reaches_beyond_its_storage(claim, zipped, tmp_path):
    usual = {"offset": 0, "shape": (4, 6), "strides": (6, 1)}
    for claims, right in ((usual, True), (usual | claim, False)):
        file = as_file(claiming(**claims), tmp_path / "x.pt", zipped)
        if not zipped:
            with file.open("ab") as end:
                end.write(pickle.dumps([claims.get("key", "0")], 2) + struct.pack("<q", 24) + X.numpy().tobytes())
        if right:
            assert_equal(read_torch_file(file), X)
        elif not zipped and "key" in claim and isinstance(claim["key"], str):
            assert_equal(read_torch_file(file), X)  # there a key is a name and no more
        else:
            with pytest.raises(ValueError, match=re.escape(f"{file}: ")) as error:
                read_torch_file(file)
            assert "\n" not in str(error.value)


def laughs():
    """A tuple that takes 2^60 words to write down."""
    nest = ()
    for _ in range(60):
        nest = (nest, nest)
    return nest


NEST = b")" + b"q\x00h\x00\x86" * 60
BOMBS = {
    "laughs as a shape": claiming(0, laughs(), (6, 1)),
    "laughs as a device": b"ctorch\ndevice\n" + NEST + b"\x85R.",
    "laughs as a name": NEST + b"\x8c\x01x\x93.",
    "laughs as a function": NEST + b")R.",
    "laughs as a storage": NEST + b"Q.",
    "a long pickle": b"N0" * 17 * 2**20 + b"N.",
    "a far place in the memo": b"Nr\xff\xff\xff\x7f.",
    "a nest as a key": b"}" + b")" + b"\x85" * 10**5 + b"Ns.",
    "a text that is not there": b"\x8d" + struct.pack("<Q", 2**60) + b".",
    "a stack that is empty": b"0.",
    "no end": b"N",
    "no mark": b"t.",
    "a number of too many digits": b"I" + b"9" * 10**5 + b"\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_does_not_go_off(name, tmp_path):
    file = as_file(BOMBS[name], tmp_path / "x.pt", True)
    if name == "a far place in the memo":  # an index and not a size: harmless
        assert read_torch_file(file) is None
        return
    with pytest.raises(ValueError, match=re.escape(f"{file}: ")) as error:
        read_torch_file(file)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize("bomb", [True, False])
def test_a_compressed_storage_that_is_not_what_it_says_is_refused(bomb, tmp_path):
    file = rezipped(save({"x": X}, tmp_path / "x.pt"), compression=zipfile.ZIP_DEFLATED)
    large = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    other = large.compress(bytes(2**24)) + large.flush() if bomb else b"\xff" * 200
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("x/data/0")
    start = info.header_offset + 30 + len(info.filename)
    data = bytearray(file.read_bytes())
    data[start : start + info.compress_size] = other[: info.compress_size]
    file.write_bytes(data)
    with pytest.raises(ValueError, match="other than the 96 bytes" if bomb else "cannot be unpacked"):
        np.asarray(read_torch_file(file)["x"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_damaged_file_says_so_in_one_line_or_is_read_right(zipped, tmp_path):
    value = {"x": X, "y": {"z": X.T.half()}, "n": [1, 2.5, "text"]}
    whole = save(value, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped).read_bytes()
    file, rng = tmp_path / "x.pt", random.Random(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[rng.randrange(len(whole)) :]
        elif trial % 3 == 1:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(whole))
            damaged[start : start + 16] = rng.randbytes(16)
        file.write_bytes(damaged)
        try:
            ours = read_torch_module(file) if trial % 2 else read_torch_file(file)
            arrays = [np.asarray(ours["x"]), np.asarray(ours["y"]["z"])]
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            refused += 1
        except (KeyError, TypeError):  # other names: what the pickle now says
            assert not zipped
        else:
            if zipped:  # whose checksums cover everything but paddings
                np.testing.assert_array_equal(arrays[0], X.numpy())
                np.testing.assert_array_equal(arrays[1], X.T.half().numpy())
    assert refused > 100


def test_members_before_the_begin_of_the_file_are_named_with_the_file(tmp_path):
    """The directory of an archive says where its members are; the system refuses to go there with EINVAL."""
    file = save({"x": X}, tmp_path / "weights.pt")
    rezipped(file)  # torch has a second directory for large files
    data = bytearray(file.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    (start,) = struct.unpack_from("<I", data, end + 16)
    struct.pack_into("<I", data, end + 16, start + 2**16)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: cannot be read \(Invalid argument\)"):
        read_torch_file(file)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    file = save({"x": torch.zeros(100_000)}, tmp_path / "weights.pt")
    tensors = read_torch_file(file)
    os.truncate(file, 1000)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: "):
        tensors["x"].read()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "begins with neither form"),
        (b"\x80\x02}.", "a pickle, but none of torch"),
        (b"PK\x03\x04rest", "not a complete file"),
    ],
    ids=["empty", "a pickle", "no archive"],
)
def test_other_files_are_told_apart(data, expected, tmp_path):
    file = tmp_path / "x.pt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=expected):
        read_torch_file(file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_torch_file(tmp_path / "missing.pt")


def test_a_torchscript_program_is_refused_with_what_to_use_instead(tmp_path):
    file = tmp_path / "ViT-L-14.pt"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"ViT-L-14/{name}", b"\x80\x02}.")
    with pytest.raises(ValueError, match=r"TorchScript.*openai/clip-vit-large-patch14"):
        read_torch_file(file)


MODULE = b"c__torch__\nM\n)\x81"  # an object of a program's own class
SCRIPTS = {
    "an object of a class of another module": b"\x80\x02cos\n_wrap_close\n)\x81}b.",
    "an object that is made of arguments": b"\x80\x02c__torch__\nM\nN\x85\x81}b.",
    "a call of a class": b"\x80\x02c__torch__\nM\n)R.",
    "an object that restores itself": b"\x80\x02" + MODULE + b"K\x01b.",
    "a module that holds itself": b"\x80\x02" + MODULE + b"q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "modules that hold one another many times over": b"\x80\x02"
    + MODULE
    + b"q\x00"
    + b"0".join(MODULE + b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00" for _ in range(60))
    + b".",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_torchscript_program_that_is_more_than_modules_with_tensors_is_refused(name, tmp_path):
    file = as_file(SCRIPTS[name], tmp_path / "x.pt", True)
    with pytest.raises(ValueError, match=re.escape(f"{file}: ")) as error:
        TorchTensors(file, read_torch_module(file))
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=re.escape(f"{file}: ")):
        read_torch_file(file)


def test_the_weights_of_a_torchscript_program_are_those_of_its_state_dict(tmp_path):
    class Part(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(X.clone())
            self.register_buffer("mean", torch.arange(3.0))
            self.count = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.count

    whole = torch.nn.Sequential(OrderedDict(first=Part(), second=torch.nn.Sequential(Part())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(whole).save(tmp_path / "x.pt")
    torch.save({"x": X}, tmp_path / "no.pt")
    assert is_torchscript(tmp_path / "x.pt") and not is_torchscript(tmp_path / "no.pt")
    assert not is_torchscript(tmp_path / "missing.pt")
    found = read_torch_module(tmp_path / "x.pt")
    assert found.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(found[name].read(), value.numpy())


def test_what_a_trainer_keeps_beside_weights_does_not_keep_them_from_being_read(tmp_path, monkeypatch):
    """As in the checkpoints that Stable Diffusion was released with: callbacks by their class, scores of NumPy."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks"))
    monkeypatch.setitem(sys.modules, name, module)
    state = {"monitor": "loss", "best_model_score": np.float64(0.5), "current_score": torch.tensor(0.5)}
    saved = {"state_dict": {"w": torch.ones(2)}, "callbacks": {module.ModelCheckpoint: state}, "epoch": 3}
    torch.save(saved, tmp_path / "v1.ckpt")
    read = read_torch_file(tmp_path / "v1.ckpt")
    np.testing.assert_array_equal(np.asarray(read["state_dict"]["w"]), [1, 1])
    assert read["callbacks"][f"{name}.ModelCheckpoint"]["monitor"] == "loss" and read["epoch"] == 3


def test_a_callback_that_is_called_is_refused(tmp_path):
    pickle_of = b"\x80\x02cpytorch_lightning.callbacks.base\nCallback\n)R."
    (tmp_path / "x.pt").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle_of)
    with pytest.raises(ValueError, match=r"calls .*Callback.*; reading it would run code"):
        read_torch_file(tmp_path / "x.pt")


class Layers(torch.nn.Module):
    """Two layers of which one has no bias, a shared one, and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(2, 3, bias=False)
        self.rest = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.GELU())
        self.again = self.first
        self.nothing = None
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("lost", torch.arange(3.0), persistent=False)
        self.function, self.kind = torch.nn.functional.gelu, torch.float16


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_network_that_is_saved_whole_is_read_as_its_state_dict(zipped, tmp_path):
    module = Layers().half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the old format, which keeps the source
        file = save(module, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    ours, theirs = read_torch_module(file), module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), tensor.numpy())
    with pytest.raises(ValueError, match=r"asks for .*only tensors and plain data are read"):
        read_torch_file(file)


def test_weights_by_name_are_read_as_a_network_too(tmp_path):
    read = read_torch_module(save({"w": X}, tmp_path / "weights.pt"))
    np.testing.assert_array_equal(np.asarray(read["w"]), X.numpy())


def in_itself():
    module = torch.nn.Sequential()
    module._modules["0"] = module
    return module


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (types.SimpleNamespace(a=1), "holds a 'types.SimpleNamespace' and no network"),
        (torch.nn.Sequential(torch.nn.GELU()), "and no network \\(no weights\\)"),
        (in_itself(), "modules that hold themselves"),
    ],
)
def test_an_object_that_is_no_network_is_refused_in_one_line(saved, message, tmp_path):
    file = save(saved, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message) as error:
        read_torch_module(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
