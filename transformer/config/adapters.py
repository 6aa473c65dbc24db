"""What can be wrong with the keys of an adapter; loaded when a configuration has one."""

import importlib.util
from collections.abc import Iterator

from transformer.config.adapter import AdapterConfig
from transformer.config.schema import Config


def problems_of_adapters(config: Config) -> Iterator[str]:
    """Yields a sentence for each mistake."""
    adapter, none = config.adapter, AdapterConfig()
    kind = f"adapter.kind = {adapter.kind!r}"
    if adapter.kind == "none":
        for key in ("base_run", "base"):
            if getattr(adapter, key) != getattr(none, key):
                yield f"adapter.{key} = {getattr(adapter, key)!r} is of an adapter, and {kind}: say 'lora' or 'dora'"
        return
    if not adapter.base_run:
        yield f"{kind} needs adapter.base_run, the directory of the run that it is for"
    if start := config.init_from.run or config.init_from.huggingface:
        yield f"init_from names {start!r}, and {kind}: what an adapter begins with is its base, adapter.base_run"
    if not adapter.targets:
        yield f"{kind} needs adapter.targets, linear maps such as query and value, or *"
    if config.parallel.stage != 1:
        pipeline = "the gradient of a pipeline is that of all parameters; split adapters by the other axes"
        yield f"parallel.stage = {config.parallel.stage} with {kind}: {pipeline}"
    if adapter.base != "none" and importlib.util.find_spec("qwix") is None:
        wanted = f"adapter.base = {adapter.base!r}"
        yield f"{wanted} needs the package qwix (pip install -e '.[quantization]')"
    if adapter.base != "none" and config.model.matrix_products != "compute_dtype":
        yield f"model.matrix_products = {config.model.matrix_products!r}: a base kept as {adapter.base} has its own products"
