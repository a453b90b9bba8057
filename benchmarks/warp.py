"""A warp's walk through a kernel's machine code: how many instructions it issues, and how long one warp alone takes.

The integers that loops count by are computed as the GPU does, for the first lane; what comes from memory is unknown. So
trips of loops need no table. A branch by an unknown condition is not taken, and an unknown loop is an error.

`cycles` is the time of a warp that has a scheduler for itself: instructions in order, each a cycle after the one before
and not before its operands are there. Latencies are rounded; loads from small tensors find them in the first cache.
"""

import re
import struct
from collections.abc import Container
from typing import Any, NamedTuple

from seemore_fast.benchmarks.warp_integers import FUNCTIONS, MASK

PARAMETERS = 0x210  # where a kernel's parameters begin in constant bank 0 of sm_90
MOST = 5_000_000  # instructions; more are an endless loop
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+) )?\s*([\w.]+)(.*?);")
OPERANDS = re.compile(r",\s*(?![^\[\]]*\])")
SMALL = 2**16  # bytes of a tensor that stays in the first cache
LATENCIES = {
    "LDG": 500,
    "small LDG": 40,
    "LDS": 30,
    "LDSM": 33,
    "SHFL": 25,
    "MUFU": 20,
    "HMMA": 33,
    "S2R": 20,
    "S2UR": 20,
    "LDC": 30,
}
LATENCIES |= {"F2F": 20, "F2I": 20, "I2F": 20, "DADD": 16, "DMUL": 16, "DFMA": 16, "LDGSTS": 500, "ULDC": 10}
BARRIER, USUAL = 30, 5


class Instruction(NamedTuple):
    guard: tuple[bool, str] | None  # whether it is negated, and the predicate
    name: str
    kinds: list[str]  # what follows the name: U32, HI, X
    operands: list[str]


class Walked(NamedTuple):
    instructions: int
    cycles: int


def decode(sass: str) -> tuple[dict[int, Instruction], list[int]]:
    """Return the instructions of one function by address, and the addresses in order."""
    found = {}
    for address, negated, predicate, name, rest in LINE.findall(sass):
        name, *kinds = name.split(".")
        operands = [part.replace(".reuse", "").strip() for part in OPERANDS.split(rest.strip()) if part.strip()]
        guard = (bool(negated), predicate) if predicate else None
        found[int(address, 16)] = Instruction(guard, name, kinds, operands)
    return found, sorted(found)


def parameters(signature: list[str], values: list[Any]) -> dict[int, int]:
    """Return a kernel's parameters as words of constant memory by offset; a pointer is 2^33 times its place, from 1."""
    words, offset = {}, PARAMETERS
    for number, (kind, value) in enumerate(zip(signature, values, strict=True)):
        size = 8 if kind.startswith("*") or kind.endswith("64") else 4
        offset = -(-offset // size) * size
        if kind.startswith("*"):
            value = (number + 1) << 33
        elif kind.startswith("fp"):
            value = struct.unpack("I", struct.pack("f", value))[0]
        for word in range(size // 4):
            words[offset + 4 * word] = int(value) >> 32 * word & MASK
        offset += size
    return words


class Warp:
    """The state of a warp: registers and predicates by name, None if unknown, and when each of them is there."""

    def __init__(
        self,
        code: tuple[dict[int, Instruction], list[int]],
        words: dict[int, int],
        block: int,
        thread: int = 0,
        small: Container[int] = (),  # places of the parameters that are small tensors, from 1
    ):
        self.code, self.order = code
        self.small = small
        self.words, self.special = words, {"SR_CTAID.X": block, "SR_TID.X": thread, "SR_LANEID": thread % 32}
        self.values: dict[str, Any] = {}
        self.ready: dict[str, int] = {}
        self.now, self.count = 0, 0
        self.copies, self.groups = [0], []  # when asynchronous copies, and groups of them, are there

    # Reading and writing

    def read(self, operand: str) -> Any:
        if operand.startswith(("-", "~")):
            value = self.read(operand[1:])
            return None if value is None else (~value & MASK) + (operand[0] == "-")
        if operand.startswith("!"):
            value = self.read(operand[1:])
            return None if value is None else not value
        if operand.startswith("|"):
            return None
        if operand in ("RZ", "URZ", "SRZ"):
            return 0
        if operand in ("PT", "UPT"):
            return True
        if operand.startswith("c["):
            bank = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand)
            return self.words.get(int(bank[1], 16)) if bank else None
        if re.fullmatch(r"0x[0-9a-f]+", operand):
            return int(operand, 16)
        return self.values.get(operand.split(".")[0])

    def pair(self, operand: str) -> int | None:
        """Return 64 bits: of two registers, or of constant memory."""
        if operand in ("RZ", "URZ", "SRZ"):
            return 0
        if operand.startswith("0x"):
            return int(operand, 16)
        low, high = self.read(operand), self.read(beside(operand))
        return None if low is None or high is None else high << 32 | low

    def write(self, operand: str, value: Any):
        if operand.startswith(("P", "UP")) and operand not in ("PT", "UPT"):
            self.values[operand] = None if value is None else bool(value)
        elif operand.startswith(("R", "UR")) and operand not in ("RZ", "URZ"):
            self.values[operand] = None if value is None else int(value) & MASK

    def write_pair(self, operand: str, value: int | None):
        self.write(operand, value)
        self.write(beside(operand), None if value is None else value >> 32)

    # Running

    def run(self) -> Walked:
        at, position, calls = 0, {address: i for i, address in enumerate(self.order)}, []
        while True:
            address = self.order[at]
            instruction = self.code[address]
            self.count += 1
            if self.count > MOST:
                raise RuntimeError("a warp does not come to an end")
            taken: bool | None = True
            if instruction.guard:
                negated, predicate = instruction.guard
                value = self.read(predicate)
                taken = None if value is None else value != negated
            self._wait(instruction)
            at += 1
            name = instruction.name
            if name == "EXIT" and taken:
                return Walked(self.count, self.now)
            if name in ("BRA", "CALL"):
                target = int(instruction.operands[-1], 16)
                for operand in instruction.operands[:-1]:
                    other = self.read(operand)
                    taken = None if taken is None or other is None else taken and other
                if taken is None and target < address:
                    raise RuntimeError(f"the loop that ends at {address:#x} depends on what is unknown")
                if taken:
                    calls += [at] if name == "CALL" else []
                    at = position[target]
            elif name == "RET" and taken:
                at = calls.pop()
            elif taken is not False:
                self._execute(instruction, taken is None)

    def _wait(self, instruction: Instruction):
        """Let the time pass until an instruction is issued, and note when its results will be there."""
        name, operands = instruction.name, instruction.operands
        start = self.now
        for register in sources(instruction):
            start = max(start, self.ready.get(register, 0))
        if name == "BAR":
            start += BARRIER
        if name == "DEPBAR" and self.groups:
            pending = int(operands[1], 16) if len(operands) > 1 else 0
            done = self.groups[: len(self.groups) - pending]
            start = max([start, *done])
        self.now = start + 1
        there = start + LATENCIES.get("small LDG" if name == "LDG" and self._is_small(operands[1]) else name, USUAL)
        if name == "LDGSTS":
            self.copies.append(there)
        if name == "LDGDEPBAR":
            self.groups.append(max(self.copies))
        for register in results(instruction):
            self.ready[register] = there

    def _is_small(self, address: str) -> bool:
        """Return whether an address lies in a small tensor."""
        register = re.search(r"\[(R\d+)\.64", address)
        value = self.pair(register[1]) if register else None
        return value is not None and (value + 2**32) >> 33 in self.small

    def _execute(self, instruction: Instruction, uncertain: bool):
        name, kinds, operands = instruction.name, instruction.kinds, instruction.operands
        name = name[1:] if name.startswith("U") and name[1:] in FUNCTIONS else name
        if name in FUNCTIONS and not uncertain:
            FUNCTIONS[name](self, kinds, operands)
        else:
            for register in results(instruction):
                self.values[register] = None


def beside(operand: str) -> str:
    """Return the operand with the next 32 bits."""
    if operand.startswith("c["):
        return re.sub(r"0x[0-9a-f]+\]$", lambda found: f"{int(found[0][:-1], 16) + 4:#x}]", operand)
    name = re.match(r"-?(U?R)(\d+)", operand)
    return f"{name[1]}{int(name[2]) + 1}" if name else operand


WRITES_NOTHING = (
    "ST",
    "BAR",
    "EXIT",
    "BRA",
    "NOP",
    "DEPBAR",
    "LDGDEPBAR",
    "LDGSTS",
    "BSSY",
    "BSYNC",
    "WARPSYNC",
    "RED",
)
WRITES_NOTHING += ("CALL", "RET", "BREAK")


def results(instruction: Instruction) -> list[str]:
    """Return the registers and predicates that an instruction writes."""
    name, kinds, operands = instruction.name, instruction.kinds, instruction.operands
    if name.startswith(WRITES_NOTHING) or not operands:
        return []
    if name in ("R2P",):
        return [f"P{i}" for i in range(7)]
    found = [operand for operand in operands[:1] if re.fullmatch(r"U?[RP]\d+", operand)]
    for operand in operands[1:3]:  # carries, and the second predicate of a comparison
        if re.fullmatch(r"U?P\d+", operand) and name in ("IADD3", "UIADD3", "LEA", "ULEA", "ISETP", "UISETP", "PLOP3"):
            found.append(operand)
    if operands[0].startswith(("P", "UP")) and len(operands) > 1 and re.fullmatch(r"U?R\d+", operands[1]):
        found += [operands[1]] if name in ("LOP3", "ULOP3", "SHFL") else []
    if found and re.fullmatch(r"U?R\d+", found[0]):
        wide = 4 if {"128", "4", "16816"} & set(kinds) or name == "HMMA" else 2
        if {"64", "WIDE", "128", "4", "2", "U64"} & set(kinds) or name in ("HMMA", "CS2R", "DADD", "DMUL", "DFMA"):
            for _ in range(wide - 1):
                found.append(beside(found[-1] if len(found) > 1 and found[-1][0] != "P" else found[0]))
    return found


def sources(instruction: Instruction) -> list[str]:
    """Return the registers and predicates that an instruction reads."""
    first = 0 if instruction.name.startswith(("ST", "BRA", "RED")) else 1
    found = [instruction.guard[1]] if instruction.guard else []
    for operand in instruction.operands[first:]:
        for name, number, wide in re.findall(r"(U?[RP])(\d+)(\.64)?", operand):
            found.append(f"{name}{number}")
            found += [f"{name}{int(number) + 1}"] if wide else []
    if instruction.name == "STG" and {"128", "64"} & set(instruction.kinds):
        found.append(beside(instruction.operands[-1]))
    return found
