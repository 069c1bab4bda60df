"""The name of an accelerator, or JAX's name of a device -> what one can hold, compute and move.

All numbers are peaks from data sheets, per GPU or per TPU chip: bytes, bytes per second, FLOP per second.
"""

from dataclasses import dataclass

from transformer_jax.config_checks import nearest
from transformer_jax.errors import InputError


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU or TPU chip, with the board or pod it is usually sold in."""

    name: str
    """What users type, the key in `ACCELERATORS`."""
    memory_bytes: int
    """High-bandwidth memory as the vendor quotes it. GB is read as 10^9, though what they sell as GB is often 2^30."""
    flops: float
    """Peak dense bfloat16 FLOP/s. NVIDIA quotes twice this for 2:4 sparsity from Hopper on; here it is halved."""
    memory_bandwidth: float
    """Bytes/s between the chip and its memory."""
    link_bandwidth: float
    """Bytes/s each way over all NVLink or ICI links of one chip; vendors quote both ways together, so this is half."""
    network_bandwidth: float
    """Bytes/s each way per chip beyond the fast links: one InfiniBand card per GPU between boards, the data-center
    network between TPU pods."""
    link_domain: int
    """Devices joined by the fast links: the GPUs on a board, the chips in a TPU pod."""
    source: str
    """The documents of the numbers, and where they disagree."""


ACCELERATORS: dict[str, Accelerator] = {
    row.name: row
    for row in (
        Accelerator(
            name="a100",
            memory_bytes=80 * 10**9,
            flops=312e12,
            memory_bandwidth=2039e9,
            link_bandwidth=300e9,
            network_bandwidth=25e9,
            link_domain=8,
            source="NVIDIA A100 80GB SXM data sheet, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/"
            "a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf; network: DGX A100, 8 ConnectX-6 of 200 Gb/s, "
            "https://developer.nvidia.com/blog/defining-ai-innovation-with-dgx-a100/",
        ),
        Accelerator(
            name="h100",
            memory_bytes=80 * 10**9,
            flops=989.5e12,
            memory_bandwidth=3.35e12,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            link_domain=8,
            source="NVIDIA H100 SXM, https://www.nvidia.com/en-us/data-center/h100/ (1979 TFLOPS is with sparsity); "
            "network: DGX BasePOD core components, 8 ConnectX-7 of 400 Gb/s, https://docs.nvidia.com/dgx-basepod/"
            "reference-architecture-infrastructure-foundation-enterprise-ai/latest/core-components.html",
        ),
        Accelerator(
            name="h200",
            memory_bytes=141 * 10**9,
            flops=989.5e12,
            memory_bandwidth=4.8e12,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            link_domain=8,
            source="NVIDIA H200 SXM, https://www.nvidia.com/en-us/data-center/h200/ (1979 TFLOPS is with sparsity); "
            "network: DGX BasePOD core components, 8 ConnectX-7 of 400 Gb/s, https://docs.nvidia.com/dgx-basepod/"
            "reference-architecture-infrastructure-foundation-enterprise-ai/latest/core-components.html",
        ),
        Accelerator(
            name="b200",
            memory_bytes=180 * 10**9,
            flops=2.25e15,
            memory_bandwidth=8e12,
            link_bandwidth=900e9,
            network_bandwidth=50e9,
            link_domain=8,
            source="DGX B200 User Guide (1440 GB, 14.4 TB/s of NVLink and 8 ConnectX-7 of 400 Gb/s for 8 GPUs), "
            "https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html; 64 TB/s and 72 PFLOPS of "
            "sparse FP8 for 8 GPUs, https://www.nvidia.com/en-us/data-center/dgx-b200/. NVIDIA's Blackwell data sheet "
            "of October 2025 says 7.7 TB/s per GPU, and early briefs say up to 192 GB",
        ),
        Accelerator(
            name="tpu-v4",
            memory_bytes=32 * 2**30,
            flops=275e12,
            memory_bandwidth=1200e9,
            link_bandwidth=300e9,
            network_bandwidth=6.25e9,
            link_domain=4096,
            source="Google Cloud TPU v4, https://docs.cloud.google.com/tpu/docs/v4; links: Jouppi et al. 2023, table "
            "4, 6 of 50 GB/s, https://arxiv.org/abs/2304.01433. The JAX scaling book says 45 GB/s per link. Network "
            "between pods: none is given, so that of v5p",
        ),
        Accelerator(
            name="tpu-v5e",
            memory_bytes=16 * 10**9,
            flops=197e12,
            memory_bandwidth=819e9,
            link_bandwidth=200e9,
            network_bandwidth=3.125e9,
            link_domain=256,
            source="Google Cloud TPU v5e, https://docs.cloud.google.com/tpu/docs/v5e (400 GB/s of ICI is both ways). "
            "Some versions of the page say 800 GiB/s of memory bandwidth. Network: 6.4 Tb/s per pod of 256",
        ),
        Accelerator(
            name="tpu-v5p",
            memory_bytes=95 * 2**30,
            flops=459e12,
            memory_bandwidth=2765e9,
            link_bandwidth=600e9,
            network_bandwidth=6.25e9,
            link_domain=8960,
            source="Google Cloud TPU v5p, https://docs.cloud.google.com/tpu/docs/v5p (1200 GB/s of ICI is both ways; a "
            "pod has 8960 chips, one job at most 6144). Older versions of the page say 95 GB. Network: 50 Gb/s "
            "per chip",
        ),
        Accelerator(
            name="tpu-v6e",
            memory_bytes=32 * 10**9,
            flops=918e12,
            memory_bandwidth=1638e9,
            link_bandwidth=400e9,
            network_bandwidth=12.5e9,
            link_domain=256,
            source="Google Cloud TPU v6e, https://docs.cloud.google.com/tpu/docs/v6e (800 GB/s of ICI is both ways). "
            "Network: 25.6 Tb/s per pod of 256",
        ),
    )
}

# `device_kind` in full: "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA GB200" and slices of a
# GPU ("... MIG 1g.10gb") contain a name of the table and are other devices. TPUs: jax/_src/pallas/mosaic/tpu_info.py.
_DEVICE_KINDS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "TPU v4": "tpu-v4",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5e": "tpu-v5e",
    "TPU v5": "tpu-v5p",
    "TPU v5p": "tpu-v5p",
    "TPU v6 lite": "tpu-v6e",
    "TPU v6e": "tpu-v6e",
}


def find_accelerator(name: str) -> Accelerator:
    """The accelerator of a name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise InputError(f"Unknown accelerator {name!r}.{nearest(name, ACCELERATORS)} The accelerators are {known}.")
    return ACCELERATORS[name]


def match_device_kind(kind: str) -> Accelerator | None:
    """The accelerator that JAX calls `device.device_kind`; None for a device that is not in the table."""
    name = _DEVICE_KINDS.get(kind)
    return ACCELERATORS[name] if name else None
