"""The LSTM of `transformer benchmark rnn` in PyTorch, which on a GPU runs cuDNN's: in a process that imports no JAX."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer.config import Config


@dataclass(frozen=True)
class Shape:
    """A model and a batch, as our own LSTM has them."""

    rows: int
    length: int
    layers: int
    width: int
    hidden: int
    """Width of the feed-forward part."""
    vocabulary: int
    dtype: str

    @classmethod
    def of(cls, config: "Config") -> "Shape":
        model = config.model
        assert model.vocab_size is not None and model.feedforward_width is not None, "resolved"
        return cls(
            config.train.batch_size,
            config.data.sequence_length,
            model.num_layers,
            model.width,
            model.feedforward_width,
            model.vocab_size,
            model.compute_dtype,
        )


@dataclass(frozen=True)
class Run:
    """What PyTorch made of a shape."""

    seconds: tuple[float, ...]
    """Of each step."""
    parameters: int
    bytes: int
    """Most that was allocated on the GPU, 0 on a CPU."""
    loss: float


def measure(shapes: Sequence[Shape], rounds: int, python: str) -> list[Run]:
    """Times training steps of each shape. Raises ConfigError where `python` has no PyTorch, or is none."""
    # Here, for the Python that runs `child` need not have what they need.
    from transformer.benchmarks.measure import own_process
    from transformer.config import ConfigError

    (_, *command), environment = own_process("from transformer.benchmarks.torch_lstm import child; child()")
    asked = json.dumps({"shapes": [asdict(shape) for shape in shapes], "rounds": rounds})
    try:
        done = subprocess.run([python, *command], env=environment, input=asked, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"--pytorch = {python!r}: {error.strerror}") from error
    if "No module named 'torch'" in done.stderr:
        raise ConfigError(f"--pytorch = {python!r}: this Python has no package torch (pip install torch)")
    if done.returncode:
        raise RuntimeError(f"PyTorch's process ended with status {done.returncode}: {done.stderr[-2000:]}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [Run(tuple(run.pop("seconds")), **run) for run in found]


def child() -> None:
    """The process: reads what to measure, and writes a line of JSON for each shape."""
    asked = json.load(sys.stdin)
    for shape in asked["shapes"]:
        print(json.dumps(asdict(_run(Shape(**shape), asked["rounds"]))), flush=True)


def _run(shape: Shape, rounds: int) -> Run:
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # What JAX does by default with products of float32 on a GPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    dtype = getattr(torch, shape.dtype)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer_norm, self.norm = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
            # All of it in one type: autocast would take cuDNN's in float16.
            self.mixer = nn.LSTM(shape.width, shape.width, batch_first=True, dtype=dtype)
            self.up, self.down = (
                nn.Linear(*sizes, bias=False) for sizes in ((shape.width, shape.hidden), (shape.hidden, shape.width))
            )

        def forward(self, x: Any) -> Any:
            y = self.mixer_norm(x)
            with torch.autocast(device, enabled=False):
                x = x + self.mixer(y.to(dtype))[0]
            return x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(shape.vocabulary, shape.width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.blocks = nn.Sequential(*(Block() for _ in range(shape.layers)))
            self.norm = nn.LayerNorm(shape.width)

        def forward(self, ids: Any, targets: Any) -> Any:
            logits = self.norm(self.blocks(self.embedding(ids))) @ self.embedding.weight.T
            return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    torch.manual_seed(0)
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device == "cuda")
    ids = torch.randint(shape.vocabulary, (shape.rows, shape.length), device=device)
    half = torch.autocast(device, torch.bfloat16, enabled=shape.dtype == "bfloat16")
    seconds, loss = [], 0.0
    for number in range(-2, rounds):
        start = time.perf_counter()
        with half:
            total = model(ids, torch.roll(ids, -1, 1))
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = total.item()  # waits for the device
        if number >= 0:
            seconds.append(time.perf_counter() - start)
    used = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return Run(tuple(seconds), sum(p.numel() for p in model.parameters()), used, loss)
