"""The text of a compiled program -> what one device does in a run of it: matrix products and collectives, each with
how often it runs.

XLA's text has one computation a block and one operation a line. What stands in a loop's body runs as often as the loop
goes round, and loops nest: microbatches hold layers.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line: `%name = shape code(inside), attributes`."""

    name: str
    shape: str
    code: str
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The operations whose results it reads."""
        return re.findall(r"%[\w.-]+", self.inside)

    @property
    def elements(self) -> int:
        """The number of elements of the result, over all parts of a tuple."""
        return sum(count for _, count in _arrays(self.shape))

    @property
    def bytes(self) -> int:
        """The size of the result, over all parts of a tuple."""
        return sum(BYTES.get(kind, 4) * count for kind, count in _arrays(self.shape))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        kind: one of `KINDS`.
        bytes: of the whole array: all parts of what is gathered, scattered or swapped; what is summed or passed on.
        group: the devices that take part together with the first of them.
        times: how often it runs in one run of the program.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product: its FLOPs, two for a multiply-add, and the elements that it reads and writes."""

    flops: int
    elements: int
    times: int


def _arrays(shape: str) -> list[tuple[str, int]]:
    """(type, elements) of the arrays in a shape such as `(f32[2,3]{1,0}, s32[])`."""
    found = re.findall(r"([a-z][a-z0-9]*)\[([0-9,]*)\]", shape)
    return [(kind, math.prod(int(n) for n in lengths.split(",") if n)) for kind, lengths in found]


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise AssertionError(f"brackets do not close: {text[start : start + 80]}")


def _operation(line: str) -> Operation | None:
    name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals or not name.startswith("%"):
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Operation(name, shape, rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :])


def computations(text: str) -> tuple[dict[str, list[Operation]], str]:
    """The operations of each computation by its name, and the name of the one that is the program."""
    found: dict[str, list[Operation]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line)
        if head:
            current = head[2]
            found[current], entry = [], current if head[1] else entry
        elif current and (operation := _operation(line)):
            found[current].append(operation)
    assert entry, "the text is not a program's"
    return found, entry


def trip_count(loop: Operation, found: dict[str, list[Operation]]) -> int:
    """How often a loop goes round: as XLA noted it, else the number that its condition counts up to."""
    noted = re.search(r'"known_trip_count":\{"n":"([0-9]+)"', loop.attributes)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=(%[\w.-]+)", loop.attributes)
    assert condition, loop
    ends = [int(operation.inside) for operation in found[condition[1]] if operation.code == "constant"]
    assert len(ends) == 1, f"a loop whose end is not a number: {loop.name}"
    return ends[0]


def _runs(found: dict[str, list[Operation]], entry: str) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for operation in found[name]:
            rounds = trip_count(operation, found) if operation.code == "while" else 1
            for called in re.findall(r"(?:body|calls|to_apply)=(%[\w.-]+)", operation.attributes):
                visit(called, times * rounds)

    visit(entry, 1)
    return runs


def first_group(attributes: str) -> tuple[int, ...]:
    """The devices of the group that device 0 is in; of pairs, the first one of two devices.

    XLA writes groups as a list `{{0,1},{2,3}}`, as rows of numbers in order `[2,2]<=[4]`, which may be transposed
    `[2,2]<=[2,2]T(1,0)`, or by axes `mesh['data'=2,'tensor'=2] {'tensor'}`, whose devices may be given as such rows.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        ends = re.findall(r"([0-9]+),([0-9]+)", pairs[1])
        return next((tuple(sorted((int(a), int(b)))) for a, b in ends if a != b), (0,))
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    if rows := re.search(r"replica_groups=\[[0-9]+,([0-9]+)\]<=(\S+)", attributes):
        return _numbers(rows[2])[: int(rows[1])]
    axes = re.search(r"replica_groups=@?\w*mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes)
    assert axes, f"groups of an unknown form: {attributes[:200]}"
    split: list[tuple[bool, int]] = []  # whether the group is along this axis, and its size
    for name, size in re.findall(r"'([^']+)'=([0-9]+)", axes[1]):
        part = re.search(rf"'{re.escape(name)}':\(([0-9]+)\)([0-9]+)", axes[3])  # (stride)size of a part of an axis
        before, along = (int(part[1]), int(part[2])) if part else (1, int(size))
        split += [(False, before), (f"'{name}'" in axes[3], along), (False, int(size) // (before * along))]
    order = sorted(range(len(split)), key=lambda axis: split[axis][0])
    places = _along([size for _, size in split], order)[: math.prod(size for along, size in split if along)]
    devices = _numbers(axes[2]) if axes[2] else range(math.prod(size for _, size in split))
    return tuple(sorted(devices[place] for place in places))


def _numbers(text: str) -> tuple[int, ...]:
    """0, 1, ... in the order that `[2,4]T(1,0)` means: as an array of these sizes, with its axes in this order."""
    found = re.match(r"\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text)
    assert found, f"numbers of an unknown form: {text}"
    sizes = [int(n) for n in found[1].split(",")]
    return _along(sizes, [int(n) for n in found[2].split(",")] if found[2] else range(len(sizes)))


def _along(sizes: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The numbers 0, 1, ... as an array of these sizes, read with its axes in another order."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    numbers = [0]
    for axis in order:
        numbers = [number + strides[axis] * place for number in numbers for place in range(sizes[axis])]
    return tuple(numbers)


def _whole(operation: Operation, group: tuple[int, ...]) -> int:
    return operation.bytes * (len(group) if operation.code == "reduce-scatter" else 1)


def _product(operation: Operation, shapes: dict[str, Operation], times: int) -> Product:
    left, right = (shapes[name] for name in operation.operands)
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", operation.attributes)
    lengths = re.search(r"\[([0-9,]*)\]", left.shape)
    assert contracted, operation
    assert lengths, operation
    sizes = [int(n) for n in lengths[1].split(",") if n]
    depth = math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis)
    elements = left.elements + right.elements + operation.elements
    return Product(2 * operation.elements * depth, elements, times)


def read_program(text: str) -> tuple[list[Product], list[Collective]]:
    """The matrix products and the collectives of an optimized program, as one device runs them."""
    found, entry = computations(text)
    products, collectives = [], []
    for name, times in _runs(found, entry).items():
        shapes = {operation.name: operation for operation in found[name]}
        for operation in found[name]:
            if operation.code == "dot":
                products.append(_product(operation, shapes, times))
            if operation.code in KINDS:
                group = first_group(operation.attributes)
                if len(group) > 1:
                    collectives.append(Collective(operation.code, _whole(operation, group), group, times))
    return products, collectives
