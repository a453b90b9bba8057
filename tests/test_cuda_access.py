"""How CUDA kernels read and write images: vectors, many on their way at once, none needed where it arrives."""

import functools
import re
import subprocess
from typing import NamedTuple

import pytest
from helpers import CSRC
from helpers.nvcc import compiled

launch = pytest.importorskip("seemore_fast.kernels.launch")  # where Triton is: it brings cuobjdump

ARCHITECTURES = [90, *(pytest.param(architecture, marks=pytest.mark.slow) for architecture in (80, 120))]
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([\w.]+)(.*?)\s*(?: [&?].*)?;", re.MULTILINE)
BITS = {"64": 64, "128": 128, "U16": 16}
REGISTER = re.compile(r"\bR(\d+)(\.64)?")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def bits(self) -> int:
        """Return what a load or store moves for each thread."""
        return next((BITS[part] for part in self.name.split(".") if part in BITS), 32)

    @property
    def registers(self) -> set[int]:
        """Return all registers it names; a store's last are those that it stores."""
        found = [(int(number), 2 if pair else 1) for number, pair in REGISTER.findall(self.operands)]
        if found and self.name.startswith(("STG", "STS")):
            found[-1] = (found[-1][0], max(1, self.bits // 32))
        return {first + i for first, count in found for i in range(count)}


def instructions(sass: str) -> list[Instruction]:
    return [Instruction(int(address, 16), *rest) for address, *rest in INSTRUCTION.findall(sass)]


def until_needed(code: list[Instruction], start: int) -> list[Instruction]:
    """Return what comes between a load and the first that needs it; a loop's end leads to its start."""
    load, between, jumped = code[start], [], set()
    first = int(REGISTER.search(load.operands)[1])
    wanted = set(range(first, first + load.bits // 32))
    number = start + 1
    while not code[number].registers & wanted:
        between.append(code[number])
        target = re.search(r"0x([0-9a-f]+)", code[number].operands) if code[number].name.startswith("BRA") else None
        if target and int(target[1], 16) <= load.address < code[number].address and number not in jumped:
            jumped.add(number)
            number = next(i for i, other in enumerate(code) if other.address == int(target[1], 16))
        else:
            number += 1
    return between


@functools.cache
def kernels(stem: str, architecture: int) -> dict[str, list[Instruction]]:
    """Return the instructions of a source's kernels by their mangled names."""
    file, _ = compiled(CSRC / "cuda" / "ops" / f"{stem}.cu", architecture)
    try:
        command = [launch.cuobjdump(), "-sass", "-arch", f"sm_{architecture}", str(file)]
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, *parts = re.split(r"Function : (\w+)", text)
    return {name: instructions(sass) for name, sass in zip(parts[::2], parts[1::2], strict=True)}


class Access(NamedTuple):
    """What is asked of the kernels of a name, where they read and write `vector` elements at once."""

    source: str
    kernel: str  # their arguments follow: the type, others, and at last `vector`
    vector: int
    loads: int  # that are on their way at once, at least
    distance: int  # instructions from a load to the first that needs it, at least
    stores: int  # of vectors, or a multiple where loops are unrolled


ACCESSES = [
    Access("calibrate", r"aggregateI{type}Li[12]ELi4E", 4, 5, 15, 0),
    Access("calibrate", r"add_stretchedI{type}Li4E", 4, 4, 40, 4),
    Access("calibrate_backward", r"gatherI{type}Li{bytes16}E", 0, 4, 30, 0),
    Access("calibrate_spread", r"calibrate_spreadI{type}Li[12]ELi4E", 4, 8, 25, 4),
    Access("calibrate_spread", r"calibrate_spreadI{type}Li2ELi4E", 4, 8, 100, 4),
    Access("striped_conv", r"striped_conv_sweep_forwardI{type}Li(3|11)ELi4E", 4, 5, 40, 4),
    Access("striped_conv_backward", r"backward_columnI{type}Li(3|11)ELi4E", 4, 4, 35, 0),
    Access("striped_conv_backward", r"backward_rowI{type}(?:{type}|S\w_)Li(3|11)ELi4E", 4, 4, 45, 4),
]
TYPES = {"f": 32, "6__half": 16, "13__nv_bfloat16": 16}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("type, bits", TYPES.items(), ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("access", ACCESSES, ids=lambda access: access.kernel.split("I{")[0] + f"-{access.distance}")
def test_vectors_are_on_their_way_while_others_are_worked_on(access, type, bits, architecture):
    pattern = access.kernel.format(type=type, bytes16=128 // bits)
    found = {n: c for n, c in kernels(access.source, architecture).items() if re.search(pattern, n)}
    assert found
    vector = (access.vector or 128 // bits) * bits
    for name, code in found.items():
        loads = [i for i, load in enumerate(code) if load.name.startswith("LDG") and load.bits == vector]
        between = [until_needed(code, load) for load in loads]
        assert min(map(len, between)) >= access.distance, name
        on_their_way = [1 + sum(i.name.startswith("LDG") and i.bits == vector for i in others) for others in between]
        assert max(on_their_way) >= access.loads, name
        stores = [store.bits for store in code if store.name.startswith("STG")]
        if access.stores:
            assert stores.count(vector) and stores.count(vector) % access.stores == 0, name
        assert bits not in stores or bits == 32, f"{name} stores elements one by one"  # sums are of 32 bits, too


@pytest.mark.parametrize("source", ["striped_conv", "calibrate_spread"])
def test_elements_are_a_fixed_distance_apart(source):
    """Where rows begin at any element, three of four neighbours are stored beside the first, by its address."""
    found = {name: code for name, code in kernels(source, 90).items() if re.search(r"Li\d+ELi1E", name)}
    assert found
    for name, code in found.items():
        stores = [instruction.operands for instruction in code if instruction.name.startswith("STG")]
        assert sum("+0x" in operands for operands in stores) >= 0.7 * len(stores), name


def test_a_load_that_is_waited_for_is_found():
    """The first is needed at once, the second where the loop begins again, after three others."""
    code = instructions(
        """
        /*0000*/                   FADD R9, R4, R4 ;
        /*0010*/              @!P0 LDG.E.64 R2, desc[UR4][R12.64] ;
        /*0020*/                   PRMT R7, R3, 0x7632, R7 ;
        /*0030*/                   LDG.E.64 R4, desc[UR4][R12.64+0x8] &req={3} ?trans1 ;
        /*0040*/                   STG.E.64 desc[UR4][R14.64], R6 ;
        /*0050*/                   IADD3 R12, R12, 0x10, RZ ;
        /*0060*/               @P1 BRA 0x0 ;
        /*0070*/                   EXIT ;
        """
    )
    assert [len(until_needed(code, start)) for start in (1, 3)] == [0, 3]
    assert code[4].registers == {14, 15, 6, 7}
    assert (code[1].bits, code[3].operands.strip()) == (64, "R4, desc[UR4][R12.64+0x8]")
