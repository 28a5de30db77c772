"""GPUs by name: the memory that a process can have of one, and what it does in a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from mst_ds.config import GIB, nearest


@dataclass(frozen=True)
class Attained:
    """Of the speed that is predicted, for each kind of work, the share that a run has measured.

    Attributes:
        launches: of kernels, by the CPU.
        links: collectives, copies to and from the host; as predicted where the run had none.
        optimizer: its step.
    """

    matrices: float = 1.0
    attention: float = 1.0
    passes: float = 1.0
    launches: float = 1.0
    links: float = 1.0
    optimizer: float = 1.0

    def __str__(self) -> str:
        shares = asdict(self)
        if len(set(shares.values())) == 1:
            return f"{self.matrices:.3g}"
        return ", ".join(f"{share:.3g} ({kind})" for kind, share in shares.items())


AS_PREDICTED = Attained()


@dataclass(frozen=True)
class Gpu:
    """A GPU in its usual server, by the makers' data sheets.

    Attributes:
        name: in capitals, as users write it.
        memory: bytes of `torch.cuda.get_device_properties(...).total_memory`, rounded down to a GiB: less than the name
            says, which counts in 10^9 bytes or has not yet taken off what error correction and driver keep.
        flops, fp32_flops: FLOP/s of dense matrix products in 16 bits, and in fp32 as torch computes it by default.
        memory_rate: bytes/s of its memory.
        node_rate: bytes/s to the other GPUs of its node, one way.
        network_rate: bytes/s to other nodes, one way, of the network card that is its own.
        host_rate: bytes/s to the host's memory, one way.
        capability: of CUDA.
        attained: shares of the speed that is predicted for such a GPU (`--calibrate`).
    """

    name: str
    memory: int
    flops: float
    fp32_flops: float
    memory_rate: float
    node_rate: float
    network_rate: float
    host_rate: float
    capability: tuple[int, int]
    attained: Attained = AS_PREDICTED


_PCIE_4, _PCIE_5 = 25e9, 50e9  # of 32 and 64 GB/s what copies attain
_ETHERNET_100, _INFINIBAND_200, _INFINIBAND_400 = 12.5e9, 25e9, 50e9

_GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A10G", 22 * GIB, 70e12, 35e12, 600e9, _PCIE_4, _ETHERNET_100, _PCIE_4, (8, 6)),
        Gpu("A100-40GB", 39 * GIB, 312e12, 19.5e12, 1555e9, 300e9, _INFINIBAND_200, _PCIE_4, (8, 0)),
        Gpu("A100-80GB", 79 * GIB, 312e12, 19.5e12, 2039e9, 300e9, _INFINIBAND_200, _PCIE_4, (8, 0)),
        Gpu("L4", 22 * GIB, 121e12, 30.3e12, 300e9, _PCIE_4, _ETHERNET_100, _PCIE_4, (8, 9)),
        Gpu("L40S", 44 * GIB, 362.05e12, 91.6e12, 864e9, _PCIE_4, _INFINIBAND_200, _PCIE_4, (8, 9)),
        Gpu("H100", 79 * GIB, 989.5e12, 67e12, 3350e9, 450e9, _INFINIBAND_400, _PCIE_5, (9, 0)),
        # Cards for a slot: a bridge between some of them is not counted on.
        Gpu("H100-PCIE", 79 * GIB, 756.5e12, 51e12, 2039e9, _PCIE_5, _INFINIBAND_200, _PCIE_5, (9, 0)),
        Gpu("H100-NVL", 93 * GIB, 835.5e12, 60e12, 3900e9, _PCIE_5, _INFINIBAND_200, _PCIE_5, (9, 0)),
        Gpu("H200", 139 * GIB, 989.5e12, 67e12, 4800e9, 450e9, _INFINIBAND_400, _PCIE_5, (9, 0)),
        Gpu("H200-NVL", 139 * GIB, 835.5e12, 60e12, 4800e9, _PCIE_5, _INFINIBAND_200, _PCIE_5, (9, 0)),
        Gpu("B200", 178 * GIB, 2250e12, 75e12, 8000e9, 900e9, _INFINIBAND_400, _PCIE_5, (10, 0)),
    )
}
# By words of a driver's name, the first that has them all: the GPUs above that it stands for, or of one that nothing is
# planned for the FLOP/s of dense matrix products in 16 bits.
_DRIVERS: tuple[tuple[str, tuple[str, ...] | float], ...] = (
    ("MIG", ()),  # a part of a GPU, of unknown size
    ("GB200", 2500e12),
    ("B200", ("B200",)),
    ("H100 NVL", ("H100-NVL",)),
    ("H200 NVL", ("H200-NVL",)),
    ("H100 PCIE", ("H100-PCIE",)),
    ("H800 PCIE", 756.5e12),
    ("H100", ("H100",)),
    ("H200", ("H200",)),
    ("H800", 989.5e12),
    ("GH200", 989.5e12),
    ("H20", 148e12),
    ("A100", ("A100-40GB", "A100-80GB")),
    ("A800", 312e12),
    ("A10G", ("A10G",)),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("L40S", ("L40S",)),
    ("L40", 181.05e12),
    ("L4", ("L4",)),
    ("MI300X", 1307.4e12),
    ("MI325X", 1307.4e12),
)
# One core, in fp32, as two runs of benchmarks/step.py had it; its FLOP/s are those of matrix products. It stands for
# any CPU, where a run says which share of that its own attains.
CPU = Gpu("CPU", 0, 113e9, 113e9, 10e9, 5e9, 1e9, 10e9, (0, 0))
# Whose rates rank what the planner may choose where no GPU is named.
DEFAULT_GPU = _GPUS["H100"]


def known_gpus() -> tuple[Gpu, ...]:
    return tuple(_GPUS.values())


def gpu_by_name(name: str) -> Gpu:
    """The GPU of that name, which may be in small letters.

    Raises:
        ValueError: not in the table.
    """
    found = _GPUS.get(name.upper())
    if found is None:
        raise ValueError(
            f"gpu is {name!r}{nearest(name.upper(), _GPUS)}; allowed: {', '.join(_GPUS)}, "
            "or device_memory_gib for any other, and rates for its times"
        )
    return found


def gpu_of_device(device_name: str, memory: int) -> Gpu | None:
    """The GPU that a driver calls so, such as "NVIDIA A100-SXM4-40GB", and that has so many bytes; None if unknown.

    Drivers, error correction and confidential computing keep a GiB more or less to themselves. One with a tenth less or
    more than the table has is a part of such a GPU, or another one.
    """
    found = _of_driver(device_name)
    if not isinstance(found, tuple) or not found:
        return None
    nearest_gpu = min((_GPUS[name] for name in found), key=lambda gpu: abs(gpu.memory - memory))
    return nearest_gpu if abs(nearest_gpu.memory - memory) <= nearest_gpu.memory / 10 else None


def peak_flops_of_device(device_name: str) -> float | None:
    """FLOP/s of dense matrix products in 16 bits, by the data sheet of the GPU that a driver calls so; None if unknown.

    Half of the figures that NVIDIA prints "with sparsity".
    """
    found = _of_driver(device_name)
    if isinstance(found, tuple):
        return _GPUS[found[0]].flops if found else None
    return found


def _of_driver(device_name: str) -> tuple[str, ...] | float | None:
    words = set(device_name.upper().replace("-", " ").split())
    return next((found for name, found in _DRIVERS if words.issuperset(name.split())), None)
