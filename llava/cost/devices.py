"""Devices and number formats: peaks from the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

# Dense bfloat16 (V100, T4: float16) FLOP/s of one device; a longer name comes first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A30": 165e12,
    "RTX A6000": 155e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense 16-bit FLOP/s of a device by the name that torch gives it; None where it is not known."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_FLOPS.items():
        if _contains(words, name.split()):
            return peak
    return None


def _contains(words: list[str], wanted: list[str]) -> bool:
    places = [words.index(word) if word in words else -1 for word in wanted]
    return -1 not in places and places == sorted(places)


@dataclass(frozen=True)
class Device:
    """What bounds a computation.

    Attributes:
        name: of the data sheet.
        peak_16: dense FLOP/s in float16 or bfloat16, a multiply-add as two operations.
        peak_8: dense operations a second in 8-bit integers.
        bandwidth: bytes a second of its memory.
        memory: bytes.
        has_bfloat16: whether it computes in bfloat16.
    """

    name: str
    peak_16: float
    peak_8: float
    bandwidth: float
    memory: float
    has_bfloat16: bool = True


DEVICES = {
    device.name: device
    for device in (
        # SXM boards. V100 has no 8-bit matrix units; it multiplies four bytes at once at the rate of float32.
        Device("V100", PEAK_FLOPS["V100"], 62.8e12, 900e9, 32e9, has_bfloat16=False),
        Device("A100", PEAK_FLOPS["A100"], 624e12, 2039e9, 80e9),
        Device("H100", PEAK_FLOPS["H100"], 1979e12, 3350e9, 80e9),
        Device("H200", PEAK_FLOPS["H200"], 1979e12, 4800e9, 141e9),
    )
}


@dataclass(frozen=True)
class Precision:
    """Bytes of a number in the language model's layers; tower, projector, embeddings and head stay in 16 bits.

    Attributes:
        name: of the format.
        weight: bytes of a weight.
        value: bytes of an activation, and of a key or value in the cache.
        in_integers: whether products run on 8-bit units, those of 4-bit numbers too.
    """

    name: str
    weight: float
    value: float
    in_integers: bool = False

    def peak(self, device: Device) -> float:
        """Operations a second of the device's units for this format."""
        return device.peak_8 if self.in_integers else device.peak_16


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp16", 2, 2),
        Precision("bf16", 2, 2),
        Precision("int8", 1, 1, in_integers=True),
        Precision("int4", 0.5, 0.5, in_integers=True),
        Precision("w8a16", 1, 2),  # weights only, as bitsandbytes has them
        Precision("w4a16", 0.5, 2),
    )
}


def find_device(name: str) -> Device:
    """The device of a name, in any case.

    Raises:
        ValueError: it is not known; the known ones are listed.
    """
    device = DEVICES.get(name.upper())
    if device is None:
        raise ValueError(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
    return device


def find_precision(name: str, device: Device) -> Precision:
    """The number format of a name, on a device that has it.

    Raises:
        ValueError: it is not known (the known ones are listed), or not on this device.
    """
    precision = PRECISIONS.get(name.lower())
    if precision is None:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(PRECISIONS)}")
    if precision.name == "bf16" and not device.has_bfloat16:
        others = ", ".join(known for known in PRECISIONS if known != "bf16")
        raise ValueError(f"{device.name} does not compute in bf16; choose one of {others}")
    return precision
