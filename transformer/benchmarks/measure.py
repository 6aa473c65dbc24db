"""How things are timed, and the form that every result is written in."""

import datetime
import errno
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import tyro

from transformer.config import ConfigError, write_atomically

JsonFile = Annotated[str, tyro.conf.arg(name="json", metavar="FILE")]
"""The option that names a file for the result; the field is called `json_file`."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu")


def check_destination(option: str, path: str, is_directory: bool = False) -> None:
    """Raises ConfigError where nothing can be written to `path`, before a benchmark has worked for hours."""
    target = Path(path).expanduser()
    try:
        if target.is_dir() and not is_directory:
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        place = target if is_directory else target.parent
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ConfigError(f"{option} = {path!r} cannot be written: {error.strerror}") from error


def too_small(options: Any, least: Mapping[str, int]) -> list[str]:
    """Returns what is wrong with options that are numbers, or several, of at least so much."""
    problems = []
    for name, smallest in least.items():
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value == ():
            problems.append(f"{flag} has no value: give at least one")
        elif min(value if isinstance(value, tuple) else (value,)) < smallest:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            problems.append(f"{flag} = {shown}: must be at least {smallest}")
    return problems


def tell(text: str) -> None:
    """Says what goes on, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def median(values: Sequence[float]) -> float:
    """Returns the middle value, of two in the middle their geometric mean: the median of rates is that of times, inverted."""
    low, high = statistics.median_low(values), statistics.median_high(values)
    return math.sqrt(low * high) if 0 < low < high else statistics.median(values)


def timed(calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Returns for each call the seconds that it took in each round, until everything that it returns was there.

    In a round each is called once, from another one on each time, so that what else the machine does strikes all alike.
    """
    import jax

    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            elapsed = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def own_process(program: str, arguments: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Returns command and environment of a Python that runs `program` and finds the package that this one has.

    For what should not share this process's memory, caches or devices.
    """
    search_path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    return [sys.executable, "-c", program, *arguments], environment


@dataclass(frozen=True)
class Measurement:
    """One quantity, as often as it was measured."""

    values: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper; the value itself where there is one."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        lower, _, upper = statistics.quantiles(self.values, n=4, method="inclusive")
        return lower, upper

    def __str__(self) -> str:
        lower, upper = self.quartiles
        spread = "" if len(self.values) == 1 else f" (quartiles {lower:.4g} to {upper:.4g})"
        return f"{self.median:.4g} {self.unit}{spread}"


def machine() -> dict[str, Any]:
    """Returns what a number depends on besides the program: devices, processor, versions."""
    import jax

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
    }


def processor() -> str:
    """Returns the name of the processor, empty where the system does not tell it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def resident_bytes() -> int | None:
    """Returns the memory that this process holds now, None where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return None
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()


def peak_resident_bytes() -> int | None:
    """Returns the most memory that this process has had, None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


@dataclass(frozen=True)
class Result:
    """What a benchmark found."""

    benchmark: str
    subject: dict[str, Any]
    """What was measured: results are compared only where this is the same."""
    machine: dict[str, Any]
    measurements: dict[str, Measurement]
    facts: dict[str, Any]
    """What was computed and not measured."""

    def write(self, path: str) -> None:
        """Writes it as JSON, whole or not at all."""
        values = {name: {"unit": m.unit, "values": m.values} for name, m in self.measurements.items()}
        record = vars(self) | {"measurements": values} | asked()
        write_atomically(Path(path).expanduser(), json.dumps(record, indent=1) + "\n")


def asked() -> dict[str, Any]:
    """Returns when a result was made, and by which command."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}


def read_result(path: str) -> Result:
    """Returns what `Result.write` wrote. Raises ConfigError for any other file."""
    try:
        record = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not the result of a benchmark: it is not JSON") from error
    parts = {"benchmark": str, "subject": dict, "machine": dict, "measurements": dict, "facts": dict}
    for name, kind in parts.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise ConfigError(f"{path} is not the result of `transformer benchmark`: it has no {name}")
    if not isinstance(record["machine"].get("versions"), dict):
        raise ConfigError(f"{path} is not the result of `transformer benchmark`: its machine has no versions")
    measurements = {name: _measurement(f"{path}: {name}", item) for name, item in record["measurements"].items()}
    return Result(record["benchmark"], record["subject"], record["machine"], measurements, record["facts"])


def _measurement(label: str, item: Any) -> Measurement:
    values = item.get("values") if isinstance(item, dict) else None
    if not isinstance(values, list) or not values or not isinstance(item.get("unit"), str):
        raise ConfigError(f"{label} has no values or no unit")
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
        raise ConfigError(f"{label} has values that are not greater than 0")
    return Measurement(tuple(map(float, values)), item["unit"])


def ratio(numerator: Sequence[float], denominator: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Returns the ratio of two medians, and the 5th and 95th percentile of that of samples drawn again from each.

    Efron 1979, "Bootstrap methods: another look at the jackknife"; the draws are the same every time.
    """
    rng = random.Random(0)

    def again(values: Sequence[float]) -> float:
        return median(rng.choices(values, k=len(values)))

    found = sorted(again(numerator) / again(denominator) for _ in range(draws))
    whole = median(numerator) / median(denominator)
    return whole, found[round(0.05 * (draws - 1))], found[round(0.95 * (draws - 1))]
