"""How attention can be computed: one entry an implementation, with what it takes. What it cannot compute exactly it refuses."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformer.config.schema import Config, get

MASKS = ("causal", "bidirectional", "prefix", "window", "sinks", "dilated", "block_sparse", "unaligned")
"""Kinds of masks, several of which meet in one. All of them with packed texts and padding; `unaligned`: queries and keys of
different columns, those of a cache or of another text."""


@dataclass(frozen=True)
class Asked:
    """What one attention asks for."""

    masks: tuple[str, ...]
    """Of `MASKS`."""
    head_widths: tuple[int, int]
    """Of queries and keys, and of values."""
    dtype: str
    has_bias: bool = False
    has_soft_cap: bool = False
    platform: str | None = None
    """JAX's name for where it runs; None: not known."""


@dataclass(frozen=True)
class Implementation:
    """Where one is found, what it takes, and how the tests reach it without the hardware that it is for."""

    module: str
    function: str
    tested: str
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    masks: tuple[str, ...] = MASKS
    bias: bool = True
    soft_cap: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    head_multiple: int = 1
    widest_head: int | None = None
    """None: any."""
    other_values: bool = True
    """Whether values may have another width than keys."""

    @property
    def heads(self) -> str:
        """The widths of heads that it takes, in words."""
        widest = "" if self.widest_head is None else f" up to {self.widest_head}"
        same = "" if self.other_values else ", values as wide as keys"
        return "any" if self.head_multiple == 1 else f"multiples of {self.head_multiple}{widest}{same}"

    def refusals(self, asked: Asked) -> Iterator[tuple[str, str]]:
        """Yields what asks for something that it cannot compute exactly, and what it takes instead."""
        if asked.platform is not None and asked.platform not in self.platforms:
            yield "platform", f"runs on {' and '.join(self.platforms)}, and this is {asked.platform}"
        for mask in asked.masks:
            if mask == "unaligned" and mask not in self.masks:
                yield mask, "takes queries and keys of the same text and columns, not of a cache or of an encoder"
            elif mask not in self.masks:
                yield mask, f"takes masks of the kinds {', '.join(self.masks)}, not {mask}"
        if asked.has_bias and not self.bias:
            yield "bias", "adds no bias to the products of queries and keys"
        if asked.has_soft_cap and not self.soft_cap:
            yield "soft_cap", "does not bend the products of queries and keys"
        if asked.dtype not in self.dtypes:
            yield "dtype", f"computes in {' or '.join(self.dtypes)}, not {asked.dtype}"
        width, value_width = asked.head_widths
        is_wide = self.widest_head is not None and max(asked.head_widths) > self.widest_head
        is_other = value_width != width and not self.other_values
        if width % self.head_multiple or value_width % self.head_multiple or is_wide or is_other:
            widths = f"{width}" if value_width == width else f"{width} for keys and {value_width} for values"
            yield "head_widths", f"takes widths of heads that are {self.heads}; not {widths}"


def _plain(function: str, module: str = "transformer.models.dot_product") -> Implementation:
    return Implementation(module, function, "run")


def _gpu_kernel(function: str, tested: str) -> Implementation:
    # Both would round a bias to 16 bits; neither bends logits and differentiates that.
    return Implementation(
        "transformer.models.kernels",
        function,
        tested,
        platforms=("gpu",),
        bias=False,
        soft_cap=False,
        dtypes=("bfloat16",),
        head_multiple=8,
        widest_head=128,
        other_values=False,
    )


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": _plain("dot_product_attention"),
    "causal_blocks": Implementation(
        "transformer.models.causal_blocks", "causal_blocks", "run", bias=False, soft_cap=False
    ),
    "blockwise": _plain("blockwise_attention", "transformer.models.blockwise"),
    "splash": Implementation(
        "transformer.models.kernels",
        "splash",
        "interpreted; compiled for v5e where libtpu is installed",
        platforms=("tpu",),
        masks=("causal", "bidirectional", "window"),
        bias=False,
        head_multiple=8,
    ),
    "cudnn": _gpu_kernel(
        "cudnn",
        "not run; its calls written for cuda, what it is given computed by XLA; "
        "compiled for an H100 where the CUDA plugin is installed, but for cuDNN's own plans",
    ),
    "tokamax": _gpu_kernel(
        "tokamax",
        "not run; what it is given computed by XLA; compiled for an H100 where the CUDA plugin is installed",
    ),
}
"""By the names of `model.attention_implementation`, which also has `auto`."""


def refusals(config: Config, name: str, platform: str | None = None) -> Iterator[tuple[str, str]]:
    """Yields the keys, with their values, that ask of the implementation `name` what it cannot compute exactly, and what it
    takes instead."""
    model = config.model
    try:
        kinds = [
            kind
            for kind in (*model.first_kinds, *model.kinds, *model.encoder_kinds)
            if kind.mixer in ("attention", "latent_attention")
        ]
        widths = (model.head_dim, model.head_dim)
    except (ValueError, ZeroDivisionError):
        return  # a problem of its own
    width_key = "model.width" if model.head_width is None else "model.head_width"
    if any(kind.mixer == "latent_attention" for kind in kinds):
        widths, width_key = (model.head_dim + model.rotary_head_width, model.head_dim), "model.rotary_head_width"
    patterns = {kind.pattern for kind in kinds} - {"full"}
    # Each kind of mask that the configuration leads to, and the key that asks for it.
    keys_of_masks = {pattern: "model.layers" for pattern in patterns}
    if model.num_sinks and "window" in patterns:
        keys_of_masks["sinks"] = "model.num_sinks"
    if config.objective.name == "prefix_lm":
        keys_of_masks["prefix"] = "objective.name"
    if model.architecture == "encoder_decoder":
        keys_of_masks["unaligned"] = "model.architecture"
    elif model.has_decoder and config.evaluation.sample_tokens:
        keys_of_masks["unaligned"] = "evaluation.sample_tokens"
    keys_of_masks = {mask: key for mask, key in keys_of_masks.items() if kinds or key == "model.architecture"}
    has_bias = model.positions in ("alibi", "relative")
    has_soft_cap = bool(model.attention_soft_cap)
    asked = Asked(tuple(keys_of_masks), widths, model.compute_dtype, has_bias, has_soft_cap, platform)
    asking = keys_of_masks | {"bias": "model.positions", "soft_cap": "model.attention_soft_cap"}
    asking |= {"dtype": "model.compute_dtype", "platform": "model.attention_implementation"}
    asking["head_widths"] = width_key
    for what, takes in IMPLEMENTATIONS[name].refusals(asked):
        yield f"{asking[what]} = {get(config, asking[what])!r}", takes


def problems_of_attention(config: Config, platform: str | None) -> Iterator[str]:
    """Yields a sentence for each thing that the implementation of the configuration cannot compute exactly."""
    name = f"model.attention_implementation = {config.model.attention_implementation!r}"
    for asking, takes in refusals(config, config.model.attention_implementation, platform):
        yield f"{name} {takes}" if asking == name else f"{asking}: {name} {takes}"
