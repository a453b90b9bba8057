"""Integer instructions of sm_90's machine code, by name: what they write into a `warp.Warp`.

A value is None if one that it depends on is unknown.
"""

import re
import struct
from collections.abc import Callable
from typing import Any

MASK, SIGN = 0xFFFFFFFF, 0x80000000


def signed(value: int) -> int:
    return value - 2 * SIGN if value & SIGN else value


def known(function: Callable) -> Callable:
    """Make a function of numbers one that returns None if one of them is None."""
    return lambda *values: None if any(value is None for value in values) else function(*values)


def move(warp: Any, kinds: list[str], o: list[str]):
    if "64" in kinds:
        warp.write_pair(o[0], warp.pair(o[1]))
    else:
        warp.write(o[0], warp.read(o[1]))


def special(warp: Any, kinds: list[str], o: list[str]):
    warp.write(o[0], warp.special.get(o[1], 0))


def zero(warp: Any, kinds: list[str], o: list[str]):
    warp.write_pair(o[0], 0 if o[1] == "SRZ" else None)


def multiply(warp: Any, kinds: list[str], o: list[str]):
    a, b = warp.read(o[1]), warp.read(o[2])
    if a is not None and b is not None and "U32" not in kinds and {"WIDE", "HI"} & set(kinds):
        a, b = signed(a & MASK), signed(b & MASK)
    product = 0 if 0 in (a, b) else known(lambda a, b: a * b)(a, b)
    if "WIDE" in kinds:
        warp.write_pair(o[0], known(lambda p, c: (p + c) & (1 << 64) - 1)(product, warp.pair(o[3])))
    elif "HI" in kinds:
        warp.write(o[0], known(lambda p, c: (p + c) >> 32)(product, warp.pair(o[3])))
    else:
        carry = warp.read(o[4]) if "X" in kinds and len(o) > 4 else 0
        warp.write(o[0], known(lambda p, c, carry: p + c + carry)(product, warp.read(o[3]), carry))


def add(warp: Any, kinds: list[str], o: list[str]):
    carries = [operand for operand in o[1:3] if re.fullmatch(r"U?P(\d|T)", operand)]
    terms = o[1 + len(carries) :]
    total = known(lambda *values: sum(values))(*map(warp.read, terms))
    warp.write(o[0], total)
    for carry in carries[:1]:
        warp.write(carry, known(lambda total: total >> 32)(total))


def shift_and_add(warp: Any, kinds: list[str], o: list[str]):
    carries = [operand for operand in o[1:2] if re.fullmatch(r"U?P(\d|T)", operand)]
    a, b, *rest = o[1 + len(carries) :]
    if "HI" not in kinds:
        total = known(lambda a, b, n: ((a << n) & MASK) + b)(warp.read(a), warp.read(b), warp.read(rest[0]))
    else:
        wide = known(lambda a: signed(a & MASK) & (1 << 64) - 1)(warp.read(a))
        if "SX32" not in kinds:
            high, rest = warp.read(rest[0]), rest[1:]
            wide = known(lambda low, high: high << 32 | low)(warp.read(a), high)
        carry = warp.read(rest[1]) if "X" in kinds else 0
        total = known(lambda w, b, n, carry: (w << n >> 32 & MASK) + b + carry)(
            wide, warp.read(b), warp.read(rest[0]), carry
        )
    warp.write(o[0], total)
    for carry in carries:
        warp.write(carry, known(lambda total: total >> 32)(total))


def shift(warp: Any, kinds: list[str], o: list[str]):
    low, n, high = map(warp.read, o[1:4])
    if kinds[0] == "L" and "U64" not in kinds:
        result = known(lambda low, n: 0 if n > 31 else low << n)(low, n)
    elif kinds[0] == "L":
        result = known(lambda low, n, high: ((high << 32 | low) << n) >> 32)(low, n, high)
    elif "HI" in kinds:
        arithmetic = "S32" in kinds or "S64" in kinds
        result = known(lambda n, high: (signed(high & MASK) if arithmetic else high) >> min(n, 63))(n, high)
    else:
        result = known(lambda low, n, high: (high << 32 | low) >> n)(low, n, high)
    warp.write(o[0], result)


def lookup(table: int, a: int, b: int, c: int) -> int:
    found = 0
    for i in range(8):
        if table >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found & MASK


def logic(warp: Any, kinds: list[str], o: list[str]):
    to, operands = (o[:2], o[2:]) if o[0].startswith(("P", "UP")) else (["PT", o[0]], o[1:])
    table = int(operands[3], 16)
    values = [warp.read(operand) for operand in operands[:3]]
    is_zero = table == 0xC0 and 0 in values[:2]  # of an unknown value, too
    result = 0 if is_zero else known(lambda a, b, c: lookup(table, a, b, c))(*values)
    warp.write(to[1], result)
    warp.write(to[0], known(bool)(result))


def logic_of_predicates(warp: Any, kinds: list[str], o: list[str]):
    table = int(o[5], 16)
    values = [known(lambda value: MASK if value else 0)(warp.read(operand)) for operand in o[2:5]]
    warp.write(o[0], known(lambda a, b, c: lookup(table, a, b, c))(*values))
    if o[1] not in ("PT", "UPT"):
        other = int(o[6], 16)
        warp.write(o[1], known(lambda a, b, c: lookup(other, a, b, c))(*values))


COMPARISONS: dict[str, Callable] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b,
}  # fmt: skip


def compare(warp: Any, kinds: list[str], o: list[str]):
    sign = (lambda value: value & MASK) if "U32" in kinds else (lambda value: signed(value & MASK))
    a, b = (known(sign)(warp.read(operand)) for operand in o[2:4])
    found = known(COMPARISONS[kinds[0]])(a, b)
    if "EX" in kinds:  # the upper half of 64 bits; the lower one decides if the halves are equal
        lower = warp.read(o[5])
        found = known(lambda a, b, found, lower: lower if a == b else found)(a, b, found, lower)
    other = warp.read(o[4])
    if "AND" in kinds:
        results = [
            False if False in (f, other) else known(lambda f: f)(f) for f in (found, known(lambda f: not f)(found))
        ]
    else:
        results = [True if True in (f, other) else f for f in (found, known(lambda f: not f)(found))]
    for to, result in zip(o[:2], results, strict=True):
        warp.write(to, result)


def select(warp: Any, kinds: list[str], o: list[str]):
    condition = warp.read(o[3])
    warp.write(o[0], None if condition is None else warp.read(o[1] if condition else o[2]))


def smaller(warp: Any, kinds: list[str], o: list[str]):
    *values, is_least = (warp.read(operand) for operand in o[1:])
    values = [known(lambda value: signed(value & MASK))(value) for value in values]
    if len(values) == 3:  # of a sum and a number
        values = [known(lambda a, b: a + b)(*values[:2]), values[2]]
    warp.write(o[0], known(lambda a, b: min(a, b) if is_least else max(a, b))(*values))


def absolute(warp: Any, kinds: list[str], o: list[str]):
    warp.write(o[0], known(lambda value: abs(signed(value & MASK)))(warp.read(o[1].strip("|"))))


def extend(warp: Any, kinds: list[str], o: list[str]):
    bits = int(o[2], 16)
    value = known(lambda value: value & (1 << bits) - 1)(warp.read(o[1]))
    if "U32" not in kinds:
        value = known(lambda value: value - (1 << bits) if value >> bits - 1 else value)(value)
    warp.write(o[0], value)


def to_float(warp: Any, kinds: list[str], o: list[str]):
    def above(value: int) -> int:
        bits = struct.unpack("I", struct.pack("f", value))[0]
        return bits + (struct.unpack("f", struct.pack("I", bits))[0] < value)

    warp.write(o[0], None if "U64" in kinds else known(above)(warp.read(o[1])))


def of_float(function: Callable[[float], int]) -> Callable:
    def run(warp: Any, kinds: list[str], o: list[str]):
        bits = warp.read(o[1])
        value = None if bits is None or "U64" in kinds else struct.unpack("f", struct.pack("I", bits & MASK))[0]
        warp.write(o[0], known(function)(value))

    return run


def reciprocal(warp: Any, kinds: list[str], o: list[str]):
    invert = of_float(lambda value: struct.unpack("I", struct.pack("f", 1 / value if value else 0.0))[0])
    invert(warp, kinds, o) if kinds[0] == "RCP" else warp.write(o[0], None)


def never(warp: Any, kinds: list[str], o: list[str]):
    warp.write(o[0], False)  # quotients do not take their slow path


def pack(warp: Any, kinds: list[str], o: list[str]):
    bits = [warp.read(f"P{i}") for i in range(7)]
    mask = int(o[3], 16)
    chosen = [bit for i, bit in enumerate(bits) if mask >> i & 1]
    warp.write(o[0], None if None in chosen else sum(bool(bit) << i for i, bit in enumerate(bits) if mask >> i & 1))


def unpack(warp: Any, kinds: list[str], o: list[str]):
    value, mask = warp.read(o[1]), int(o[2], 16)
    for i in range(7):
        if mask >> i & 1:
            warp.write(f"P{i}", known(lambda value, i=i: value >> i & 1)(value))


FUNCTIONS: dict[str, Callable] = {
    "MOV": move, "R2UR": move, "LDC": move, "S2R": special, "S2UR": special, "CS2R": zero, "IMAD": multiply,
    "IADD3": add, "VIADD": add, "LEA": shift_and_add, "SHF": shift, "LOP3": logic, "PLOP3": logic_of_predicates,
    "ISETP": compare, "SEL": select, "VIMNMX": smaller, "VIADDMNMX": smaller, "IABS": absolute, "SGXT": extend,
    "I2F": to_float, "MUFU": reciprocal, "F2I": of_float(lambda value: max(0, int(value))), "FCHK": never, "P2R": pack,
    "R2P": unpack,
}  # fmt: skip
