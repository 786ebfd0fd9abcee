"""What a dry run, which counts one process with the whole model, says of several devices."""

from __future__ import annotations

from .settings import DeviceSettings


def not_foreseen(devices: DeviceSettings) -> str | None:
    """What each device holds where none holds the whole model, in words; else nothing.

    It can be more than one process alone would take: FSDP2 gathers embeddings and head whole beside
    its share, and DeepSpeed's buffers have a size of their own.
    """
    if devices.device_map:
        return f"device_map={devices.device_map} spreads its layers"
    if is_sharded(devices):
        return f"{devices.strategy} over {devices.processes} holds a share on each"
    return None


def is_sharded(devices: DeviceSettings) -> bool:
    """Whether each process holds a share of the model, or of what trains it."""
    return devices.processes > 1 and devices.strategy != "ddp"


def has_buckets(devices: DeviceSettings) -> bool:
    """Whether DDP holds a copy of the gradients, in which they are summed over the processes.

    accelerate leaves `gradient_as_bucket_view` off: two processes on the CPU held, above one alone,
    the bytes of the weights that train, and 504 more at most.
    """
    return devices.processes > 1 and devices.strategy == "ddp"


def on_each(devices: DeviceSettings, on_gpu: bool) -> str:
    """How the figures are to be read where there are several processes."""
    if devices.processes == 1:
        return ""
    return f", on each of {devices.processes}" if on_gpu else f", {devices.processes} processes"
