"""A look at files of torch.save before anything of them is loaded: whatever they ask for, it stays within their size.

torch's restricted loading runs no code, but does what a file says: a few bytes can ask for terabytes, for hours of
hashing nested tuples, or (under FakeTensorMode, which reads no tensor) point at bytes that are not the tensor's.
"""

import io
import pickletools
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import torch

# Names on torch's list of harmless ones that take memory by a number, and that torch.save never calls.
ALLOCATING = ("bytearray", "ndarray", "Tensor", "Storage")
LARGEST_INT_BITS = 4096  # Python refuses to print what is much longer
FREE_UNITS, TEXT_PER_UNIT = 1_000_000, 16
DEEPEST = 200  # levels of a value; printing it must not run out of stack
ZIP_MAGIC, OLD_PICKLES = b"PK\x03\x04", 5
ALIGNMENTS = [str(1 << power).encode() for power in range(21)]
LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name and extra field


class Part(io.RawIOBase):
    """`length` bytes of a file from `offset` on, as a file of its own; no more are there than the file has."""

    def __init__(self, file: IO[bytes], offset: int, length: int):
        """Raises ValueError for a place outside the file."""
        size = file.seek(0, io.SEEK_END)
        if not 0 <= offset <= offset + length <= size:
            raise ValueError(f"{length} bytes at byte {offset} of a file of {size}")
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: bytearray | memoryview, /) -> int:
        self._file.seek(self._offset + self._at)
        count = max(0, min(len(buffer), self._length - self._at))
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass(eq=False, slots=True)
class _Node:
    """A value of a pickle: what it is made of. `cost` counts every mention of a shared part."""

    parts: list["_Node"] = field(default_factory=list)
    cost: int = 1
    value: Any = None
    name: str = ""  # of a global


def read_records(file: IO[bytes], size: int, *, trusted: bool = False) -> dict[int, int]:
    """Place (first byte) -> bytes of every entry in an archive of torch.save, which is checked on the way; none in the
    format before torch 1.6, several pickles in a row.

    `trusted`: pickles may do what they like. Raises ValueError for what is no such archive, is compressed, of another
    byte order, or asks for too much.
    """
    start = file.read(len(ZIP_MAGIC))
    file.seek(0)
    if start != ZIP_MAGIC:
        for _ in range(0 if trusted else OLD_PICKLES):
            check_pickle(file, size)
        file.seek(0)
        return {}
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(entries, size)
            for name in (name.filename for name in entries):
                if name.endswith("/byteorder") and archive.read(name) != b"little":
                    raise ValueError("saved on a machine of another byte order")
                if name.endswith("/.storage_alignment") and archive.read(name) not in ALIGNMENTS:
                    raise ValueError("its .storage_alignment is none")  # torch divides by it
                if name.endswith("/data.pkl") and not trusted:
                    content = archive.read(name)
                    check_pickle(io.BytesIO(content), len(content))
        return dict(_places(file, entries))
    except ValueError:
        raise
    except Exception as error:  # zipfile fails in many ways
        raise ValueError(f"no archive as torch.save writes since torch 1.6: {error}") from error
    finally:
        file.seek(0)


def check_pickle(file: IO[bytes], size: int) -> None:
    """Raise ValueError for a pickle of at most `size` bytes that asks for more than it holds, or changes what it did
    not make. `file` then stands after it.
    """
    machine = _Machine(size)
    try:
        for opcode, argument, _ in pickletools.genops(_Bounded(file, size)):
            machine.step(opcode, argument)
    except (IndexError, KeyError) as error:
        raise ValueError("a pickle that uses what it does not have") from error
    _check_cost(machine.made, size)


def check_places(content: object, records: Mapping[int, int]) -> None:
    """Raise ValueError if a tensor that was loaded under FakeTensorMode is not one entry's bytes, or part of them."""
    for tensor in walk(content):
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None or not tensor.numel():
            continue
        end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        if records.get(start) != storage.nbytes() or (tensor.is_contiguous() and end > storage.nbytes()):
            raise ValueError(f"a tensor of {storage.nbytes()} bytes at byte {start}, where no entry of that size is")


def walk(content: object) -> Iterator[torch.Tensor]:
    """The tensors of nested dicts and lists, in order."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from walk(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from walk(value)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("its entries are compressed, which torch.save does not do")
    if (claimed := sum(entry.file_size for entry in entries)) > size:
        raise ValueError(f"its entries claim {claimed} bytes, the file has {size}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two of its entries have one name")


def _places(file: IO[bytes], entries: list[zipfile.ZipInfo]) -> Iterator[tuple[int, int]]:
    for entry in entries:
        file.seek(entry.header_offset)
        header = file.read(LOCAL_HEADER)
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        yield entry.header_offset + LOCAL_HEADER + skip, entry.file_size


class _Bounded:
    """A file whose reads take memory by what is there, not by what is asked for."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        return self._file.read(max(0, min(count, self._size - self._file.tell())))


class _Machine:
    """Follows the opcodes of a pickle. IndexError, KeyError: it uses what it does not have."""

    def __init__(self, size: int):
        self.size, self.made = size, []
        self._stack: list[_Node] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Node] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: int | float | str | bytes | None) -> None:
        """One opcode."""
        name = opcode.name
        if name == "MARK":
            self._marks.append(len(self._stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self._memo) if argument is None else argument
            if place > self.size:
                raise ValueError(f"a memo of {place} places in {self.size} bytes")
            self._memo[place] = self._take(1)[0]
            self._stack.append(self._memo[place])
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "DUP":
            self._stack += self._take(1) * 2
        elif name in ("BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
            target, *parts = self._arguments(opcode)
            if target.name:
                raise ValueError(f"changes {target.name} itself")
            target.parts += parts
            self._stack.append(target)
        else:
            self._make(opcode, argument)

    def _make(self, opcode: pickletools.OpcodeInfo, argument: int | float | str | bytes | None) -> None:
        taken = self._arguments(opcode)
        node = _Node(taken)
        if isinstance(argument, int):
            if argument.bit_length() > LARGEST_INT_BITS:
                raise ValueError(f"a number of {argument.bit_length()} bits")
            node.value = argument
        elif isinstance(argument, str | bytes):
            node.cost += len(argument) // TEXT_PER_UNIT
            node.value = argument if isinstance(argument, str) else None
        if opcode.name in ("GLOBAL", "INST"):
            node.name = argument.replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            node.name = ".".join(str(part.value) for part in taken)
        elif opcode.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"):
            _check_call(taken)
            node.parts = [*taken, *taken]  # text in hexadecimal is twice as long
        self.made.append(node)
        if opcode.stack_after:
            self._stack.append(node)

    def _arguments(self, opcode: pickletools.OpcodeInfo) -> list[_Node]:
        """The values that an opcode takes from the stack, in order."""
        before = opcode.stack_before
        if pickletools.markobject not in before:
            return self._take(len(before))
        mark = self._marks.pop()
        over = self._stack[mark:]
        del self._stack[mark:]
        return self._take(before.index(pickletools.markobject)) + over

    def _take(self, count: int) -> list[_Node]:
        left = len(self._stack) - count
        if left < (self._marks[-1] if self._marks else 0):
            raise IndexError("too few values")
        taken = self._stack[left:]
        del self._stack[left:]
        return taken


def _check_call(taken: list[_Node]) -> None:
    callee = taken[0].name
    if callee.endswith(ALLOCATING):
        raise ValueError(f"asks for memory by calling {callee}")
    if callee.endswith("._reconstruct") and _largest(taken[1:]) > 0:
        raise ValueError(f"asks for memory by calling {callee} with a size")


def _largest(nodes: list[_Node]) -> int:
    found, seen, rest = 0, set(), list(nodes)
    while rest:
        node = rest.pop()
        if id(node) not in seen:
            seen.add(id(node))
            found = max(found, node.value if isinstance(node.value, int) else 0)
            rest += node.parts
    return found


def _check_cost(made: list[_Node], size: int) -> None:
    """What a walk through the whole value costs, which mentions of shared parts multiply, and how deep it goes."""
    limit, total, depth = FREE_UNITS + 100 * size, {}, defaultdict(lambda: 1)
    for first in made:
        trail = [(first, iter(first.parts))] if id(first) not in total else []
        total.setdefault(id(first), first.cost)
        while trail:
            node, parts = trail[-1]
            part = next(parts, None)
            if part is None:
                trail.pop()
                if trail:
                    above = id(trail[-1][0])
                    total[above] += total[id(node)]
                    depth[above] = max(depth[above], depth[id(node)] + 1)
                if total[id(node)] > limit or depth[id(node)] > DEEPEST:
                    raise ValueError("a value that is nested too deep, or whose shared parts multiply beyond measure")
            elif id(part) in total:  # also one that is still being counted: a loop
                total[id(node)] += total[id(part)]
                depth[id(node)] = max(depth[id(node)], depth[id(part)] + 1)
            elif len(trail) > DEEPEST:
                raise ValueError("a value that is nested too deep")
            else:
                total[id(part)] = part.cost
                trail.append((part, iter(part.parts)))
