"""Files of `torch.save`, read without torch and without running what they say.

Such a file is a pickle, a program that builds objects, and the bytes of its tensors. The pickle is interpreted here by
a machine that knows tensors and plain data and nothing else: it imports no module, calls no function that the file
names and sets no attribute. Everything that could do more is refused by name; of a network that was saved whole, as an
object, only what it says of its weights is kept.
"""

import dataclasses
import functools
import io
import math
import pickletools
import re
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

PICKLE_BYTES = 32 * 2**20  # of the program; that of a network with a thousand tensors has a hundredth of it
MAX_DIMENSIONS, MAX_LENGTH = 32, 2**40
CONVERT = "where you trust it, convert it to safetensors with the library that wrote it"

STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
STORAGE_DTYPES = {
    **{f"torch.{kind}Storage": dtype for kind, dtype in STORAGES.items()},
    **{f"torch.cuda.{kind}Storage": dtype for kind, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": "uint8",
}
# What is newer than these storages is kept in untyped ones, and the tensor names its type.
NEWER_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
TENSOR_DTYPES = {f"torch.{dtype}": dtype for dtype in (*STORAGES.values(), *NEWER_DTYPES)}


class Refused(ValueError):
    """A file that asks for more than tensors and plain data."""


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


@dataclasses.dataclass(frozen=True)
class Region:
    """Bytes of a file, perhaps compressed.

    Attributes:
        file: where.
        start: of the first byte.
        stored: how many bytes the file holds.
        size: how many they are when decompressed.
        deflated: whether they are compressed.
        crc: checksum of the decompressed bytes; 0 where the writer has computed none.
    """

    file: Path
    start: int
    stored: int
    size: int
    deflated: bool = False
    crc: int = 0
    _verified: list = dataclasses.field(default_factory=list, repr=False, compare=False)

    def read(self) -> np.ndarray:
        """The bytes, uint8 `[size]`, mapped where they are not compressed.

        Raises:
            ValueError: they are not those that were written.
        """
        if not self.stored:
            data = np.empty(0, np.uint8)
        else:
            try:
                data = np.memmap(self.file, np.uint8, "r", self.start, (self.stored,)).view(np.ndarray)
            except (OSError, ValueError) as error:  # the file has become shorter, or is gone
                raise ValueError(f"{self.file}: cannot be read any more ({error}); download it again") from error
        if self.deflated:
            try:  # one byte more than there should be tells a bomb, and is all that is unpacked of it
                data = np.frombuffer(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data.data, self.size + 1), np.uint8)
            except zlib.error as error:
                raise ValueError(f"{self.file}: cannot be unpacked ({error}); download it again") from error
        if len(data) != self.size:
            raise ValueError(f"{self.file}: holds other than the {self.size} bytes it announces; download it again")
        if self.crc and not self._verified:
            if zlib.crc32(data.data) != self.crc:
                raise ValueError(f"{self.file}: a checksum does not match: the file is damaged; download it again")
            self._verified.append(True)
        return data


@dataclasses.dataclass(frozen=True)
class Storage:
    """Numbers in one row, which one or several tensors show; `region` is None while it is not known yet."""

    dtype: str
    count: int
    region: Region | None
    big_endian: bool = False

    def read(self, dtype: np.dtype) -> np.ndarray:
        """All of it, as numbers of a type."""
        assert self.region is not None, "a storage is read after its place in the file is known"
        data = self.region.read()
        if self.big_endian:
            part = dtype.itemsize // (2 if dtype.kind == "c" else 1)
            data = data.view(f"u{part}").byteswap().view(np.uint8)
        # Not every byte is a truth value to numpy.
        return data != 0 if dtype.kind == "b" else data.view(dtype)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, read when asked for: `np.asarray(tensor)`.

    Attributes:
        storage: its numbers.
        dtype: of a number.
        shape: of the tensor.
        strides: steps in the storage, in numbers.
        offset: first number.
    """

    storage: Storage
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The numbers, read-only; not copied where the file holds them as they are.

        Raises:
            ValueError: the file is damaged.
        """
        numbers = self.storage.read(self.dtype)
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        # Inside the numbers: see `_tensor`.
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, steps, writeable=False)

    def get_shape(self) -> tuple[int, ...]:
        """Its shape, as a tensor of safetensors that is not read yet tells it."""
        return self.shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.read(), dtype=dtype, copy=copy)


def _tensor(storage: Storage, dtype: str, offset: int, shape: tuple, strides: tuple) -> StoredTensor:
    """A tensor that lies inside its storage, whatever the file says."""
    numbers = (offset, *_tuple(shape), *_tuple(strides))
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {_told(shape)} with strides {_told(strides)} from {_told(offset)}")
    kind = np.dtype(jnp.dtype(dtype))
    count = storage.count * np.dtype(jnp.dtype(storage.dtype)).itemsize // kind.itemsize
    size = math.prod(shape)
    # A step that is never taken may be anything.
    strides = tuple(stride if size and length > 1 else 0 for length, stride in zip(shape, strides, strict=True))
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    inside = last < count if size else offset <= count
    # A tensor with more elements than its storage repeats some; nothing bounds what copying it would take.
    if not inside or size > count or len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_LENGTH:
        raise ValueError(f"a tensor of shape {_told(shape)} reaches beyond the {count} numbers that are stored for it")
    return StoredTensor(storage, kind, shape, strides, offset)


def _tuple(value: Any) -> tuple:
    if type(value) is not tuple:
        raise ValueError(f"{_told(value)} instead of a tuple")
    return value


def _told(value: Any) -> str:
    """For messages: what holds itself many times over, in nests, would take forever to write down."""
    return f"{reprlib.repr(value):.100}"


# ----------------------------------------------------------------------------------------------------------------------
# The machine


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that the pickle mentions, such as a type of numbers; nothing but a name."""

    name: str


@dataclasses.dataclass
class Saved:
    """An object that a pickle describes and that is never made: the name of what would make it, and its attributes."""

    name: str
    attributes: dict = dataclasses.field(default_factory=dict)


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    if metadata:
        raise Refused("holds a tensor that is conjugated or negated when it is read, which is not supported")
    return _tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_newer_tensor(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None):
    if metadata or dtype.name not in TENSOR_DTYPES:
        raise Refused(f"holds a tensor of type {dtype.name!r:.80}, which is not supported")
    return _tensor(storage, TENSOR_DTYPES[dtype.name], offset, shape, strides)


# What stands in for the functions that a pickle calls.
FUNCTIONS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_newer_tensor,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, requires_grad, hooks, state: data,
    "torch.Size": lambda shape: tuple(shape),
    "torch.device": lambda name, *number: ":".join((name, *(f"{index:d}" for index in number))),
    "collections.OrderedDict": lambda pairs=(): dict(_checked(*pair) for pair in pairs),
}
NUMPY_DTYPE = Global("a type of NumPy's numbers")
# What trainers keep beside weights: numbers of NumPy, which come back as None, and the names of callbacks.
FUNCTIONS |= {
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), lambda *arguments: None),
    "numpy.dtype": lambda *arguments: NUMPY_DTYPE,
    "_codecs.encode": lambda text, encoding: b"",
    **dict.fromkeys(("builtins.set", "__builtin__.set"), lambda items=(): list(items)),
}
CALLBACKS = re.compile(r"(pytorch_)?lightning(\.pytorch)?\.callbacks\.[\w.]+")
SCRIPT = "__torch__."  # begins the names of a TorchScript program's own classes
KNOWN = {*FUNCTIONS, *STORAGE_DTYPES, *TENSOR_DTYPES}

VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
PLAIN_KEYS = (str, int, float, bytes, type(None))


def _checked(key: Any, value: Any) -> tuple[Any, Any]:
    """An item of a dictionary; the hash of a nested key could exhaust the stack."""
    if isinstance(key, Global):
        key = key.name
    if not isinstance(key, PLAIN_KEYS):
        raise ValueError(f"a {type(key).__name__} as the key of a dictionary")
    return key, value


def _operations(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Names of a pickle's opcodes and their arguments."""
    for opcode, argument, _ in pickletools.genops(stream):
        yield opcode.name, argument


def _run(stream: BinaryIO, storage: Callable[[tuple], Storage], objects: bool) -> Any:
    """Interprets a pickle; `storage` makes one of what the pickle says of it. The stream is left at its end.

    With `objects`, whatever is neither a tensor nor plain data comes back as `Saved`; without, it is refused.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def top(kind: type) -> Any:
        if objects and type(stack[-1]) is Saved:  # its items, if it is a kind of list or dictionary, are dropped
            return kind()
        if type(stack[-1]) is not kind:
            raise Refused(f"changes a {type(stack[-1]).__name__} as if it were a {kind.__name__}: not plain data")
        return stack[-1]

    def push_global(name: str) -> None:
        if name not in KNOWN and not CALLBACKS.fullmatch(name) and not objects:
            raise Refused(
                f"asks for {name!r:.100}; reading it would run code, and only tensors and plain data are read"
            )
        stack.append(Global(name))

    for opcode, argument in _operations(stream):
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case value if value in VALUES:
                stack.append(argument)
            case constant if constant in CONSTANTS:
                stack.append(CONSTANTS[constant])
            case empty if empty in EMPTY:
                stack.append(EMPTY[empty]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[len(stack) - count :])]
            case "LIST":
                stack.append(since_mark())
            case "DICT":
                items = since_mark()
                stack.append(dict(_checked(*pair) for pair in zip(items[::2], items[1::2], strict=True)))
            case "APPEND":
                item = stack.pop()
                top(list).append(item)
            case "APPENDS":
                items = since_mark()
                top(list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                top(dict).update([_checked(key, value)])
            case "SETITEMS":
                items = since_mark()
                top(dict).update(_checked(*pair) for pair in zip(items[::2], items[1::2], strict=True))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "POP":
                stack.pop()
            case "GLOBAL":
                push_global(argument.replace(" ", "."))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                push_global(".".join((module, name)))
            case "BINPERSID":
                identity = _tuple(stack.pop())
                # Before torch 1.6 a class of a network came with its source.
                stack.append(identity[1] if objects and identity[0] == "module" else storage(identity))
            case "REDUCE":
                arguments, function = _tuple(stack.pop()), stack.pop()
                if isinstance(function, Global) and function.name in FUNCTIONS:
                    stack.append(FUNCTIONS[function.name](*arguments))
                elif objects and isinstance(function, Global):
                    stack.append(Saved(function.name))
                else:
                    raise Refused(f"calls {_told(function)}; reading it would run code")
            case "NEWOBJ" if objects:
                _, kind = stack.pop(), stack.pop()
                stack.append(Saved(kind.name))
            case "BUILD":  # attributes of a state dict, which are versions of its modules, or of a type of numbers
                attributes = stack.pop()
                if type(stack[-1]) is Saved and type(attributes) is dict:
                    stack[-1].attributes.update(attributes)
                elif stack[-1] != NUMPY_DTYPE:
                    top(dict)
            case "STOP":
                return stack.pop()
            case other:
                raise Refused(f"uses the instruction {other} of pickles; reading it would run code")
    raise ValueError("the pickle has no end")


# ----------------------------------------------------------------------------------------------------------------------
# Files

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
PICKLE_BEGIN = b"\x80"
ZIP_BEGIN = b"PK\x03\x04"


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript program, by the names of its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


PARTS = 2**18  # of a network; one whose modules hold one another many times over could have any number
LONGEST_NAME = 1000


def read_torch_module(path: str | Path) -> dict[str, StoredTensor]:
    """The weights and buffers by name of a network that is saved whole: by `torch.save(network)`, or as TorchScript.

    Neither the classes of the file nor torch are needed: nothing of the network is made, and of a TorchScript program
    no code is read. A file of weights by name is read as well, as `read_torch_file` does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds neither.
    """
    found = _read(Path(path), objects=True)
    if not isinstance(found, Saved):
        return found
    try:
        return _weights(found)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: holds a {found.name!r:.80} and no network ({error}); {CONVERT}") from error


def _weights(network: Saved) -> dict[str, StoredTensor]:
    """The tensors of a network's modules, with the names of these before theirs."""
    found: dict[str, StoredTensor] = {}
    left, seen = [("", network)], 0
    while left:
        name, value = left.pop()
        seen += 1
        if isinstance(value, StoredTensor):
            found[name] = value
        elif isinstance(value, Saved):
            parts = _parts(value) if value.name.startswith(SCRIPT) else _parts_of_module(value)
            left += reversed([(f"{name}.{part}" if name else part, held) for part, held in parts.items()])
        if seen + len(left) > PARTS or len(name) > LONGEST_NAME:
            raise ValueError(f"more than {PARTS:,} parts, or modules that hold themselves")
    if not found:
        raise ValueError("no weights")
    return found


def _parts(module: Saved) -> dict[str, Any]:
    """Attributes of a module of a TorchScript program, by name."""
    return {part: held for part, held in module.attributes.items() if type(part) is str}


def _parts_of_module(module: Saved) -> dict[str, Any]:
    """Parameters, buffers that its state dict has, and modules of an `nn.Module`, by name."""
    told = module.attributes
    unsaved = told.get("_non_persistent_buffers_set") or ()
    buffers = {name: tensor for name, tensor in told["_buffers"].items() if name not in unsaved}
    return {**told["_parameters"], **buffers, **told["_modules"]}


def read_torch_file(path: str | Path) -> Any:
    """What `torch.save` has written, with `StoredTensor` for each tensor; for `.pt`, `.pth`, `.bin` and `.ckpt` files.

    Dictionaries come back as dict and parameters as tensors; attributes of dictionaries and gradients' flags are lost.

    Args:
        path: of the file, in the zip format or that of torch before 1.6.

    Returns:
        Nested dicts, lists and tuples of `StoredTensor`s and plain data. Tensors are read from the file, and verified
        by its checksums, when they are asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is a TorchScript program, or asks for more than tensors and plain data.
    """
    return _read(Path(path), objects=False)


def _read(file: Path, *, objects: bool) -> Any:
    """See `read_torch_file` and `_run`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected weights that torch.save has written")
    try:
        with file.open("rb") as stream:
            begin = stream.read(len(ZIP_BEGIN))
            if begin == ZIP_BEGIN:
                return _read_zip(file, stream, objects)
            if begin.startswith(PICKLE_BEGIN):
                return _read_legacy(file, stream, objects)
    except Refused as error:
        raise ValueError(f"{file}: {error}; {CONVERT}") from error
    except OSError as error:  # such as EINVAL, of places before the begin of the file
        raise ValueError(
            f"{file}: cannot be read ({error.strerror or error}): it is damaged, or may not be read; download it again"
        ) from error
    except (
        ArithmeticError,
        AttributeError,
        DeprecationWarning,  # of a text's escapes, where warnings are errors
        EOFError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not a complete file of torch.save ({reason:.200}); download it again") from error
    raise ValueError(
        f"{file}: not a file of torch.save: it begins with neither form that torch writes; expected a .pt, .pth or "
        ".bin file"
    )


def _read_zip(file: Path, stream: BinaryIO, objects: bool) -> Any:
    """An archive NAME with the members NAME/data.pkl, NAME/data/KEY for each storage and NAME/byteorder."""
    archive = zipfile.ZipFile(stream)
    members = {info.filename: info for info in archive.infolist()}
    programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"{len(programs)} members data.pkl, expected one")
    root = programs[0].removesuffix("data.pkl")
    if not objects and f"{root}constants.pkl" in members:
        raise Refused(
            "is a TorchScript program and not a file of weights, as OpenAI's own CLIP downloads are; use the folder of "
            "the Hub with the same weights instead, e.g. openai/clip-vit-large-patch14"
        )

    @functools.cache
    def region(name: str) -> Region:
        return _region(file, stream, members[root + name])

    order = "little"
    if f"{root}byteorder" in members:
        order = region("byteorder").read().tobytes().decode()
        if order not in ("little", "big"):
            raise ValueError(f"byte order {order!r:.40}")

    def storage(identity: tuple) -> Storage:
        dtype, key, count = _identity(identity)
        return _in_region(Storage(dtype, count, region(f"data/{key}"), order == "big"))

    if members[programs[0]].file_size > PICKLE_BYTES:
        raise ValueError(f"a pickle of {members[programs[0]].file_size} bytes")
    return _run(io.BytesIO(region("data.pkl").read().tobytes()), storage, objects)


def _region(file: Path, stream: BinaryIO, info: zipfile.ZipInfo) -> Region:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused(f"is encrypted or compressed in a way that torch does not write ({info.filename!r:.80})")
    stream.seek(info.header_offset)
    header = stream.read(30)  # of the member itself: signature, 22 bytes, lengths of its name and of its extra field
    if not header.startswith(ZIP_BEGIN):
        raise ValueError(f"no member {info.filename!r:.80} where the archive has it")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + info.compress_size > stream.seek(0, io.SEEK_END):
        raise ValueError(f"member {info.filename!r:.80} ends beyond the file")
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return Region(file, start, info.compress_size, info.file_size, deflated, info.CRC)


def _identity(identity: tuple) -> tuple[str, str, int]:
    """Type, key and number of elements of a storage, from what the pickle says of it."""
    word, kind, key, _, count, *view = identity
    dtype = STORAGE_DTYPES[kind.name]
    if word != "storage" or type(key) is not str or type(count) is not int or count < 0 or any(view):
        raise ValueError(f"a storage {_told(identity)}")
    return dtype, key, count


def _in_region(storage: Storage) -> Storage:
    assert storage.region is not None, "a storage is checked after its place in the file is known"
    size = storage.count * jnp.dtype(storage.dtype).itemsize
    if storage.region.size != size:
        raise ValueError(f"{storage.region.size} bytes for a storage of {size}")
    return storage


def _read_legacy(file: Path, stream: BinaryIO, objects: bool) -> Any:
    """Five pickles: magic number, version, machine, object, keys of its storages; then length and numbers of each."""
    seen: dict[str, Storage] = {}

    def announced(identity: tuple) -> Storage:
        dtype, key, count = _identity(identity)
        return seen.setdefault(key, Storage(dtype, count, None))

    def none(identity: tuple) -> Storage:
        raise ValueError("a storage where none belongs")

    stream.seek(0)
    program = io.BytesIO(stream.read(PICKLE_BYTES))
    if _run(program, none, False) != LEGACY_MAGIC:
        raise ValueError("a pickle, but none of torch")
    _run(program, none, False)
    machine = _run(program, none, False)
    begin = program.tell()
    _run(program, announced, objects)
    keys = _run(program, none, False)
    if not all(type(key) is str for key in keys) or sorted(keys) != sorted(seen):
        raise ValueError("the list of storages does not belong to the tensors")
    position, end = program.tell(), file.stat().st_size
    regions = {}
    for key in keys:
        stream.seek(position)
        (count,) = struct.unpack("<q", stream.read(8))
        size = seen[key].count * jnp.dtype(seen[key].dtype).itemsize
        if count != seen[key].count or position + 8 + size > end:
            raise ValueError(f"storage {key!r:.40} is not as long as announced")
        regions[key] = Region(file, position + 8, size, size)
        position += 8 + size
    big_endian = not machine["little_endian"]
    program.seek(begin)
    return _run(
        program,
        lambda identity: dataclasses.replace(
            announced(identity), region=regions[_identity(identity)[1]], big_endian=big_endian
        ),
        objects,
    )
