"""What a device holds, computes and sends in a step -> whether an accelerator has room for it, and the least time."""

import dataclasses
import math

from transformer_jax.accelerators import Accelerator


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind along the same mesh axes in a step.

    Attributes:
        kind: such as `all-gather`.
        axes: the mesh axes whose devices take part, outermost first.
        devices: the ids of those that exchange with device 0. Ids count along the mesh, its last axis fastest, and
            boards, hosts and pods hold devices with neighbouring ids.
        bytes: of the whole arrays, added up over a step; see `hlo.Collective`.
    """

    kind: str
    axes: tuple[str, ...]
    devices: tuple[int, ...]
    bytes: int

    def moved(self) -> float:
        """Bytes that a device sends, and as many that it receives, by a ring algorithm among g devices.

        Of n bytes in all, all-gather, reduce-scatter and all-to-all move n (g - 1) / g. An all-reduce is a
        reduce-scatter and an all-gather, twice that. A collective-permute moves n.
        """
        count = len(self.devices)
        share = 1 if self.kind == "collective-permute" else (count - 1) / count
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)

    def seconds(self, accelerator: Accelerator) -> float:
        """The least time it takes, links and network busy at once.

        Devices whose ids fall in the same link domain exchange over fast links. What several domains must tell each
        other crosses the network once for each domain, over the network cards of all members that the group has there:
        of n bytes among d domains, n (d - 1) / d, divided by the members; but in an all-to-all and a permute each
        member has its own to send.
        """
        here = sum(device < accelerator.link_domain for device in self.devices)
        domains = len(self.devices) / here
        outside = self.bytes * (2 if self.kind == "all-reduce" else 1) * (domains - 1) / domains
        if self.kind == "collective-permute":
            outside = self.bytes if domains > 1 else 0.0
        elif self.kind != "all-to-all":
            outside /= here
        inside = self.moved() - outside
        return max(inside / accelerator.link_bandwidth, outside / accelerator.network_bandwidth)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each device has to hold and do.

    Attributes:
        mesh: all mesh axes with their sizes.
        simulated: the number of devices that the step was compiled for.
        memory: bytes of each part of what a device holds at the step's peak.
        model_flops: FLOPs of a step over all devices: three times the forward pass.
        flops: FLOPs of the matrix products in one device's program, with all that it computes again or that several
            devices compute alike.
        traffic: bytes between a device and its memory, if each matrix product reads its operands and writes its result
            once and the update reads and writes the state once.
        exchanges: what it sends.
    """

    mesh: dict[str, int]
    simulated: int
    memory: dict[str, int]
    model_flops: float
    flops: float
    traffic: float
    exchanges: tuple[Exchange, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return sum(self.memory.values())

    def seconds(self, accelerator: Accelerator) -> dict[str, float]:
        """The least time of a step by what may limit it (Williams et al. 2009, the roofline); the longest one binds."""
        return {
            "compute": self.flops / accelerator.flops,
            "memory": self.traffic / accelerator.memory_bandwidth,
            "communication": sum(exchange.seconds(accelerator) for exchange in self.exchanges),
        }
