"""What nvcc made of the Hopper kernels: read from the binary, since no GPU is needed to see a spill or a missing instruction."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not on PATH: there is no binary to look at", allow_module_level=True)

# Where there is nvcc, tests have the CUTLASS headers too: an extension that is missing or without sm_90a is a failure.
from flashcl import _C

if "90a" not in _C.build_info()["architectures"]:
    pytest.skip("FLASHCL_ARCHS leaves out 90a: the kernels were not built", allow_module_level=True)

# Kernel -> what stands in its mangled name, and whether it writes G by TMA.
KERNELS = {
    "sweep": ("5SweepI", "9Different", False),
    "sweep by label": ("5SweepI", "7ByLabel", False),
    "grad": ("4GradI", "9Different", True),
    "grad by label": ("4GradI", "7ByLabel", True),
    "sigmoid": ("7SigmoidI", "9Different", True),
}
ELEMENTS = {"bfloat16": "10bfloat16_t", "float16": "6half_t"}


def matches(mangled, kernel, element):
    epilogue, program, _ = KERNELS[kernel]
    return "5tiles" in mangled and all(part in mangled for part in (epilogue, program, ELEMENTS[element]))


@cache
def resources():
    """{mangled name: {registers, stack, spill_stores, spill_loads}} of every kernel, as ptxas reported it."""
    found = {}
    for line in filter(lambda line: line.startswith("_Z"), _C.resources().splitlines()):
        name, arch, *values = line.split()
        found[name, arch] = {key: int(value) for key, value in (v.split("=") for v in values)}
    return found


@cache
def sass():
    """{mangled name: instructions}; cuobjdump comes with the CUDA toolkit and with triton."""
    folder = Path(
        pytest.importorskip("triton", reason="neither cuobjdump nor triton, which brings one").__file__
    ).parent
    tool = shutil.which("cuobjdump") or folder / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-sass", _C.__file__], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]
    return {f.split(maxsplit=1)[0]: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", f) for f in functions}


def of(table, kernel, element):
    found = [v for name, v in table.items() if matches(name if isinstance(name, str) else name[0], kernel, element)]
    assert len(found) == 1, f"{len(found)} kernels look like {kernel}, {element}"
    return found[0]


def largest_register(code):
    return max(int(n) for line in code for n in re.findall(r"\bR(\d+)\b", line))


every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_element = pytest.mark.parametrize("element", ELEMENTS)


def test_all_kernels_are_there():
    assert sum("5tiles" in name for name, arch in resources()) == len(KERNELS) * len(ELEMENTS)
    assert {arch for name, arch in resources() if "5tiles" in name} == {"sm_90a"}


def test_wgmma_is_not_serialised():
    assert [line for line in _C.resources().splitlines() if not line.startswith("_Z")] == []


@every_element
@every_kernel
def test_nothing_spills(kernel, element):
    used = of(resources(), kernel, element)
    # 168 at launch is 65536 / 384; the warpgroups then exchange registers: 24 for the producer, 240 for each consumer.
    assert used == dict(registers=168, stack=0, spill_stores=0, spill_loads=0)
    code = of(sass(), kernel, element)
    assert not [line for line in code if re.search(r"\b(LDL|STL)\b", line)]
    moved = [int(line.rsplit(maxsplit=1)[-1], 16) for line in code if "USETMAXREG" in line]
    assert sorted(moved) == [24, 240]
    assert 168 < largest_register(code) < 240
    start = next(i for i, line in enumerate(code) if "USETMAXREG.DEALLOC" in line)
    copies = [i for i, line in enumerate(code) if "UTMALDG" in line]
    assert start < min(copies) and largest_register(code[start : max(copies) + 1]) < 24


@every_element
@every_kernel
def test_tensor_cores_and_copy_engine(kernel, element):
    lines = of(sass(), kernel, element)
    code, opcodes = "\n".join(lines), {re.match(r"(?:@\S+\s+)?(\w+)", line)[1] for line in lines}
    assert opcodes >= {"HGMMA", "UTMALDG", "SYNCS"} and opcodes.isdisjoint(
        {"HMMA", "CALL", "ATOM", "ATOMG", "RED", "REDG"}
    )
    products = re.findall(r"HGMMA\.\S+", code)
    # Two wgmma of 64 rows, 4 of k = 16 in a step of 64, once for the first step of a tile and once in the loop.
    assert len(products) == 16 and all(p.startswith("HGMMA.64x128x16.F32") for p in products)
    assert all(("BF16" in p) == (element == "bfloat16") for p in products)
    # x for one CTA, half of y for both.
    assert [bool(copy) for copy in re.findall(r"UTMALDG\.3D(\.MULTICAST)?", code)] in ([False, True], [True, False])
    writes_g = KERNELS[kernel][2]
    assert ("UTMASTG" in opcodes) == ("STSM" in opcodes) == writes_g


@every_element
@every_kernel
def test_products_are_awaited_and_warpgroups_meet(kernel, element):
    """After the last product a wait for all of them, then two barriers of 128 threads: before and after the epilogue."""
    code = of(sass(), kernel, element)
    products = [i for i, line in enumerate(code) if "HGMMA" in line]
    waits = [i for i, line in enumerate(code) if re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", line)]
    barriers = [i for i, line in enumerate(code) if re.search(r"BAR\.SYNC.*, 0x80", line)]
    assert len(waits) == 1 and len(barriers) == 2 and products[-1] < waits[0] < barriers[0]
    exps = [i for i, line in enumerate(code) if "MUFU.EX2" in line and i > products[-1]]
    assert barriers[0] < exps[0] and sum(i < barriers[1] for i in exps) > 250


@every_element
@every_kernel
def test_one_fast_exp_for_each_logit(kernel, element):
    """The exponentials in the code: how often a pass over the 128 places of a lane is there."""
    count = sum("MUFU.EX2" in line for line in of(sass(), kernel, element))
    # sweep: one for a shared top, with and without masks or of either class, and two where each line has its own (of which
    # the compiler makes two copies by label).
    # grad: 1 shared + 2 apart, once more with masks, unless there are always masks. sigmoid: far from 0, near, with masks.
    passes = {"sweep": 4, "sweep by label": 6, "grad": 6, "grad by label": 3, "sigmoid": 3}[kernel]
    assert 128 * passes <= count < 128 * passes + 20  # and some of rows and columns


@every_kernel
def test_shared_memory(kernel):
    """Six stages of x and y, or five and a tile of G, of 32 KiB each; beside them what epilogues and barriers share."""
    beside = {"sweep": 12, "sweep by label": 25, "grad": 11, "grad by label": 17, "sigmoid": 8}[kernel]
    assert _C.shared_memory()[kernel] == (6 * 32 + beside) * 2**10 <= 227 * 2**10


@pytest.mark.parametrize("kernel, stores", [("partner_products", "STG.E.64"), ("finish", "STG.E.128")])
def test_rows_move_16_bytes_at_a_time(kernel, stores):
    names = [name for name in sass() if f"{len(kernel)}{kernel}E" in name]
    assert len(names) == 1
    (used,) = (v for (name, arch), v in resources().items() if name == names[0])
    assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0 and used["registers"] <= 80
    opcodes = {re.sub(r"^@\S+\s+", "", line).split()[0] for line in sass()[names[0]]}
    assert opcodes >= {"LDG.E.128", stores} and not any(op.startswith(("LDL", "STL", "CALL", "ATOM")) for op in opcodes)
